"""Dialogue, rows for fine-tuning, what is learned of them; answers, speakers and guidance, against models known exactly."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import END, MASK, PAD, START, WrongPredictor, seeded

import llada_helpers as h
from beyond import dialogue
from beyond.likelihood import low_noise_nelbo

# --- dialogue ---

LINE = st.text("aB: ", min_size=1, max_size=6)
SPEECHES = st.lists(st.tuples(st.text("AB c", min_size=1, max_size=4), st.lists(LINE, min_size=1, max_size=3).map("\n".join)))


@given(SPEECHES, st.sampled_from(["", "\n", "\n\n"]))
def test_every_speech_is_found_with_the_one_before_it(speeches, end):
    """Speeches may have colons and several lines, also lines that look like a name."""
    text = "\n\n".join(f"{name}:\n{speech}" for name, speech in speeches) + end
    befores = ["", *(speech for _, speech in speeches)]
    assert dialogue.dialogue(text) == [(before, *both) for before, both in zip(befores, speeches)]


NO_SPEECH = ["", "no names here", "one\n\ntwo: three\n\nfour", "NAME: on the same line", ":\nno name", "A:\n", "A: B:\nOne."]
NO_SPEECH += ["They fight\nA:\nOne.", "They fight\n\n\nA: thus:\nOne.\n"]


@pytest.mark.parametrize("text", NO_SPEECH)
def test_text_without_speeches_gives_none(text):
    assert dialogue.dialogue(text) == []


def test_who_says_nothing_does_not_say_what_the_next_one_says():
    """As in the corpus, where names without a speech stand."""
    assert dialogue.dialogue("A:\nHi.\n\nB:\n\nC:\nNoble B!\n\nD:\n\n") == [("", "A", "Hi."), ("Hi.", "C", "Noble B!")]


def test_what_stands_between_speeches_is_left_out():
    assert dialogue.dialogue("ACT I\n\nA:\nOne.\n\nThey fight\n\nB:\nTwo.") == [("", "A", "One."), ("One.", "B", "Two.")]


@pytest.mark.parametrize("fraction", np.linspace(0.05, 0.95, 19))
def test_the_parts_of_a_split_play_share_no_speech(fraction):
    """Cut anywhere, also within a name or a speech."""
    play = "\n\n".join(f"{'ABC'[i % 3]}:\nspeech {i}: of {i * i + 1000},\nand no more of {i}." for i in range(20))
    cut = int(fraction * len(play))
    shown, held = (dialogue.dialogue(part) for part in (play[:cut], play[cut:]))
    assert not held or held[0][0] == "", "nothing precedes the first speech of a part"
    pieces = [{piece for before, _, speech in part for piece in (before, speech)} - {""} for part in (shown, held)]
    assert not pieces[0] & pieces[1] and len(pieces[0] | pieces[1]) >= 19
    assert not any(piece in play[:cut] for piece in pieces[1])


# --- rows for fine-tuning ---

ALPHABET = h.CharTokenizer.from_text("ABCDE:\n hinot.")
LAYOUT = dialogue.Layout(ALPHABET, 32)
TURNS = st.lists(st.tuples(st.text("hi no", max_size=30), st.sampled_from("ABCD"), st.text("hi no", max_size=25)), min_size=1)


@given(TURNS)
def test_a_row_is_its_prompt_and_its_speech(talk):
    kept = [turn for turn in talk if len(turn[2]) < LAYOUT.answer_len]
    assume(kept)
    rows = LAYOUT.rows(talk)
    assert len(rows) == len(kept) and rows.shape[1] == 32 and not (rows == PAD).any()
    for row, learned, (before, who, speech) in zip(rows, dialogue.response_tokens(rows), kept):
        prompt = f"{before}\n\n{who}:\n"[-LAYOUT.prompt_len :]
        assert learned.tolist() == [False] * (len(prompt) + 1) + [True] * (31 - len(prompt))
        assert row[learned].tolist() == [*ALPHABET.encode(speech).tolist(), *[END] * (31 - len(prompt) - len(speech))]
        assert ALPHABET.decode(row[~learned]) == prompt and row[len(prompt)] == START and row[-1] == END
        assert int(dialogue.speech_tokens(row[None]).sum()) == len(speech)


def test_a_speech_must_leave_room_for_one_end():
    longest = "n" * (LAYOUT.answer_len - 1)
    assert len(LAYOUT.rows([("", "A", longest), ("", "A", longest + "n")])) == 1
    with pytest.raises(ValueError, match="pass shorter"):
        LAYOUT.rows([("", "A", longest + "n")])


def test_a_prompt_has_what_the_vocabulary_knows():
    assert LAYOUT.ask("hi", "A") == "hi\n\nA:\n" and LAYOUT.ask("Höi!", "AZ") == "i\n\nA:\n"
    with pytest.raises(ValueError, match="é"):
        LAYOUT.rows([("hi", "A", "é")])


# --- fine-tuning: the prompt is given ---


@given(TURNS, st.integers(0, 10**6))
def test_what_is_predicted_at_the_prompt_does_not_matter(talk, seed):
    """Not for the loss, were it NaN there, nor for the gradient, which reaches the response alone."""
    assume(any(len(speech) < LAYOUT.answer_len for *_, speech in talk))
    rows, shape, config = LAYOUT.rows(talk), h.ModelConfig(ALPHABET.vocab_size, 32, 1, 1, 8), h.TrainConfig(1, 4)
    for make_batch in (h.diffusion_batch, h.next_token_batch):
        batch = h.training_batch(h.Job(shape, config, rows, rows, make_batch, dialogue.response_tokens), seed)
        prompt = ~dialogue.response_tokens(batch[1])
        logits = torch.randn(*prompt.shape, ALPHABET.vocab_size, generator=seeded(seed)).requires_grad_()
        loss = h.weighted_nll(lambda _, logits=logits: logits, *batch)
        loss.backward()
        assert (logits.grad[prompt] == 0).all() and torch.equal((logits.grad != 0).any(dim=-1), batch[2] > 0)
        spoilt = logits.detach().masked_fill(prompt[..., None], math.nan)
        assert torch.equal(h.weighted_nll(lambda _, spoilt=spoilt: spoilt, *batch), loss.detach())


def after_separator(rows):
    return dialogue.response_tokens(rows, separator=9)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5), st.integers(0, 10**6))
def test_another_separator_ends_the_prompt(lengths, seed):
    """Rows [START] prompt [SEP] response [END] ...: the [START] at their head separates nothing."""
    rows = torch.full((len(lengths), 11), END)
    for row, (prompt, response) in zip(rows, lengths):
        row[: prompt + response + 2] = torch.tensor([START, *[5] * prompt, 9, *[6] * response])
    learned = after_separator(rows)
    assert [int(n) for n in learned.sum(dim=1)] == [9 - prompt for prompt, _ in lengths]
    assert (learned.diff(dim=1).sum(dim=1) == 1).all() and not learned[(rows == START) | (rows == 5) | (rows == 9)].any()
    job = h.Job(h.ModelConfig(10, 11, 1, 1, 8), h.TrainConfig(1, 8), rows, rows, learned=after_separator)
    inputs, targets, weight = h.training_batch(job, seed)
    given_tokens = ~after_separator(targets)
    assert torch.equal(inputs[given_tokens], targets[given_tokens]) and (weight[given_tokens] == 0).all()


@pytest.mark.parametrize("bound", [h.nelbo, low_noise_nelbo])
@pytest.mark.parametrize("n_samples", [1, 5, 40])
def test_bound_never_shows_a_masked_prompt(bound, n_samples):
    rows = LAYOUT.rows([("hi no", "A", "no"), ("", "B", ""), ("hi hi hi hi", "C", "hi no hi."), ("i", "D", "i")])
    learned, seen, wrong = dialogue.response_tokens(rows), [], WrongPredictor(ALPHABET.vocab_size, longest=32)

    def spy(ids):
        seen.append(ids)
        return wrong(ids)

    bounds = bound(spy, rows, MASK, n_samples=n_samples, maskable=learned, generator=seeded(0))
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


# --- layout, and what tuning brings ---


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=h.PRESETS)
def test_layouts_of_the_presets_fit_and_can_be_decoded_in_blocks(preset):
    layout = dialogue.Layout(ALPHABET, preset.seq_len)
    assert layout.prompt_len + 1 + layout.answer_len == preset.seq_len
    block = layout.answer_len // 5
    assert layout.answer_len % block == 0 and (layout.answer_len // 2) % (layout.answer_len // block) == 0
    assert dialogue.SIZES[preset.name].guided >= 4


def test_a_text_without_speakers_is_cut_into_turns():
    text = "hi no. " * 40
    train, val, test = dialogue.talks((text, text[: 4 * LAYOUT.answer_len], text), LAYOUT)
    assert [speech for *_, speech in train[:-1]] == [before for before, *_ in train[1:]]
    assert "".join([train[0][0], *(speech for *_, speech in train)]) == text[: len(train[0][0]) * (len(train) + 1)]
    assert len({who for _, who, _ in train}) == 4 and len(LAYOUT.rows(train)) == len(train) and val and test == train


def test_three_speakers_are_no_play():
    play = "\n\n".join(f"{who}:\nhi no. hi no." for who in "ABCABC")
    four = f"{play}\n\nD:\nno"
    untested = (four, four, "hi no. " * 9), (four, four, "Z:\nhi no.")  # by no speech that fits
    for texts in ((play, four, four), (four, play, four), *untested):
        assert dialogue.talks(texts, LAYOUT)[0][0] != ("", "A", "hi no. hi no.")
    others = four.replace("A", "Z")  # may speak in the test text
    for texts in ((four, four, four), (four, four, play), (four, four, others)):
        assert dialogue.talks(texts, LAYOUT) == [*map(dialogue.dialogue, texts)]


@pytest.mark.parametrize("speech", ["no", "no " * 9], ids=["prompts too short", "answers too long"])
def test_a_play_without_a_usable_speech_is_cut_into_turns(speech):
    """Whatever the speeches are like, there are rows to train on and full prompts to ask with."""
    play = "\n\n".join(f"{who}:\n{speech}" for who in "ABCD" * 9)
    for talk in dialogue.talks((play, play, play), LAYOUT):
        rows = LAYOUT.rows(talk)
        assert len(rows) == len(talk) and len(dialogue.full_prompts(rows, LAYOUT, 3)) == 3


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=h.PRESETS)
def test_the_shortest_text_that_is_not_refused_has_an_exchange(preset):
    layout = dialogue.Layout(ALPHABET, preset.seq_len)
    long = "hi no. " * preset.seq_len
    for talk in dialogue.talks((long, long[: preset.seq_len], long[: preset.seq_len]), layout)[1:]:
        assert len(talk) == 1 and len(dialogue.full_prompts(layout.rows(talk), layout, 8)) == 1


def blank(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*ids.shape, ALPHABET.vocab_size)


ROWS = LAYOUT.rows([("hi hi hi hi hi", who, speech) for who, speech in zip("ABCD", ("no.", "", "hi hi", "no no no"))])


def test_the_same_speeches_as_plain_text():
    """Before tuning: no [START], the empty line for [END], and nothing that tells where it ends."""
    plain, scored = dialogue.as_plain_text(ROWS, LAYOUT)
    for row, text, mark in zip(ROWS, plain, scored):
        said = ALPHABET.decode(row)
        assert ALPHABET.decode(text).rstrip(h.MASK_GLYPH) == said + "\n\n"
        assert ALPHABET.decode(text[mark]) == said[LAYOUT.prompt_len :] + "\n\n" and not mark[: LAYOUT.prompt_len].any()
        assert (text[len(said) + 2 :] == MASK).all()


def test_table_of_tuning_scores_the_same_event():
    """With predictors that find all tokens alike: two for the empty line before, all places from the speech's first on after."""
    models = {"LLaDA": blank, "AR": blank}
    table = dialogue.sft_table(models, models, ROWS, LAYOUT, 3).set_index("row")
    spoken = sum(map(len, ("no.", "", "hi hi", "no no no")))
    for name in ("LLaDA", "AR"):
        before, after = (spoken + 2 * len(ROWS)) / spoken, LAYOUT.answer_len * len(ROWS) / spoken
        for stage, tokens in (("before", before), ("after", after), ("after − before", after - before)):
            assert table.loc[f"{name}, {stage}", "nats/char"] == pytest.approx(tokens * math.log(ALPHABET.vocab_size), rel=1e-5)


def test_answers_go_on_from_the_prompt_and_are_as_long_as_there_is_room():
    torch.manual_seed(0)
    shape = h.ModelConfig(ALPHABET.vocab_size, 32, n_layer=1, n_head=1, n_embd=8)
    models = {name: h.Transformer(replace(shape, causal=name == "AR")).eval() for name in ("LLaDA", "AR")}
    answers = dialogue.sample_answers(models, models, ROWS, LAYOUT)
    assert len(answers) == 7
    for name, ids in answers.items():
        before = "before" in name
        assert ids.shape == (len(ROWS), LAYOUT.answer_len + before)
        assert not torch.isin(ids, torch.tensor([PAD, MASK, START, *[END] * before])).any()
    again = dialogue.sample_answers(models, models, ROWS, LAYOUT)
    assert all(torch.equal(answers[name], again[name]) for name in answers), "a function of the seed"


ENDS = {  # "\\n" is 4; answers, and their lengths
    "AR": ([[6, 5, 3, 3], [3, 3, 3, 3], [6, 3, 5, 3], [6, 6, 6, 6], [6, 4, 4, 3]], [2, 0, None, None, 3]),
    "AR, before tuning": ([[5, 4, 4, 6], [4, 4, 5, 5], [6, 4, 6, 4]], [1, 0, None]),
}


def test_only_answers_with_nothing_behind_their_end_have_a_length():
    layout = dialogue.Layout(h.CharTokenizer.from_text("\n abcd"), 8)
    made = {name: torch.tensor(ids) for name, (ids, _) in ENDS.items()}
    lengths = dialogue.answer_lengths(made, torch.tensor([[5, START, 6, END]]), layout)
    assert lengths["real"].tolist() == [1]
    for name, (_, expected) in ENDS.items():
        assert [None if math.isnan(x) else x for x in lengths[name]] == expected
    table = dialogue.answers_table(made, lengths).set_index("row")
    assert table.loc["AR", ["ended properly", "has an end"]].tolist() == pytest.approx([0.6, 0.8])
    assert table.loc["AR", "mean length"] == pytest.approx(5 / 3)
    assert table.loc["AR, before tuning", "ended properly"] == pytest.approx(2 / 3)
    assert table.loc["AR", "ended ±"] == pytest.approx(h.share([1, 1, 1, 0, 0])[1])


# --- speakers, and guidance ---

NAMES, WORDS = ["A", "B", "C", "D"], {"A": "hi", "B": "no", "C": "to", "D": "t."}
TALK = [("hi hi hi hi", who, " ".join([WORDS[who]] * n)) for n in (1, 2, 3) for who in NAMES]


def knows_who(ids: torch.Tensor) -> torch.Tensor:
    """After [START] each speaker's own letters are likely, if the name before it is seen; for AR's inputs and LLaDA's alike."""
    logits = torch.zeros(*ids.shape, ALPHABET.vocab_size)
    letters = {int(ALPHABET.encode(who)): ALPHABET.encode(word) for who, word in WORDS.items()}
    for row, logit in zip(ids, logits):
        for start in (row == START).nonzero()[-1:, 0].tolist():  # the last: AR's inputs begin with another one
            for name in letters.keys() & set(row[max(0, start - 3) : start].tolist()):
                logit[start:, letters[name]] += 2.0
    return logits


def test_a_quiz_asks_about_four_equally_often_after_full_prompts():
    more = [*TALK, ("hi hi hi hi", "E", "hi"), *[("hi hi hi hi", "F", "no")] * 5, *[("hi", "G", "hi")] * 9]
    assert dialogue.quiz(more, TALK, LAYOUT, 9) == sorted(TALK, key=lambda turn: turn[1])
    assert [who for _, who, _ in dialogue.quiz(more, more, LAYOUT, 2)] == list("FFAABBCC")
    assert [speech for *_, speech in dialogue.quiz(TALK, TALK, LAYOUT, 2)][:2] == ["hi", "hi hi hi"]
    assert dialogue.quiz([("hi hi hi hi", "A", "no" * 40)], TALK, LAYOUT, 1)[0][2] == ("no" * 40)[: LAYOUT.answer_len - 1]
    assert dialogue.quiz(TALK[:1], [("", "E", "hi")], LAYOUT, 5) == []


@pytest.mark.parametrize("n_samples", [0, 8])
def test_who_knows_the_speakers_tells_them_apart(n_samples):
    costs = dialogue.name_nats(knows_who, NAMES, TALK, LAYOUT, n_samples)
    assert costs.argmin(axis=1).tolist() == [0, 1, 2, 3] * 3
    assert (dialogue.ahead(costs, NAMES, TALK) > 0).all()
    none = dialogue.name_nats(blank, NAMES, TALK, LAYOUT, n_samples)
    spoken = np.array([len(speech) for *_, speech in TALK])[:, None]
    assert none == pytest.approx(np.broadcast_to(spoken * math.log(ALPHABET.vocab_size), (12, 4)), rel=1e-5)


def test_the_baseline_counts_characters():
    asked = [("", who, word * 2) for who, word in WORDS.items()]
    assert dialogue.by_characters(NAMES, asked, TALK).argmin(axis=1).tolist() == [0, 1, 2, 3]
    sums = sum(np.exp(-dialogue.by_characters(NAMES, [("", "A", c)], TALK)) for c in "hinot. ")
    assert sums == pytest.approx(np.ones((1, 4)))


def test_table_of_speakers(capsys):
    """A quiz without four speakers is left out, and says so: the shortest texts have one exchange to validate on."""
    models, three = {"LLaDA": knows_who, "AR": knows_who}, [turn for turn in TALK if turn[1] != "D"]
    asked = {"held out": TALK[:1], "of three": three, "seen": TALK}
    table = dialogue.speakers_table(models, asked, TALK, LAYOUT, 8).set_index("row")
    assert re.findall("^(.*): left out, the text is too short", capsys.readouterr().out, re.M) == ["held out", "of three"]
    assert table.loc["chance", "share"] == 0.25 and len(table) == 4
    for method in ("characters counted", "LLaDA, the speech", "AR, the speech"):
        line = table.loc[f"{method}, seen"]
        assert line["share"] == 1 and line["log odds, nats"] > 0 and line["speeches"] == 12
        assert line["share ±"] == pytest.approx(h.share([1] * 12)[1]) and line["speakers"] == "A, B, C, D"


def test_guidance_says_more_of_what_the_name_says():
    """The right name is the further ahead, the stronger it is; the answers are a function of the seed."""
    models = {"LLaDA": knows_who, "AR": knows_who}
    tables = [dialogue.guidance_table(models, TALK, TALK, LAYOUT, 16, strengths=(0.0, 4.0)) for _ in range(2)]
    table = tables[0].set_index("row")
    assert tables[0].equals(tables[1]) and table.index.tolist() == ["real speeches", "w = 0.0", "w = 4.0"]
    line = table.loc["w = 4.0"]
    assert line["minus w = 0"] > line["minus w = 0 ±"] > 0 and line["answers"] == 16
    assert line["log odds, nats"] - table.loc["w = 0.0", "log odds, nats"] == pytest.approx(line["minus w = 0"])
    assert table.loc["real speeches", "log odds, nats"] > 0 and math.isnan(table.loc["real speeches", "minus w = 0"])


@pytest.mark.parametrize("name", ["LLaDA", "AR"])
def test_real_models_respond(name):
    shape = h.ModelConfig(ALPHABET.vocab_size, 32, n_layer=1, n_head=1, n_embd=8, causal=name == "AR")
    ids = dialogue.respond(h.Transformer(shape).eval(), LAYOUT.rows(TALK), LAYOUT.prompt_len + 1)
    assert ids.shape == (12, LAYOUT.answer_len) and not torch.isin(ids, torch.tensor([PAD, MASK, START])).any()
