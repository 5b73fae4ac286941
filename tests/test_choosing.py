"""beyond/choosing.py: the quiz is fair, and exact predictors choose by true probabilities."""

import numpy as np
import pytest
import torch
from oracle import ExactAR, ExactPredictor

import llada_helpers as H
from beyond import choosing


@pytest.fixture(scope="module")
def exact():
    return ExactPredictor(length=4, symbols=3)


def every_pair(exact) -> choosing.Quiz:
    """Known: each pair of symbols; options: four of the nine pairs."""
    pairs = torch.cartesian_prod(torch.arange(4, 7), torch.arange(4, 7))
    return choosing.Quiz(pairs, pairs[[0, 3, 5, 8]].expand(9, -1, -1), forward=True)


def test_texts_put_the_answer_on_its_side(exact):
    quiz = every_pair(exact)
    assert torch.equal(quiz.texts()[..., :2], quiz.known[:, None].expand(-1, 4, -1))
    assert torch.equal(quiz._replace(forward=False).texts()[..., 2:], quiz.known[:, None].expand(-1, 4, -1))


@pytest.mark.parametrize("forward", [True, False])
def test_ar_scores_are_the_log_probabilities_of_the_whole(exact, forward):
    quiz = every_pair(exact)._replace(forward=forward)
    scores = choosing.score_ar(ExactAR(exact), quiz)
    truth = exact.log_prob(quiz.texts().flatten(0, 1)).view(9, 4)
    assert torch.allclose(scores.double(), truth, atol=1e-4)


@pytest.mark.parametrize("forward", [True, False])
def test_llada_scores_are_bounds_on_the_conditional_probability(exact, forward):
    quiz = every_pair(exact)._replace(forward=forward)
    scores = torch.stack([choosing.score_llada(exact, quiz, 64) for _ in range(1)]).mean(dim=0).double()
    joint = exact.log_prob(quiz.texts().flatten(0, 1)).view(9, 4)
    known = torch.full((9, 4), H.MASK_ID)
    known[:, :2] = quiz.known
    if not forward:
        known = known.flip(1)
        known[:, 2:] = quiz.known
    truth = joint - exact.log_prob(known)[:, None]
    assert bool((scores <= truth + 0.25).all())  # exact conditionals: the bound is tight up to the noise of 64 masks
    assert float((scores - truth).abs().mean()) < 0.15


def test_pieces_lie_end_to_end():
    rows = choosing.pieces(torch.arange(1000), 96, 5)
    assert rows.shape == (5, 96)
    assert [int(r[0]) % 96 for r in rows] == [0] * 5
    assert len(choosing.pieces(torch.arange(100), 40, 50)) == 2


def test_shuffled_keeps_words_and_white_space():
    text = " To be,  or not\nto be: that is\n\nthe question"
    mixed = choosing.shuffled(text, np.random.default_rng(0))
    assert sorted(mixed.split()) == sorted(text.split()) and mixed != text
    assert len(mixed) == len(text)
    assert choosing.shuffled("", np.random.default_rng(0)) == ""


def test_quiz_of_both_directions():
    tokenizer = H.CharTokenizer.from_text("abcd ")
    rows = tokenizer.encode("ab cd dcba ab cd").view(2, 8)
    blank = lambda ids: torch.zeros(*ids.shape, tokenizer.vocab_size)  # noqa: E731
    for forward in (True, False):
        quiz = choosing.make_quiz(rows, 3, forward, tokenizer, blank)
        assert torch.equal(quiz.texts()[:, 0], rows)  # the first answer is the true one
        assert quiz.options.shape == (2, 4, 3) and bool((quiz.options > H.END_ID).all())
        again = choosing.make_quiz(rows, 3, forward, tokenizer, blank)
        assert torch.equal(quiz.options, again.options)


def test_result_counts_the_picks():
    scores = torch.tensor([[0.0, -1, -2, -3], [0.0, -1, -2, -3], [-5.0, -1, -2, -3], [-5.0, -4, -3, 0]])
    line = choosing.result(scores, ("other", "shuffled", "third"))
    assert [line["accuracy"], line["picked other"], line["picked shuffled"], line["picked third"]] == [0.5, 0.25, 0.0, 0.25]
    assert line["items"] == 4 and 0 < line["accuracy ±"] < 1
