"""Invented facts, told in one direction and asked in the other; and a fair quiz of which text follows, or precedes."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import ExactAR, ExactPredictor

import llada_helpers as h
from beyond import reversal

FACTS = st.builds(reversal.invented_facts, st.integers(1, 12), st.integers(0, 10**6))


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
    facts = reversal.invented_facts(per_group, 3)
    assert facts.forwards.shape == facts.backwards.shape == (3 * per_group, 7)
    used = torch.cat((facts.forwards, facts.backwards))
    assert used.min() >= 4 and used.max() < facts.tokenizer.vocab_size
    assert {*reversal.ROLES, *reversal.PLACES, "is", "the", "of", "."} <= set(facts.tokenizer.characters)


def test_roles_and_places_belong_to_many():
    """Neither alone tells who is meant."""
    rows = reversal.invented_facts(60, 0).forwards
    assert all(column.unique(return_counts=True)[1].max() >= 5 for column in (rows[:, 3], rows[:, 5]))


def test_facts_are_a_function_of_the_seed():
    a, b, c = (reversal.invented_facts(5, seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in ((a.forwards, b.forwards), (a.backwards, b.backwards)))
    assert a.tokenizer.characters == b.tokenizer.characters and (a.told == b.told).all()
    assert set(sentences_of(a, a.forwards)) != set(sentences_of(c, c.forwards))


@pytest.mark.parametrize("per_group", [0, -1, 85, 10**6])
def test_too_few_or_too_many_facts_are_refused(per_group):
    with pytest.raises(ValueError, match="pass 1 to 84"):
        reversal.invented_facts(per_group, 0)


@pytest.mark.parametrize("preset", h.PRESETS)
def test_every_preset_can_ask_as_much_as_it_wants(preset):
    per_group, steps, seeds = reversal.SIZES[preset]
    assert reversal.invented_facts(per_group, seeds - 1).told.size == 3 * per_group and steps >= 2
    items, samples = reversal.ITEMS[preset]
    assert items >= 12 and samples == tuple(sorted(samples))


def knows(rows: torch.Tensor, vocab_size: int):
    """A mask predictor that knows these rows by heart and is sure of the row that fits what it is shown."""

    def predict(ids):
        fits = ((ids[:, None] == rows) | (ids[:, None] == h.MASK_ID)).all(dim=2)
        return torch.nn.functional.one_hot(rows[fits.int().argmax(dim=1)], vocab_size).float()

    return predict


def test_who_knows_the_rows_answers_them():
    facts = reversal.invented_facts(4, 0)
    for rows, given_words in ((facts.forwards, 3), (facts.backwards, 5)):
        all_right = reversal.answered(knows(rows, facts.tokenizer.vocab_size), rows, given_words)
        assert all_right.shape == (12,) and all_right.dtype == bool and all_right.all()
    half = torch.cat((facts.forwards[:6], facts.forwards[:6]))
    right = reversal.answered(knows(half, facts.tokenizer.vocab_size), facts.forwards, 3)
    assert right.tolist() == [True] * 6 + [False] * 6


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_told_is_learned(tmp_path, causal):
    facts = reversal.invented_facts(2, 0)
    model = reversal.train_on_facts(facts, causal, steps=150, seed=0, root=tmp_path)
    assert model.config.causal == causal
    told = facts.told != "backwards"
    assert reversal.answered(model, facts.forwards, 3)[told].mean() >= 0.75


def test_the_table_counts_each_question_where_it_belongs(tmp_path, monkeypatch):
    """Who knows the forward tellings that were told, and nothing else, is right as told and wrong reversed."""

    def known(facts, causal, steps, seed, root):
        return knows(facts.forwards[facts.told != "backwards"], facts.tokenizer.vocab_size)

    monkeypatch.setattr(reversal, "train_on_facts", known)
    table = reversal.reversal_table(per_group=3, steps=1, seeds=2, root=tmp_path).set_index("row")
    assert len(table) == 12 and (table["questions"] == 6).all()
    for name in ("LLaDA", "AR"):
        assert table.loc[f"{name}, as told, X is the ...", "exact match"] == 1
        assert table.loc[f"{name}, told both ways, X is the ...", "exact match"] == 1
        assert table.loc[f"{name}, reversed, X is the ...", "exact match"] == 0
        assert table.loc[f"{name}, as told, the Y of Z is ...", "exact match"] == 0
    assert np.allclose(table["95% ±"], h.share([1] * 6)[1])


# --- which of four texts follows, or precedes? ---

EXACT = ExactPredictor(length=4, symbols=3)
PAIRS = torch.cartesian_prod(torch.arange(4, 7), torch.arange(4, 7))
EVERY_PAIR = reversal.Quiz(PAIRS, PAIRS[[0, 3, 5, 8]].expand(9, -1, -1), forward=True)  # known: each; options: four of the nine


@pytest.mark.parametrize("forward", [True, False])
def test_scores_are_the_true_probabilities(forward):
    """AR's of the whole text, exactly; LLaDA's of the answer, a bound that is tight for exact conditionals."""
    quiz = EVERY_PAIR._replace(forward=forward)
    side = quiz.texts()[..., :2] if forward else quiz.texts()[..., 2:]
    assert torch.equal(side, quiz.known[:, None].expand(-1, 4, -1))
    joint = EXACT.log_prob(quiz.texts().flatten(0, 1)).view(9, 4)
    assert torch.allclose(reversal.score_ar(ExactAR(EXACT), quiz).double(), joint, atol=1e-4)
    known = torch.full((9, 4), h.MASK_ID)
    known[:, slice(0, 2) if forward else slice(2, 4)] = quiz.known
    truth = joint - EXACT.log_prob(known)[:, None]
    scores = reversal.score_llada(EXACT, quiz, 64).double()
    assert bool((scores <= truth + 0.25).all()) and float((scores - truth).abs().mean()) < 0.15


def test_shuffled_keeps_words_and_white_space():
    text = " To be,  or not\nto be: that is\n\nthe question"
    mixed = reversal.shuffled(text, np.random.default_rng(0))
    assert sorted(mixed.split()) == sorted(text.split()) and mixed != text
    assert re.sub(r"\S+", "x", mixed) == re.sub(r"\S+", "x", text)
    assert reversal.shuffled("", np.random.default_rng(0)) == ""


TOKENIZER = h.CharTokenizer.from_text("abcd ")


def blank(ids):
    return torch.zeros(*ids.shape, TOKENIZER.vocab_size)


@pytest.mark.parametrize("forward", [True, False])
def test_the_first_answer_is_the_true_one_and_no_special_token_is_in_any(forward):
    rows = TOKENIZER.encode("ab cd dcba ab cd").view(2, 8)
    quiz, again = (reversal.make_quiz(rows, 3, forward, TOKENIZER, blank) for _ in range(2))
    assert torch.equal(quiz.texts()[:, 0], rows) and torch.equal(quiz.options, again.options)
    assert quiz.options.shape == (2, 4, 3) and bool((quiz.options > h.END_ID).all())


def test_table_of_choices():
    """To a blank model all answers are equally likely, and the first, which is the true one, wins."""
    ids = TOKENIZER.encode("ab cd dcba ab cd abba dada cc bb")
    table = reversal.choice_table({"LLaDA": blank, "AR": blank}, ids, TOKENIZER, 4, (1, 2), given=5, asked=3).set_index("row")
    assert table.index.tolist()[:3] == ["next, AR, exact", "next, LLaDA, one sample", "next, LLaDA, most samples"]
    assert len(table) == 6 and (table["items"] == 4).all() and (table["accuracy"] == 1).all()
    assert (table[["minus AR", "minus AR ±"]] == 0).all(axis=None)
    assert (table.filter(like="picked").fillna(0) == 0).all(axis=None)
    assert table["accuracy ±"].iloc[0] == pytest.approx(h.share([1] * 4)[1])
