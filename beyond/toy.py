"""Words as tokens, and the tutorials' toy: five sentences to pre-train on, three prompts with responses to tune on."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

import llada_helpers as H
from beyond.dialogue import response_tokens
from beyond.likelihood import choose

STEPS = {"smoke": 150, "cpu": 200, "cpu_long": 200, "gpu": 200}  # of each of the two trainings
SENTENCES = ("I love pizza", "I love sushi", "You love pizza", "Math is fun", "Transformers are powerful")
PAIRS = {"Solve : 2 + 2 =": "4", "Translate : hello -> Spanish": "hola", "What is the capital of France ?": "Paris"}
CITIES = ("Paris", "London", "Berlin")
LENGTH = 12


class WordTokenizer(H.CharTokenizer):
    """A tokenizer whose texts are lists of words; decoded, spaces stand between them.

    >>> words = WordTokenizer.from_text(["[START]", "I", "love", "pizza"])
    >>> words.encode(["[START]", "pizza"]).tolist(), words.decode([4, 1, 6, 3])
    ([2, 6], 'I █ pizza')
    """

    @classmethod
    def from_text(cls, text: list[str]) -> "WordTokenizer":
        return cls(sorted(set(text).difference(H.SPECIAL_TOKENS)))

    def decode(self, ids) -> str:
        """Text up to the first [END]; [MASK] is shown as a block, other special tokens are skipped."""
        shown = itertools.takewhile(lambda i: i != H.END_ID, torch.as_tensor(ids).tolist())
        return " ".join(filter(None, (self._shown[i] for i in shown)))


TEXT = " ".join([*SENTENCES, *PAIRS, *PAIRS.values(), *CITIES]).split()
WORDS = WordTokenizer([*sorted(set(TEXT)), "[SEP]"])
SEPARATOR = int(WORDS.encode(["[SEP]"]))


def row(*parts: str) -> Tensor:
    """LongTensor[LENGTH]: [START], the parts with [SEP] between them, and [END] to the last place.

    >>> WORDS.decode(row("Math is fun", "hola"))
    'Math is fun [SEP] hola'
    """
    ids = WORDS.encode(["[START]", *" [SEP] ".join(parts).split()])
    return F.pad(ids, (0, LENGTH - len(ids)), value=H.END_ID)


def after_separator(rows: Tensor) -> Tensor:
    """BoolTensor[B, L]: the response, what follows [SEP].

    >>> int(after_separator(row("Math is fun", "hola")[None]).sum())  # hola and six [END]
    7
    """
    return response_tokens(rows, SEPARATOR)


def train_toy(steps: int):
    """The pre-trained model, tuned: two trainings of so many steps."""
    shape = H.ModelConfig(WORDS.vocab_size, LENGTH, n_layer=2, n_head=4, n_embd=64)
    config = H.TrainConfig(steps, 16, evals=1)
    sentences = torch.stack([row(sentence) for sentence in SENTENCES])
    start = H.train("toy", H.Job(shape, config, sentences, sentences), quiet=True).model
    pairs = torch.stack([row(*pair) for pair in PAIRS.items()])
    tuning = H.Job(shape, config, pairs, pairs, learned=after_separator, start=start)
    return H.train("toy-sft", tuning, quiet=True).model


def question(prompt: str) -> Tensor:
    """LongTensor[1, LENGTH]: the prompt, [SEP] and masks.

    >>> WORDS.decode(question("Math is fun")[0])
    'Math is fun [SEP] █ █ █ █ █ █ █'
    """
    ids = WORDS.encode(["[START]", *prompt.split(), "[SEP]"])
    return F.pad(ids, (0, LENGTH - len(ids)), value=H.MASK_ID)[None]


def answer(model, prompt: str) -> str:
    """The response that four steps of greedy decoding write."""
    template = question(prompt).to(next(model.parameters()).device)
    made = H.reverse_process(model, template, mask_id=H.MASK_ID, steps=4)
    return WORDS.decode(made.ids[template == H.MASK_ID])


def choose_city(model, prompt: str) -> tuple[str, float, float]:
    """The likeliest of CITIES after the prompt, its log-probability bound and that of the next best, nats."""
    template = question(prompt)[0].to(next(model.parameters()).device)
    prefix = template[template != H.MASK_ID]
    options = [WORDS.encode([city]).to(template.device) for city in CITIES]
    end = template.new_full((LENGTH - len(prefix) - 1,), H.END_ID)
    generator = torch.Generator().manual_seed(0)
    best, scores = choose(model, prefix, options, H.MASK_ID, n_samples=4, suffix=end, generator=generator)
    return CITIES[best], scores[best], sorted(scores)[-2]
