"""Words, dialogue, fine-tuning, byte pairs and invented facts: what stands beside the characters of one text."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from oracle import END, MASK, PAD, START, WrongPredictor

import llada_helpers as h


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- tokenizer of words, special tokens ---

SEP = "[SEP]"
SPELLED = st.lists(st.sampled_from([*h.SPECIAL_TOKENS, SEP, "[", "]", "S", "MASK", " ", "x"]), min_size=1).map("".join)
WORD = st.text(st.characters(exclude_categories=["Zs", "Cc", "Cs"]), min_size=1, max_size=5).filter(lambda w: w not in NAMES)
NAMES = (*h.SPECIAL_TOKENS, SEP, "<a>")


def same_tokenizer(a, b):
    return (a.characters, a.special, a.vocab_size, a._id_of) == (b.characters, b.special, b.vocab_size, b._id_of)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.sampled_from([(), (SEP,), (SEP, "<a>")]))
def test_special_tokens_come_last_and_change_nothing_for_characters(text, special):
    plain, more = h.CharTokenizer.from_text(text), h.CharTokenizer.from_text(text, special)
    assert torch.equal(plain.encode(text), more.encode(text)) and more.decode(more.encode(text)) == text
    assert more.vocab_size == plain.vocab_size + len(special)
    assert more.encode(list(special)).tolist() == list(range(plain.vocab_size, more.vocab_size))
    assert more.encode(list(h.SPECIAL_TOKENS)).tolist() == [0, 1, 2, 3]
    assert same_tokenizer(h.CharTokenizer.from_json(more.to_json()), more)


@given(st.lists(WORD, min_size=1, max_size=12), st.sampled_from([(), (SEP,), (SEP, "<a>")]))
@example(["2", "+", "2"], ())
def test_words_round_trip(text, special):
    """Joined by single spaces, even where every word has one letter."""
    tokenizer = h.CharTokenizer.from_text(text, special)
    ids = tokenizer.encode(text)
    assert ids.tolist() == [4 + sorted(set(text)).index(word) for word in text]
    assert tokenizer.vocab_size == 4 + len(set(text)) + len(special)
    again = h.CharTokenizer.from_json(tokenizer.to_json())
    assert same_tokenizer(again, tokenizer)
    assert tokenizer.decode(ids) == again.decode(ids.tolist()) == " ".join(text)


@given(SPELLED, st.sampled_from([(), (SEP,)]))
def test_no_text_spells_a_special_token(text, special):
    tokenizer = h.CharTokenizer.from_text(text, special)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and ids.min() >= 4 and ids.max() < 4 + len(set(text))
    assert tokenizer.decode(ids) == text


def test_text_in_place_of_words_is_refused_by_what_is_unknown():
    words = h.CharTokenizer.from_text(["I", "love", "pizza"], special=(SEP,))
    for text in (SEP, "[MASK]", "pizza", "I love"):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            words.encode(text)


def test_unknown_words_are_named():
    words = h.CharTokenizer.from_text(["I", "love", "pizza"], special=(SEP,))
    with pytest.raises(ValueError) as error:
        words.encode(["I", "hate", SEP, "sushi", "[CLS]"])
    assert all(repr(word) in str(error.value) for word in ("hate", "sushi", "[CLS]"))
    assert not any(repr(word) in str(error.value) for word in ("I", SEP))


def test_special_names_in_a_list_are_no_words():
    text = ["[START]", "2", "+", "2", SEP, "4", "[END]", "[END]"]
    tokenizer = h.CharTokenizer.from_text(text, special=(SEP,))
    assert tokenizer.characters == ["+", "2", "4"]
    assert tokenizer.encode(text).tolist() == [2, 5, 4, 5, 7, 6, 3, 3]
    assert tokenizer.decode(tokenizer.encode(text)) == "2 + 2 4"


def test_words_are_shown_up_to_the_first_end_without_special_tokens():
    tokenizer = h.CharTokenizer.from_text(["I", "love", "pizza"], special=(SEP,))
    assert tokenizer.decode([START, 4, PAD, 7, 5, MASK, END, 6, END]) == f"I love {h.MASK_GLYPH}"
    assert tokenizer.decode([START, 7, PAD]) == "" == tokenizer.decode([END, 4])


BAD_NAMES = [("[MASK]",), (SEP, SEP), ("[PAD]", SEP), ("love",), ("a",), ("",), (SEP, "x"), SEP]


@pytest.mark.parametrize("special", BAD_NAMES)
def test_clashing_or_short_special_names_are_refused(special):
    with pytest.raises(ValueError):
        h.CharTokenizer(["I", "love"], special)
    if "love" not in special:
        with pytest.raises(ValueError):
            h.CharTokenizer.from_text("I love you", special)


@pytest.mark.parametrize("text", ["banana", ["I", "love", "pizza"], ["2", "+"]])
@pytest.mark.parametrize("special", [(), (SEP,)])
def test_tokenizer_is_saved_and_loaded(tmp_path, text, special):
    tokenizer = h.CharTokenizer.from_text(text, special)
    tokenizer.save_pretrained(tmp_path / "new")
    again = h.CharTokenizer.from_pretrained(tmp_path / "new")
    assert same_tokenizer(again, tokenizer)
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        h.CharTokenizer.from_pretrained(tmp_path)


def made_json(characters, special_tokens):
    return json.dumps({"characters": characters, "special_tokens": special_tokens})


FOUR = list(h.SPECIAL_TOKENS)


@pytest.mark.parametrize(
    "text",
    [
        *("[1]", "5", '"ab"', "null", '{"special_tokens": []}', "{", made_json(None, FOUR), made_json([1, 2], FOUR)),
        *(made_json("ab", 7), made_json("ab", None), made_json("ab", [*FOUR, 7]), made_json("ab", [*FOUR, ["a", "b"]])),
        *(made_json("ab", "".join(FOUR)), made_json("ab", FOUR[:2]), made_json("ab", FOUR[::-1]), made_json("aa", FOUR)),
        *(made_json([SEP, "b"], [*FOUR, SEP]), made_json({"a": 1, "b": 2}, FOUR), made_json([["a"]], FOUR)),
    ],
)
def test_damaged_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"pass|use"):
        h.CharTokenizer.from_json(text)


@pytest.mark.parametrize("text", [made_json(" abc", FOUR), '{"characters": " abc"}'])
def test_json_of_before_special_tokens_loads(text):
    tokenizer = h.CharTokenizer.from_json(text)
    assert tokenizer.special == () and tokenizer.vocab_size == 8
    assert tokenizer.encode("a cab").tolist() == [5, 4, 7, 5, 6] and tokenizer.decode([5, 4, 7]) == "a c"


# --- dialogue ---

LINE = st.text("aB: ", min_size=1, max_size=6)
SPEECHES = st.lists(st.tuples(st.text("AB c", min_size=1, max_size=4), st.lists(LINE, min_size=1, max_size=3).map("\n".join)))


@given(SPEECHES, st.sampled_from(["", "\n", "\n\n"]))
def test_every_speech_is_found_with_the_one_before_it(speeches, end):
    """Speeches may have colons and several lines, also lines that look like a name."""
    text = "\n\n".join(f"{name}:\n{speech}" for name, speech in speeches) + end
    befores = ["", *(speech for _, speech in speeches)]
    assert h.dialogue(text) == [(before, *both) for before, both in zip(befores, speeches)]


NO_SPEECH = ["", "no names here", "one\n\ntwo: three\n\nfour", "NAME: on the same line", ":\nno name", "A:\n", "A: B:\nOne."]
NO_SPEECH += ["They fight\nA:\nOne.", "They fight\n\n\nA: thus:\nOne.\n"]


@pytest.mark.parametrize("text", NO_SPEECH)
def test_text_without_speeches_gives_none(text):
    assert h.dialogue(text) == []


def test_who_says_nothing_does_not_say_what_the_next_one_says():
    """As in the corpus, where names without a speech stand."""
    assert h.dialogue("A:\nHi.\n\nB:\n\nC:\nNoble B!\n\nD:\n\n") == [("", "A", "Hi."), ("Hi.", "C", "Noble B!")]


def test_what_stands_between_speeches_is_left_out():
    assert h.dialogue("ACT I\n\nA:\nOne.\n\nThey fight\n\nB:\nTwo.") == [("", "A", "One."), ("One.", "B", "Two.")]


@pytest.mark.parametrize("fraction", np.linspace(0.05, 0.95, 19))
def test_the_parts_of_a_split_play_share_no_speech(fraction):
    """Cut anywhere, also within a name or a speech."""
    play = "\n\n".join(f"{'ABC'[i % 3]}:\nspeech {i}: of {i * i + 1000},\nand no more of {i}." for i in range(20))
    cut = int(fraction * len(play))
    shown, held = (h.dialogue(part) for part in (play[:cut], play[cut:]))
    assert not held or held[0][0] == "", "nothing precedes the first speech of a part"
    pieces = [{piece for before, _, speech in part for piece in (before, speech)} - {""} for part in (shown, held)]
    assert not pieces[0] & pieces[1] and len(pieces[0] | pieces[1]) >= 19
    assert not any(piece in play[:cut] for piece in pieces[1])


# --- rows for fine-tuning ---


def test_layout_of_a_row():
    tokenizer = h.CharTokenizer.from_text("abcd")
    rows = h.instruction_rows([("abcd", "dc"), ("a", ""), ("", "abc")], tokenizer, seq_len=8, prompt_len=3)
    assert rows.tolist() == [[5, 6, 7, START, 7, 6, END, END], [4, START, *[END] * 6], [START, 4, 5, 6, *[END] * 4]]
    assert rows.dtype == torch.long


def test_rows_of_words():
    tokenizer = h.CharTokenizer.from_text(["Paris", "capital", "of", "France"])
    (row,) = h.instruction_rows([(["capital", "of", "France"], ["Paris"])], tokenizer, seq_len=6, prompt_len=2)
    assert row.tolist() == [7, 4, START, 5, END, END]


@pytest.mark.parametrize("room", [1, 2, 5])
def test_response_must_leave_room_for_one_end(room):
    tokenizer = h.CharTokenizer.from_text("ab")
    pairs = [("a", "b" * n) for n in range(8)]
    rows = h.instruction_rows(pairs, tokenizer, seq_len=3 + room + 2, prompt_len=3)
    assert [tokenizer.decode(row[2:]) for row in rows] == ["b" * n for n in range(room + 1)]
    full = h.instruction_rows([("aaaa", "b" * room)], tokenizer, seq_len=3 + room + 2, prompt_len=3)
    assert full[0].tolist() == [4, 4, 4, START, *[5] * room, END]


@pytest.mark.parametrize("seq_len, prompt_len", [(5, 0), (5, -1), (5, 3), (5, 5), (2, 1), (0, 1)])
def test_rows_without_room_are_refused(seq_len, prompt_len):
    with pytest.raises(ValueError, match="leave room"):
        h.instruction_rows([("a", "a")], h.CharTokenizer.from_text("a"), seq_len, prompt_len)


@pytest.mark.parametrize("pairs", [[], [("a", "aaaa")], [("", "aaaa"), ("a", "a" * 50)]])
def test_no_row_at_all_is_refused(pairs):
    with pytest.raises(ValueError, match="pass pairs"):
        h.instruction_rows(pairs, h.CharTokenizer.from_text("a"), seq_len=8, prompt_len=3)


def test_unknown_characters_of_a_pair_are_named():
    for pair in (("é", "a"), ("a", "é")):
        with pytest.raises(ValueError, match="é"):
            h.instruction_rows([pair], h.CharTokenizer.from_text("a"), seq_len=8, prompt_len=3)


@st.composite
def instructions(draw):
    """Pairs of texts or of lists of words, a tokenizer, and their rows."""
    words = draw(st.booleans())
    one = st.lists(st.sampled_from(["I", "love", "pizza", "2"]), max_size=7) if words else st.text("abc", max_size=7)
    pairs = draw(st.lists(st.tuples(one, one), min_size=1, max_size=5))
    tokenizer = h.CharTokenizer.from_text(["I", "love", "pizza", "2"] if words else "abc", draw(st.sampled_from([(), (SEP,)])))
    prompt_len, room = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    assume(any(len(response) <= room for _, response in pairs))
    rows = h.instruction_rows(pairs, tokenizer, prompt_len + room + 2, prompt_len)
    return [(p[-prompt_len:], r) for p, r in pairs if len(r) <= room], tokenizer, rows


@given(instructions())
def test_a_row_is_its_prompt_and_its_response(made):
    pairs, tokenizer, rows = made
    gap = "" if isinstance(tokenizer.characters, str) else " "
    assert len(rows) == len(pairs)
    for row, learned, (prompt, response) in zip(rows, h.response_tokens(rows), pairs):
        assert learned.tolist() == [False] * (len(prompt) + 1) + [True] * (len(row) - len(prompt) - 1)
        assert row[learned].tolist() == [*tokenizer.encode(response).tolist(), *[END] * (int(learned.sum()) - len(response))]
        assert row[-1] == END and not (row == PAD).any()
        assert tokenizer.decode(row[learned]) == gap.join(response) and tokenizer.decode(row[~learned]) == gap.join(prompt)


# --- fine-tuning: the prompt is given ---


@given(instructions(), st.integers(0, 10**6))
def test_what_is_predicted_at_the_prompt_does_not_matter(made, seed):
    """Not for the loss, were it NaN there, nor for the gradient, which reaches the response alone."""
    _, tokenizer, rows = made
    job = h.Job(h.ModelConfig(tokenizer.vocab_size, rows.shape[1], 1, 1, 8), None, rows, rows, learned=h.response_tokens)
    for make_batch in (h.diffusion_batch, h.next_token_batch):
        batch = h.training_batch(rows, rows.shape[1], 4, 0, seed, make_batch, job.learned)
        prompt = ~h.response_tokens(batch[1])
        logits = torch.randn(*prompt.shape, tokenizer.vocab_size, generator=seeded(seed)).requires_grad_()
        loss = h.weighted_nll(lambda _, logits=logits: logits, *batch)
        loss.backward()
        assert (logits.grad[prompt] == 0).all() and torch.equal((logits.grad != 0).any(dim=-1), batch[2] > 0)
        spoilt = logits.detach().masked_fill(prompt[..., None], math.nan)
        assert torch.equal(h.weighted_nll(lambda _, spoilt=spoilt: spoilt, *batch), loss.detach())


def after_separator(rows):
    return h.response_tokens(rows, separator=9)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5), st.integers(0, 10**6))
def test_another_separator_ends_the_prompt(lengths, seed):
    """Rows [START] prompt [SEP] response [END] ...: the [START] at their head separates nothing."""
    rows = torch.full((len(lengths), 11), END)
    for row, (prompt, response) in zip(rows, lengths):
        row[: prompt + response + 2] = torch.tensor([START, *[5] * prompt, 9, *[6] * response])
    learned = after_separator(rows)
    assert [int(n) for n in learned.sum(dim=1)] == [9 - prompt for prompt, _ in lengths]
    assert (learned.diff(dim=1).sum(dim=1) == 1).all() and not learned[(rows == START) | (rows == 5) | (rows == 9)].any()
    inputs, targets, weight = h.training_batch(rows, 11, 8, 0, seed, h.diffusion_batch, after_separator)
    given_tokens = ~after_separator(targets)
    assert torch.equal(inputs[given_tokens], targets[given_tokens]) and (weight[given_tokens] == 0).all()


@pytest.mark.parametrize("n_samples", [1, 5, h.MANY_SAMPLES])
def test_bound_never_shows_a_masked_prompt(n_samples):
    tokenizer = h.CharTokenizer.from_text("abcd")
    pairs = [("abc", "dd"), ("b", ""), ("ddda", "abca"), ("", "c")]
    rows = h.instruction_rows(pairs, tokenizer, seq_len=11, prompt_len=4)
    learned, seen, wrong = h.response_tokens(rows), [], WrongPredictor(tokenizer.vocab_size, longest=11)

    def spy(ids):
        seen.append(ids)
        return wrong(ids)

    bounds = h.nelbo(spy, rows, MASK, n_samples=n_samples, maskable=learned, generator=seeded(0))
    masked = torch.cat(seen).view(n_samples, *rows.shape)
    assert torch.equal(masked[:, ~learned], rows[~learned].expand(n_samples, -1))
    assert ((masked == MASK).sum(dim=-1) >= 1).all(), "and something of each response is hidden"
    assert bounds.isfinite().all()


# --- responses end ---


def sure_of(*tokens):
    """A mask predictor that writes `tokens`, whatever it is shown, the surer the further left."""
    return lambda ids: torch.eye(10)[list(tokens)].mul(torch.arange(len(tokens), 0, -1)[:, None]).expand(len(ids), -1, -1)


@pytest.mark.parametrize(
    "response, shown",
    [((4, 5, END, 6, 7), "ab"), ((END, 4, 5, 6, 7), ""), ((4, 5, 6, 7, END), "abcd"), ((4, END, 5, END, 6), "a")],
)
def test_response_is_cut_at_its_first_end(response, shown):
    """What a decoder leaves behind [END] is filled all the same, and not shown."""
    tokenizer = h.CharTokenizer.from_text("abcdef")
    template = torch.tensor([[8, 9, START, *[MASK] * 5]])
    for steps in (1, 5):
        made = h.reverse_process(sure_of(4, 4, 4, *response), template, mask_id=MASK, steps=steps)
        assert made.ids.tolist() == [[8, 9, START, *response]]
        assert tokenizer.decode(made.ids[0, 3:]) == shown and tokenizer.decode(made.ids[0]) == "ef" + shown


# --- guidance ---


@pytest.mark.parametrize("remasking", h.REMASKING)
def test_zero_guidance_draws_the_same_tokens_from_one_pass(remasking):
    template = torch.tensor([[4, 1, 1, 5, 1, 1], [1, 1, 6, 1, 1, 7]])
    drawn = []
    for options in ({}, {"cfg_scale": 0.0}, {"cfg_scale": 1.0}):
        predict = WrongPredictor(10, seed=6)
        options |= {"mask_id": MASK, "steps": 4, "temperature": 1.0, "remasking": remasking}
        drawn.append((h.reverse_process(predict, template, generator=seeded(3), **options), predict.rows))
    (plain, rows), (zero, rows_of_zero), (guided, _) = drawn
    assert torch.equal(plain.ids, zero.ids) and torch.equal(plain.order, zero.order) and rows == rows_of_zero == 2 * plain.nfe
    assert not torch.equal(plain.ids, guided.ids)


def test_zero_guidance_scores_as_no_guidance():
    prompt, options = torch.tensor([4, 5]), [torch.tensor([6, 7, 8]), torch.tensor([8, 6, 6]), torch.tensor([9])]
    scored = []
    for more in ({}, {"cfg_scale": 0.0}, {"cfg_scale": 1.0}):
        predict, more = WrongPredictor(10, seed=2), {"n_samples": 6, **more}
        single = [h.log_likelihood(predict, prompt, option, MASK, generator=seeded(1), **more) for option in options]
        chosen = h.choose(predict, prompt, options, MASK, suffix=torch.tensor([4]), generator=seeded(1), **more)
        scored.append((single, chosen, predict.rows))
    assert scored[0] == scored[1]
    assert scored[0][0] != scored[2][0] and scored[0][1][1] != scored[2][1][1] and scored[2][2] == 2 * scored[0][2]


def leans(ids):
    """Token 4 one nat ahead of 5 where anything is given, and one and a half where everything is masked; the rest impossible."""
    ahead = torch.where((ids == MASK).all(dim=1), 1.5, 1.0)[:, None, None] * torch.eye(10)[4]
    return ahead.masked_fill(~torch.isin(torch.arange(10), torch.tensor([4, 5])), -math.inf).expand(-1, ids.shape[1], -1)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.9, 2.1, 5.0])
def test_guidance_follows_equation_16(scale):
    """By hand: 1.5 + (w + 1) (1 - 1.5) nats ahead, so that w = 2 turns the scales."""
    ahead = 1.5 + (scale + 1) * (1.0 - 1.5)
    template = torch.tensor([[7, MASK, 8]])
    made = h.reverse_process(leans, template, mask_id=MASK, steps=1, cfg_scale=scale)
    assert made.ids.tolist() == [[7, 4 if ahead > 0 else 5, 8]]
    prompt, options = template[0, :1], [torch.tensor([5]), torch.tensor([4])]
    index, scores = h.choose(leans, prompt, options, MASK, n_samples=2, suffix=template[0, 2:], cfg_scale=scale)
    expected = torch.tensor([0.0, ahead]).log_softmax(0).tolist()
    assert index == int(ahead > 0) and scores == pytest.approx(expected, abs=1e-5)
    alone = h.log_likelihood(leans, prompt, options[1], MASK, n_samples=1, cfg_scale=scale)
    assert alone == pytest.approx(expected[1], abs=1e-5)


# --- five sentences, three instructions: a whole training ---

SENTENCES = ["I love pizza", "I love sushi", "You love pizza", "Math is fun", "Transformers are powerful"]
ANSWERS = {
    "Solve : 2 + 2 =": "4",
    "Translate : hello -> Spanish": "hola",
    "What is the capital of France ?": "Paris",
}
TOY_LEN = 12
TOY = h.CharTokenizer.from_text(" ".join([*SENTENCES, *ANSWERS, *ANSWERS.values(), "London", "Berlin"]).split(), special=(SEP,))
SEP_ID = int(TOY.encode([SEP]))


def toy_row(words):
    return TOY.encode([*words, *["[END]"] * (TOY_LEN - len(words))])


def toy_responses(rows):
    return h.response_tokens(rows, separator=SEP_ID)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The model after pre-training, and after fine-tuning."""
    root = tmp_path_factory.mktemp("toy")
    sentences = torch.stack([toy_row(["[START]", *text.split()]) for text in SENTENCES])
    instructions = torch.stack([toy_row(["[START]", *q.split(), SEP, a]) for q, a in ANSWERS.items()])
    shape = h.ModelConfig(TOY.vocab_size, TOY_LEN, n_layer=2, n_head=2, n_embd=32)
    config = h.TrainConfig(steps=200, batch_size=16, evals=2)
    first = h.train("sentences", h.Job(shape, config, sentences, sentences), root=root, quiet=True)
    job = h.Job(shape, config, instructions, instructions, learned=toy_responses, start=first.model)
    return first, h.train("instructions", job, root=root, quiet=True)


def asked(question):
    head = TOY.encode(["[START]", *question.split(), SEP])
    return torch.cat((head, torch.full((TOY_LEN - len(head),), MASK)))[None], len(head)


def test_pretraining_fills_a_sentence(toy):
    template = toy_row(["[START]", "Math", "is", "[MASK]"])[None]
    made = h.reverse_process(toy[0].model, template, mask_id=MASK, steps=1)
    assert TOY.decode(made.ids[0]) == "Math is fun"


@pytest.mark.parametrize("question", ANSWERS)
@pytest.mark.parametrize("steps", [1, None])
def test_fine_tuned_model_answers(toy, question, steps):
    template, head = asked(question)
    steps = steps or TOY_LEN - head
    before, after = (h.reverse_process(run.model, template, mask_id=MASK, steps=steps) for run in toy)
    assert TOY.decode(after.ids[0, head:]) == ANSWERS[question] != TOY.decode(before.ids[0, head:])
    assert torch.equal(after.ids[:, :head], template[:, :head]) and (after.order[:, :head] == -1).all()
    assert (after.ids[0, head + 1 :] == END).all()


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("words", [["London", "Paris", "Berlin"], ["4", "hola", "Paris"]])
def test_fine_tuned_model_chooses_the_answer_to_the_question(toy, words, cfg_scale):
    options = [TOY.encode([word, "[END]"]) for word in words]
    for question, answer in ANSWERS.items():
        if answer in words:
            template, head = asked(question)
            index, scores = h.choose(
                toy[1].model, template[0, :head], options, MASK, n_samples=8, cfg_scale=cfg_scale, generator=seeded(0)
            )
            assert words[index] == answer and scores[index] > math.log(0.5)


# --- invented facts ---

FACTS = st.builds(h.invented_facts, st.integers(1, 12), st.integers(0, 10**6))


def sentences_of(facts, rows):
    return [facts.tokenizer.decode(row) for row in rows]


@given(FACTS)
def test_facts_are_told_as_they_are_told(facts):
    """Each direction once or not at all; the one not told is in no training row, nor is its answer after its question."""
    trained = Counter(sentences_of(facts, facts.training_rows()))
    assert Counter(facts.told) == dict.fromkeys(("forwards", "backwards", "both"), len(facts.told) // 3)
    for told, forwards, backwards in zip(facts.told, *(sentences_of(facts, r) for r in (facts.forwards, facts.backwards))):
        x, role, place = re.fullmatch(r"(\w+) is the (\w+) of (\w+) \.", forwards).groups()
        assert backwards == f"the {role} of {place} is {x} ."
        assert (trained[forwards], trained[backwards]) == (told != "backwards", told != "forwards")
        if told == "forwards":
            assert not any(f"{role} of {place} is" in row for row in trained)
        if told == "backwards":
            assert not any(f"{x} is" in row and not row.endswith(f"is {x} .") for row in trained)
    assert len(facts.training_rows()) == trained.total() == 4 * len(facts.told) // 3


@given(FACTS)
def test_people_and_their_descriptions_are_unique(facts):
    rows = facts.forwards
    assert len(rows[:, 0].unique()) == len(rows) == len(rows[:, [3, 5]].unique(dim=0))
    names, rest = set(rows[:, 0].tolist()), set(rows[:, 1:].flatten().tolist())
    assert not names & rest, "no name is a role, a place or another word"
    assert torch.equal(facts.backwards, rows[:, [2, 3, 4, 5, 1, 0, 6]])


@pytest.mark.parametrize("per_group", [1, 7, 84])
def test_vocabulary_of_facts_covers_both_tellings(per_group):
    facts = h.invented_facts(per_group, 3)
    assert facts.forwards.shape == facts.backwards.shape == (3 * per_group, 7)
    used = torch.cat((facts.forwards, facts.backwards))
    assert used.min() >= 4 and used.max() < facts.tokenizer.vocab_size
    assert {*h.ROLES, *h.PLACES, "is", "the", "of", "."} <= set(facts.tokenizer.characters)
    again = h.CharTokenizer.from_json(facts.tokenizer.to_json())
    assert [again.decode(row) for row in used] == sentences_of(facts, used)


def test_roles_and_places_belong_to_many():
    """Neither alone tells who is meant."""
    rows = h.invented_facts(60, 0).forwards
    assert all(column.unique(return_counts=True)[1].max() >= 5 for column in (rows[:, 3], rows[:, 5]))


def test_facts_are_a_function_of_the_seed():
    a, b, c = (h.invented_facts(5, seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in ((a.forwards, b.forwards), (a.backwards, b.backwards)))
    assert a.tokenizer.characters == b.tokenizer.characters and (a.told == b.told).all()
    assert set(sentences_of(a, a.forwards)) != set(sentences_of(c, c.forwards))


@pytest.mark.parametrize("per_group", [0, -1, 85, 10**6])
def test_too_few_or_too_many_facts_are_refused(per_group):
    with pytest.raises(ValueError, match="pass 1 to 84"):
        h.invented_facts(per_group, 0)


# --- byte pairs ---

ALPHABET = "abMASK []_.,'\n\té漢ж"
PAIRS = h.byte_pairs("a [MASK] bab,\n\n'MASK' aa[END]baba. MASK [MASK]\n" * 3, merges=25, alphabet=ALPHABET)
PIECES = st.lists(st.sampled_from([*ALPHABET, *h.SPECIAL_TOKENS[1:2], " [MASK]", "  ", "\n\n", "bab"]), max_size=20).map("".join)


@given(PIECES)
def test_byte_pairs_lose_nothing_and_spell_no_special_token(text):
    encoded = PAIRS.encode(text)
    assert PAIRS.decode(encoded.ids) == "".join(encoded.tokens) == text
    assert all(i >= 4 for i in encoded.ids)


def test_byte_pairs_begin_with_the_special_tokens():
    assert [PAIRS.id_to_token(i) for i in range(4)] == list(h.SPECIAL_TOKENS)


def test_byte_pairs_know_the_alphabet_beyond_their_text():
    pairs = h.byte_pairs("abab", merges=3, alphabet="xéb漢\n")
    assert pairs.decode(pairs.encode("é漢\nx").ids) == "é漢\nx"
    assert {pairs.id_to_token(i) for i in range(4, 10)} == set("abxé漢\n")


def random_text(seed, characters):
    """Invented words of unlike frequencies, with punctuation and lines."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("aeioubdfgklmnprst"), size=rng.integers(1, 9))) for _ in range(900)]
    chosen = rng.choice(words, size=characters // 3, p=(weights := 1 / np.arange(1, 901)) / weights.sum())
    ends = rng.choice([" ", " ", " ", " ", ", ", ".\n", ":\n\n", "--"], size=len(chosen))
    return "".join(w + e for w, e in zip(chosen, ends))[:characters]


@pytest.mark.parametrize("merges", [0, 1, 40, 400])
def test_merges_stay_within_words_and_within_their_number(merges):
    text = random_text(1, 20_000)
    pairs = h.byte_pairs(text, merges)
    size = 4 + len(set(text)) + merges
    assert pairs.get_vocab_size() == size
    tokens = [pairs.id_to_token(i) for i in range(4, size)]
    assert set(tokens[: size - merges - 4]) == set(text) and len(set(tokens)) == size - 4
    assert all(re.fullmatch(r" ?\w+|\W+", token) for token in tokens)
    if merges == 1:
        (merged,) = [token for token in tokens if len(token) > 1]
        words = re.findall(r" ?\w+|[^\w]+?(?= \w|\w|\Z)", text)
        counts = Counter(word[i : i + 2] for word in words for i in range(len(word) - 1))
        assert counts[merged] == max(counts.values())


def test_a_short_text_has_fewer_merges():
    assert h.byte_pairs("abab ab", merges=1000).get_vocab_size() <= 4 + 3 + 4


def test_byte_pairs_are_the_same_every_time():
    """Their ids enter the fingerprints of trainings; here most pairs are equally frequent."""
    text = " ".join(a + b + c for a in "abcdef" for b in "ghijk" for c in "lmnop")
    first, *others = [h.byte_pairs(text, 60).get_vocab() for _ in range(5)]
    assert all(other == first for other in others)


# --- characters against byte pairs ---

CUT, HELD = 96_000, 20_000
TEXT = random_text(0, CUT + 50) + "é is in the second part alone" + random_text(1, 120_000)
TEXT = TEXT[:120_000]
CHARACTER_ROWS = ("LLaDA, characters", "AR, characters")


@pytest.fixture(scope="module")
def vocabularies():
    """The jobs of the smoke preset, longer, and the decoders of their ids by the name of the variant."""
    decoders = {"characters": h.CharTokenizer.from_text(TEXT).decode}
    original = h.byte_pairs

    def recorded(text, merges, alphabet):
        pairs = original(text, merges, alphabet)
        decoders[f"{merges:,} merges"] = lambda ids: pairs.decode(ids.tolist())
        return pairs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h, "byte_pairs", recorded)
        return h.vocabulary_jobs(h.PRESETS["smoke"], h.TrainConfig(500, 16), TEXT), decoders


def test_every_vocabulary_has_the_same_text(vocabularies):
    """Trained on the first part, judged by the same characters of the rest, none of them lost or counted twice."""
    jobs, decoders = vocabularies
    assert list(jobs) == [f"{model}, {name}" for model in ("LLaDA", "AR") for name in decoders]
    for row, trials in jobs.items():
        decode = decoders[row.split(", ", 1)[1]]
        assert [job.train.seed for job in trials] == [0, 1]
        for job in trials:
            assert decode(job.train_ids) == TEXT[:CUT] and decode(job.val_ids) == TEXT[CUT : CUT + HELD]
            assert int(job.token_lengths[job.train_ids].sum()) == CUT and int(job.token_lengths[job.val_ids].sum()) == HELD
            assert len(job.token_lengths) == job.model.vocab_size
            assert max(int(ids.max()) for ids in (job.train_ids, job.val_ids)) < job.model.vocab_size
            sequences = job.validation_sequences()
            assert int(job.characters(sequences).sum()) == HELD, "every window is judged, padding is no character"
            assert torch.equal(sequences[sequences != PAD], job.val_ids)


def multiplications(job):
    """Of all forward passes of a training: all matrices but the embedding, as the model has them, and queries, keys, values."""
    model, shape = h.Transformer(job.model), job.model
    matrices = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embed"))
    attention = 2 * shape.n_layer * shape.seq_len * shape.n_embd
    return job.train.steps * job.train.batch_size * shape.seq_len * (matrices + attention)


def test_every_vocabulary_has_the_same_compute_and_as_much_in_sight(vocabularies):
    jobs, _ = vocabularies
    first = jobs[CHARACTER_ROWS[0]][0]
    assert len({job.model.vocab_size for trials in jobs.values() for job in trials}) == 1 + len(h.MERGES)
    for trials in jobs.values():
        for job in trials:
            assert multiplications(job) == pytest.approx(multiplications(first), rel=0.02)
            each = CUT / len(job.train_ids)
            assert abs(job.model.seq_len * each - first.model.seq_len) <= each / 2
            assert abs(job.train.batch_size * job.model.seq_len - 16 * 64) <= job.model.seq_len / 2
            assert (job.model.n_layer, job.model.n_embd) == (first.model.n_layer, first.model.n_embd)


def test_both_models_have_the_same_steps_and_batches(vocabularies):
    jobs, decoders = vocabularies
    for name in decoders:
        for llada, ar in zip(jobs[f"LLaDA, {name}"], jobs[f"AR, {name}"]):
            assert llada.train == ar.train and replace(llada.model, causal=True) == ar.model
            assert torch.equal(llada.train_ids, ar.train_ids) and (llada.autoregressive, ar.autoregressive) == (False, True)
    assert all(jobs[row][0].train.steps == 500 and jobs[row][0].train.batch_size == 16 for row in CHARACTER_ROWS)


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=h.PRESETS)
def test_vocabularies_of_every_preset_can_be_trained(preset, monkeypatch):
    monkeypatch.setattr(h, "MERGES", (50, 200))
    for config in preset.vocabulary:
        jobs = h.vocabulary_jobs(preset, config, TEXT[:30_000])
        sizes = [(job.train.steps, job.train.batch_size, job.train.evals) for trials in jobs.values() for job in trials]
        assert len(jobs) == 6 and len(sizes) == 12 and min(map(min, sizes)) >= 1
        assert all(steps >= evals for steps, _, evals in sizes)


def test_characters_of_a_job():
    rows = torch.tensor([[4, 5, START, 5, 6, END], [6, START, 4, END, PAD, PAD]])
    job = h.Job(h.ModelConfig(7, 6, 1, 1, 8), h.TrainConfig(1, 1), rows, rows)
    lengths = torch.tensor([5, 6, 7, 0, 1, 2, 3])
    assert job.characters(rows).tolist() == [6, 4]
    assert replace(job, token_lengths=lengths).characters(rows).tolist() == [1 + 2 + 7 + 2 + 3 + 0, 3 + 7 + 1 + 0]
    responses = replace(job, learned=h.response_tokens)
    assert responses.characters(rows).tolist() == [3, 2]
    assert replace(responses, token_lengths=lengths).characters(rows).tolist() == [5, 1]


def nats_by_hand(model, ids):
    """Exact, window by window, of a causal model."""
    total = 0.0
    for window in ids.split(model.config.seq_len):
        with torch.no_grad():
            logp = model(torch.cat((torch.tensor([START]), window[:-1]))[None])[0].log_softmax(dim=-1)
        total -= float(logp.gather(1, window[:, None]).sum())
    return total


def test_byte_pairs_are_reported_per_character(tmp_path, monkeypatch):
    """Nats of the held-out text over its characters, not its tokens; each seed's as well."""
    monkeypatch.chdir(tmp_path)
    shown, held = TEXT[:3000], TEXT[3000:3500]
    pairs, characters = h.byte_pairs(shown, 60, TEXT), h.CharTokenizer.from_text(TEXT)
    lengths = torch.tensor([len(pairs.id_to_token(i)) for i in range(pairs.get_vocab_size())])
    ids = {"characters": [characters.encode(part) for part in (shown, held)]}
    ids["pairs"] = [torch.tensor(pairs.encode(part).ids) for part in (shown, held)]
    sizes = {"characters": characters.vocab_size, "pairs": len(lengths)}
    jobs = {}
    for row, size, causal in [(f"{kind} {causal}", kind, causal) for kind in ids for causal in (True, False)]:
        config = h.TrainConfig(steps=8, batch_size=8, evals=2, eval_windows=1000)
        job = h.Job(h.ModelConfig(sizes[size], 8, 1, 1, 8, causal=causal), config, *ids[size])
        job = replace(job, token_lengths=lengths) if size == "pairs" else job
        jobs[row] = [replace(job, train=replace(config, seed=seed)) for seed in (0, 1)]
    table = h.run_jobs("t", jobs, quiet=True).set_index("row")
    for kind in ids:
        models = [h.train("-", job, quiet=True).model for job in jobs[f"{kind} True"]]
        by_hand = [nats_by_hand(model, ids[kind][1]) / len(held) for model in models]
        line = table.loc[f"{kind} True"]
        assert line["nats/char"] == pytest.approx(np.mean(by_hand), abs=2e-4)
        assert (line["lowest seed"], line["highest seed"]) == pytest.approx((min(by_hand), max(by_hand)), abs=2e-4)
    middle = (table["lowest seed"] + table["highest seed"]) / 2
    assert table["nats/char"].tolist() == pytest.approx(middle.tolist(), abs=2e-4)
    assert (table["lowest seed"] < table["highest seed"]).all() and (table["characters"] == len(shown)).all()
    same = [row.split()[0] == "characters" for row in table.index]
    assert table["difference"].notna().tolist() == same, "windows of byte pairs are others than those of characters"


@pytest.mark.parametrize("only", ["", "^AR"])
def test_vocabulary_from_the_command_line(tmp_path, monkeypatch, capsys, only):
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text(TEXT[:4000])
    monkeypatch.setenv("LLADA_DATA", "own.txt")
    asked_for = []

    def recorded(name, jobs, **options):
        asked_for.append((name, jobs, options))
        return pd.DataFrame({"row": list(jobs), "nats/char": 1.25})

    monkeypatch.setattr(h, "run_jobs", recorded)
    h.main(["vocabulary", "--preset", "smoke", *(["--only", only] if only else [])])
    ((name, jobs, options),) = asked_for
    expected = h.vocabulary_jobs(h.PRESETS["smoke"], h.PRESETS["smoke"].vocabulary[1], TEXT[:4000])
    assert name == "vocabulary" and options == {"compiled": False, "only": only}
    assert {row: h.suite_mark(trials) for row, trials in jobs.items()} == {r: h.suite_mark(t) for r, t in expected.items()}
    assert "LLaDA, 512 merges" in capsys.readouterr().out


def test_help_names_the_vocabulary_command(capsys):
    with pytest.raises(SystemExit):
        h.main(["--help"])
    assert "vocabulary" in capsys.readouterr().out
