"""Who says it, and guidance: against speakers whose words are known exactly."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import MASK, START

import llada_helpers as h
from beyond import dialogue, quality, speakers

NAMES = ["A", "B", "C", "D"]
ALPHABET = h.CharTokenizer.from_text("ABCD:\n hinot.")
LAYOUT = dialogue.Layout(ALPHABET, 32)
TALK = [("hi hi hi hi", who, " ".join([word] * n)) for n in (1, 2, 3) for who, word in zip(NAMES, ("hi", "no", "to", "t."))]
WORDS = dict(zip(NAMES, ("hi", "no", "to", "t.")))
SIZES = dialogue.Sizes(None, 4, speeches=3, name_samples=8, guided=h.GROUPS)


def knows_who(ids: torch.Tensor) -> torch.Tensor:
    """After [START] each speaker's own letters are likely, if the name before it is seen; before it, the name of who would say
    what is seen after it. For inputs of an AR model and of a mask predictor alike, since a place does not matter."""
    logits = torch.zeros(*ids.shape, ALPHABET.vocab_size)
    letters = {who: ALPHABET.encode(word) for who, word in WORDS.items()}
    for row, logit in zip(ids, logits):
        starts = (row == START).nonzero()[:, 0].tolist()
        if not starts:
            continue
        start = starts[-1]
        seen = {int(i) for i in row[start - 3 : start] if i > START} if start else set()
        for who, code in zip(NAMES, ALPHABET.encode("ABCD").tolist()):
            if code in seen:
                logit[start:, letters[who]] += 2.0
            said = torch.isin(row[start:], letters[who][torch.isin(letters[who], ALPHABET.encode("o"), invert=True)])
            logit[:start, code] += 1.0 * said.sum()
    return logits


MODELS = {"LLaDA": knows_who, "AR": knows_who}


def blank(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*ids.shape, ALPHABET.vocab_size)


def test_quizzes_ask_about_four():
    more = [*TALK, ("", "E", "hi"), *[("", "F", "no")] * 5]
    asked = speakers.quizzes(more, TALK)
    assert asked == {"held out": (NAMES, TALK), "seen": (["F", "A", "B", "C"], more)}


def test_each_speaker_is_asked_about_as_often():
    asked = speakers.questions(NAMES, TALK, count=2)
    assert [i for i, *_ in asked] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [speech for *_, speech in asked][:2] == ["hi", "hi hi hi"]
    assert len(speakers.questions(NAMES, TALK, count=99)) == len(TALK) and not speakers.questions(["Z"], TALK, 5)


def test_the_baseline_counts_characters():
    cost = speakers.by_characters(NAMES, TALK, ALPHABET.characters)
    assert [cost(word * 2).argmin() for word in ("hi", "no", "to", "t.")] == [0, 1, 2, 3]
    sums = np.exp([[-cost(c)[i] for c in ALPHABET.characters] for i in range(4)]).sum(axis=1)
    assert sums == pytest.approx(np.ones(4))


def test_rows_differ_in_the_name_alone():
    rows, spoken = speakers.named_rows(LAYOUT, NAMES, "hi hi hi hi", "no no")
    assert [ALPHABET.decode(row[spoken[0]]) for row in rows] == ["no no"] * 4
    differ = (rows != rows[0]).any(dim=0).nonzero()
    assert len(differ) == 1 and ALPHABET.decode(rows[:, differ[0, 0]]) == "ABCD"
    long, spoken = speakers.named_rows(LAYOUT, NAMES, "", "no" * 40)
    assert (spoken.sum(dim=1) == LAYOUT.answer_len - 1).all() and long.shape == (4, 32)


def test_who_knows_the_speakers_tells_them_apart_each_way():
    for i, name in enumerate(NAMES):
        costs = speakers.who_says(MODELS, LAYOUT, NAMES, "hi hi hi hi", " ".join([WORDS[name]] * 3), n_samples=8, seed=0)
        assert {method: cost.argmin() for method, cost in costs.items() if method != "LLaDA, the name" or name not in "BC"} == {
            method: i for method in costs if method != "LLaDA, the name" or name not in "BC"
        }, "B and C share a letter"


def test_a_blank_model_knows_nobody():
    costs = speakers.who_says({"LLaDA": blank, "AR": blank}, LAYOUT, NAMES, "hi", "no to", n_samples=4, seed=3)
    assert costs["LLaDA, the speech"] == pytest.approx(np.full(4, 5 * math.log(ALPHABET.vocab_size)), rel=1e-5)
    assert costs["AR, the speech"] == pytest.approx(np.full(4, 5 * math.log(ALPHABET.vocab_size)), rel=1e-5)
    assert costs["LLaDA, the name"] == pytest.approx(np.zeros(4), abs=1e-4)


def test_table_of_speakers():
    table = speakers.speakers_table(MODELS, LAYOUT, TALK, TALK, SIZES).set_index("row")
    assert table.loc["chance", "share"] == 0.25 and len(table) == 9
    for quiz in ("held out", "seen"):
        for method in ("characters counted", "LLaDA, the speech", "AR, the speech"):
            line = table.loc[f"{method}, {quiz}"]
            assert line["share"] == 1 and line["log odds, nats"] > 0 and line["speeches"] == 12
            assert line["share ±"] == pytest.approx(h.share([1, 1, 1])[1] / 2), "four independent shares, averaged"
            assert line["each"] == "A 1.00, B 1.00, C 1.00, D 1.00"


def test_a_quiz_without_two_speakers_says_so(capsys):
    """The shortest texts have one exchange to validate on."""
    talk = [("hi hi", who, "hi") for who in "ABCD"]
    sizes = dialogue.Sizes(None, 1, speeches=1, name_samples=2, guided=1)
    table = speakers.speakers_table({"LLaDA": knows_who, "AR": knows_who}, LAYOUT, talk, talk[:1], sizes)
    assert capsys.readouterr().out.startswith("held out: left out, the text is too short")
    assert table["row"].str.endswith(("chance", "seen")).all() and len(table) == 5


def test_addressed_in_turns_after_speeches_that_fill_the_prompt():
    talk = [("hi " * 9, "A", ""), ("hi", "B", ""), ("no " * 9, "C", "")]
    asked = speakers.addressed(NAMES, talk, "", LAYOUT, count=6)
    assert asked == [(i % 4, ("hi " if i < 3 else "no ") * 9) for i in range(6)]
    assert speakers.addressed(NAMES, [], "to " * 99, LAYOUT, 1) == [(0, ("to " * 99)[: LAYOUT.prompt_len])]


def test_guidance_says_more_of_what_the_name_says():
    """The share of a speaker's own letters among those written rises with the strength."""
    asked = [(i % 4, "hi hi hi hi") for i in range(16)]
    shares = []
    for w in (0.0, 1.0, 4.0):
        answers = speakers.guided_answers(knows_who, asked, NAMES, LAYOUT, w)
        own = [sum(c in WORDS[NAMES[i]] for c in answer) for (i, _), answer in zip(asked, answers)]
        shares.append(sum(own) / max(1, sum(map(len, answers))))
    assert shares == sorted(shares) and shares[2] > shares[0] + 0.2
    assert answers == speakers.guided_answers(knows_who, asked, NAMES, LAYOUT, 4.0), "a function of the seed"


def test_referee_prefers_the_right_name():
    right = [(i, "hi hi hi hi", WORDS[name]) for i, name in enumerate(NAMES)]
    wrong = [((i + 1) % 4, before, speech) for i, before, speech in right]
    scores = [speakers.referee(knows_who, LAYOUT, NAMES, answers, lambda text, start: len(text)) for answers in (right, wrong)]
    assert scores[0]["log odds, nats"] > 1 > 0 > scores[1]["log odds, nats"]
    assert scores[0]["judge nats/char"] == scores[0]["characters"] == 2
    empty = speakers.referee(knows_who, LAYOUT, NAMES, [(0, "hi", "")], lambda text, start: 1.0)
    assert math.isnan(empty["judge nats/char"]) and empty["characters"] == empty["distinct-3"] == 0


def test_table_of_guidance():
    asked, real = [(i % 4, "hi hi hi hi") for i in range(h.GROUPS)], speakers.questions(NAMES, TALK, 1)
    judge = quality.ngram_judge("hi no to t. " * 20)
    table = speakers.guidance_table(MODELS, LAYOUT, asked, NAMES, judge, real, strengths=(0.0, 2.0))
    assert table["row"].tolist() == ["w = 0.0", "w = 2.0", "real speeches"] and math.isnan(table["w"].iloc[-1])
    assert table["log odds, nats"].iloc[-1] > 0 and (table["log odds, nats ±"] >= 0).all()


def test_real_models_go_through_all_of_it(tmp_path):
    """Two untrained Transformers: right shapes, on whatever device they are."""
    torch.manual_seed(0)
    shape = h.ModelConfig(ALPHABET.vocab_size, 32, n_layer=1, n_head=1, n_embd=8)
    models = {name: h.Transformer(replace(shape, causal=name == "AR")).eval() for name in ("LLaDA", "AR")}
    table = speakers.speakers_table(models, LAYOUT, TALK, TALK, SIZES)
    assert len(table) == 9 and table["share"].between(0, 1).all()
    answers = speakers.guided_answers(models["LLaDA"], [(0, "hi hi hi hi")], NAMES, LAYOUT, w=1.0)
    assert len(answers) == 1 and h.MASK_GLYPH not in answers[0] and MASK == 1
