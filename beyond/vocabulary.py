"""Characters against byte pairs: other vocabularies for the same text, at the same compute."""

from dataclasses import replace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import llada_helpers as H
from beyond.quality import parts

MERGES = (1024,)
HELD_OUT = 20_000  # characters that all vocabularies are judged by
_LITTLE = (H.TrainConfig(40, 16, evals=1), H.TrainConfig(600, 16, evals=5))
SIZES = {  # the notebook's short form and the full one
    "smoke": (H.TrainConfig(10, 16, evals=1), H.TrainConfig(20, 16, evals=1)),
    "cpu": _LITTLE,
    "cpu_long": _LITTLE,
    "gpu": (H.TrainConfig(40, 16, evals=1), H.TrainConfig(2000, 64, evals=10)),
}


def byte_pairs(text: str, merges: int, alphabet: str = "") -> Tokenizer:
    """A byte-pair tokenizer (Sennrich et al. 2016) of the `tokenizers` library: special tokens 0 to 3, characters, then merges.

    Words are merged with the space before them, never with each other, and punctuation with its line ends.

    Args:
        text: what at most `merges` merges are learned from; a short text has fewer.
        alphabet: characters to know beyond those of `text`; any other is dropped in silence, as this library does.

    >>> pairs = byte_pairs("banana bandana", merges=4)
    >>> pairs.encode("banana").tokens, pairs.decode(pairs.encode("a banana").ids), pairs.token_to_id("[MASK]")
    (['ban', 'ana'], 'a banana', 1)
    """
    known = sorted(set(text + alphabet))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    options = {"special_tokens": list(H.SPECIAL_TOKENS), "initial_alphabet": known, "show_progress": False}
    size = len(H.SPECIAL_TOKENS) + len(known) + merges
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size, **options))
    tokenizer.encode_special_tokens = True  # as characters: a text that spells [MASK] has no mask
    return tokenizer


def multiplications(shape: H.ModelConfig) -> int:
    """Multiplications per token of a forward pass: matrices, attention, head.

    >>> multiplications(H.ModelConfig(vocab_size=10, seq_len=6, n_layer=1, n_head=2, n_embd=8))  # 12 x 64 + 2 x 6 x 8 + 10 x 8
    944
    """
    return shape.n_layer * (12 * shape.n_embd**2 + 2 * shape.seq_len * shape.n_embd) + shape.vocab_size * shape.n_embd


def vocabulary_jobs(preset: H.Preset, config: H.TrainConfig, text: str) -> tuple[dict[str, list[H.Job]], dict[str, Tensor]]:
    """LLaDA and AR on characters and on byte-pair vocabularies of MERGES merges: equal compute, and equal characters in sight.

    A window has as many characters on average, a step as many tokens, and there are as many steps as the same number of
    multiplications allows, a larger vocabulary's larger head included. Three seeds each, judged by the same text, the first
    HELD_OUT characters of the validation text, in nats per *character*.

    Returns:
        the trainings of each row, and the characters of each of its tokens, LongTensor[vocab_size], for `run_jobs(lengths=...)`.

    >>> jobs, lengths = vocabulary_jobs(H.PRESETS["smoke"], H.TrainConfig(100, 16), "the cat sat on the mat. " * 200)
    >>> for row in ("LLaDA, characters", "LLaDA, 1,024 merges"):
    ...     model, config = jobs[row][0].model, jobs[row][0].train
    ...     row, model.vocab_size, model.seq_len, config.batch_size, config.steps, int(lengths[row][4:].max())
    ('LLaDA, characters', 15, 64, 16, 100, 1)
    ('LLaDA, 1,024 merges', 28, 19, 54, 119, 4)
    """
    characters = H.CharTokenizer.from_text(text)
    cut, validation, _ = map(len, parts(characters.encode(text)))
    shown, held = text[:cut], text[cut : cut + min(HELD_OUT, validation)]
    one = torch.ones(characters.vocab_size, dtype=torch.long)
    variants = {"characters": (characters.encode(shown), characters.encode(held), one)}
    for merges in MERGES:
        pairs = byte_pairs(shown, merges, text)
        each = torch.tensor([len(pairs.id_to_token(i)) for i in range(pairs.get_vocab_size())])
        variants[f"{merges:,} merges"] = (*(torch.tensor(pairs.encode(part).ids) for part in (shown, held)), each)
    jobs, lengths = {}, {}
    for model, causal in (("LLaDA", False), ("AR", True)):
        base = preset.model(characters.vocab_size, causal)
        for name, (train_ids, val_ids, each) in variants.items():
            seq_len = max(1, round(preset.seq_len * len(train_ids) / len(shown)))
            shape = replace(base, vocab_size=len(each), seq_len=seq_len)
            batch_size = round(config.batch_size * preset.seq_len / seq_len)
            whole = config.batch_size * base.seq_len * multiplications(base)
            passes = whole / (batch_size * seq_len * multiplications(shape))
            change = {"steps": round(config.steps * passes), "batch_size": batch_size, "eval_windows": len(held)}
            configs = [replace(config, seed=seed, **change) for seed in range(3)]
            jobs[f"{model}, {name}"] = [H.Job(shape, c, train_ids, val_ids) for c in configs]
            lengths[f"{model}, {name}"] = each
    return jobs, lengths
