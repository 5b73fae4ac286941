"""The tokenizer where words stand for characters, and special tokens of one's own."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import END, MASK, PAD, START

import llada_helpers as h
from beyond.toy import WordTokenizer

SEP = "[SEP]"
SPELLED = st.lists(st.sampled_from([*h.SPECIAL_TOKENS, SEP, "[", "]", "S", "MASK", " ", "x"]), min_size=1).map("".join)
WORD = st.text(st.characters(exclude_categories=["Zs", "Cc", "Cs"]), min_size=1, max_size=5).filter(lambda w: w not in NAMES)
NAMES = (*h.SPECIAL_TOKENS, SEP, "<a>")


def same_tokenizer(a, b):
    return (a.characters, a.special, a.vocab_size, a._id_of) == (b.characters, b.special, b.vocab_size, b._id_of)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.sampled_from([(), (SEP,), (SEP, "<a>")]))
def test_special_tokens_come_last_and_change_nothing_for_characters(text, special):
    plain, more = h.CharTokenizer.from_text(text), WordTokenizer.from_text(text, special)
    assert torch.equal(plain.encode(text), more.encode(text)) and more.decode(more.encode(text)) == text
    assert more.vocab_size == plain.vocab_size + len(special)
    assert more.encode(list(special)).tolist() == list(range(plain.vocab_size, more.vocab_size))
    assert more.encode(list(h.SPECIAL_TOKENS)).tolist() == [0, 1, 2, 3]
    assert same_tokenizer(WordTokenizer.from_json(more.to_json()), more)


@given(st.lists(WORD, min_size=1, max_size=12), st.sampled_from([(), (SEP,), (SEP, "<a>")]))
@example(["2", "+", "2"], ())
def test_words_round_trip(text, special):
    """Joined by single spaces, even where every word has one letter."""
    tokenizer = WordTokenizer.from_text(text, special)
    ids = tokenizer.encode(text)
    assert ids.tolist() == [4 + sorted(set(text)).index(word) for word in text]
    assert tokenizer.vocab_size == 4 + len(set(text)) + len(special)
    again = WordTokenizer.from_json(tokenizer.to_json())
    assert same_tokenizer(again, tokenizer)
    assert tokenizer.decode(ids) == again.decode(ids.tolist()) == " ".join(text)


@given(SPELLED, st.sampled_from([(), (SEP,)]))
def test_no_text_spells_a_special_token(text, special):
    tokenizer = WordTokenizer.from_text(text, special)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and ids.min() >= 4 and ids.max() < 4 + len(set(text))
    assert tokenizer.decode(ids) == text


def test_text_in_place_of_words_is_refused_by_what_is_unknown():
    words = WordTokenizer.from_text(["I", "love", "pizza"], special=(SEP,))
    for text in (SEP, "[MASK]", "pizza", "I love"):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            words.encode(text)


def test_unknown_words_are_named():
    words = WordTokenizer.from_text(["I", "love", "pizza"], special=(SEP,))
    with pytest.raises(ValueError) as error:
        words.encode(["I", "hate", SEP, "sushi", "[CLS]"])
    assert all(repr(word) in str(error.value) for word in ("hate", "sushi", "[CLS]"))
    assert not any(repr(word) in str(error.value) for word in ("I", SEP))


def test_special_names_in_a_list_are_no_words():
    text = ["[START]", "2", "+", "2", SEP, "4", "[END]", "[END]"]
    tokenizer = WordTokenizer.from_text(text, special=(SEP,))
    assert tokenizer.characters == ["+", "2", "4"]
    assert tokenizer.encode(text).tolist() == [2, 5, 4, 5, 7, 6, 3, 3]
    assert tokenizer.decode(tokenizer.encode(text)) == "2 + 2 4"


def test_words_are_shown_up_to_the_first_end_without_special_tokens():
    tokenizer = WordTokenizer.from_text(["I", "love", "pizza"], special=(SEP,))
    assert tokenizer.decode([START, 4, PAD, 7, 5, MASK, END, 6, END]) == f"I love {h.MASK_GLYPH}"
    assert tokenizer.decode([START, 7, PAD]) == "" == tokenizer.decode([END, 4])


BAD_NAMES = [("[MASK]",), (SEP, SEP), ("[PAD]", SEP), ("love",), ("a",), ("",), (SEP, "x"), SEP]


@pytest.mark.parametrize("special", BAD_NAMES)
def test_clashing_or_short_special_names_are_refused(special):
    with pytest.raises(ValueError):
        WordTokenizer(["I", "love"], special)
    if "love" not in special:
        with pytest.raises(ValueError):
            WordTokenizer.from_text("I love you", special)


def made_json(characters, special_tokens):
    return json.dumps({"characters": characters, "special_tokens": special_tokens})


FOUR = list(h.SPECIAL_TOKENS)


@pytest.mark.parametrize(
    "text",
    [
        *("[1]", "5", '"ab"', "null", '{"characters": " abc"}', '{"special_tokens": []}', "{"),
        *(made_json(None, FOUR), made_json([1, 2], FOUR)),
        *(made_json("ab", 7), made_json("ab", None), made_json("ab", [*FOUR, 7]), made_json("ab", [*FOUR, ["a", "b"]])),
        *(made_json("ab", "".join(FOUR)), made_json("ab", FOUR[:2]), made_json("ab", FOUR[::-1]), made_json("aa", FOUR)),
        *(made_json([SEP, "b"], [*FOUR, SEP]), made_json({"a": 1, "b": 2}, FOUR), made_json([["a"]], FOUR)),
    ],
)
def test_damaged_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"pass|use"):
        WordTokenizer.from_json(text)
