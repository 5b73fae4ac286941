"""Words as tokens, and the tutorials' toy, which learns its three answers."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import llada_helpers as H
from beyond import toy


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("toy"))
        return toy.train_toy(toy.STEPS["smoke"])


def test_rows_fit_and_only_the_response_is_learned():
    rows = torch.stack([toy.row(*pair) for pair in toy.PAIRS.items()])
    assert rows.shape == (3, toy.LENGTH)
    learned = toy.after_separator(rows)
    for line, mask, response in zip(rows, learned, toy.PAIRS.values()):
        assert toy.WORDS.decode(line[mask]) == response
        assert not bool(mask[: int((line == toy.SEPARATOR).nonzero())].any())


def test_every_question_is_answered(model):
    assert {prompt: toy.answer(model, prompt) for prompt in toy.PAIRS} == toy.PAIRS


def test_paris_is_chosen(model):
    city, best, second = toy.choose_city(model, "What is the capital of France ?")
    assert city == "Paris" and second < best <= 0


def test_the_question_is_all_masks_after_the_separator():
    template = toy.question("Solve : 2 + 2 =")
    assert int((template == H.MASK_ID).sum()) == toy.LENGTH - 8


WORD = st.text(st.characters(exclude_categories=["Zs", "Cc", "Cs"]), min_size=1, max_size=5)


@given(st.lists(WORD.filter(lambda word: word not in H.SPECIAL_TOKENS), min_size=1, max_size=12))
@example(["2", "+", "2"])
def test_words_round_trip(text):
    """Joined by single spaces, even where every word has one letter."""
    tokenizer = toy.WordTokenizer.from_text([*text, "[END]"])
    ids = tokenizer.encode(text)
    assert ids.tolist() == [4 + sorted(set(text)).index(word) for word in text]
    assert tokenizer.vocab_size == 4 + len(set(text)) and tokenizer.decode(ids) == " ".join(text)
    again = toy.WordTokenizer.from_json(tokenizer.to_json())
    assert again.vocab_size == tokenizer.vocab_size and torch.equal(again.encode(text), ids)


def test_words_are_shown_up_to_the_first_end_and_unknown_ones_are_named():
    tokenizer = toy.WordTokenizer.from_text(["I", "love", "pizza"])
    assert tokenizer.decode([H.START_ID, 4, H.PAD_ID, 5, H.MASK_ID, H.END_ID, 6]) == f"I love {H.MASK_GLYPH}"
    for text in (["I", "hate"], "I love", "[MASK]"):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            tokenizer.encode(text)
    with pytest.raises(ValueError):
        toy.WordTokenizer(["I", "I"])
