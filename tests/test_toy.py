"""beyond/toy.py: the tutorials' toy learns its three answers."""

import pytest
import torch

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
