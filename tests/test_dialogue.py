"""Dialogue, rows for fine-tuning, what is learned of them and what comes out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import END, MASK, PAD, START, WrongPredictor, seeded

import llada_helpers as h
from beyond import dialogue
from beyond.decoding import guided
from beyond.likelihood import choose, low_noise_nelbo
from beyond.toy import WordTokenizer

SEP = "[SEP]"


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


def test_layout_of_a_row():
    tokenizer = h.CharTokenizer.from_text("abcd")
    rows = dialogue.instruction_rows([("abcd", "dc"), ("a", ""), ("", "abc")], tokenizer, seq_len=8, prompt_len=3)
    assert rows.tolist() == [[5, 6, 7, START, 7, 6, END, END], [4, START, *[END] * 6], [START, 4, 5, 6, *[END] * 4]]
    assert rows.dtype == torch.long


def test_rows_of_words():
    tokenizer = WordTokenizer.from_text(["Paris", "capital", "of", "France"])
    (row,) = dialogue.instruction_rows([(["capital", "of", "France"], ["Paris"])], tokenizer, seq_len=6, prompt_len=2)
    assert row.tolist() == [7, 4, START, 5, END, END]


@pytest.mark.parametrize("room", [1, 2, 5])
def test_response_must_leave_room_for_one_end(room):
    tokenizer = h.CharTokenizer.from_text("ab")
    pairs = [("a", "b" * n) for n in range(8)]
    rows = dialogue.instruction_rows(pairs, tokenizer, seq_len=3 + room + 2, prompt_len=3)
    assert [tokenizer.decode(row[2:]) for row in rows] == ["b" * n for n in range(room + 1)]
    full = dialogue.instruction_rows([("aaaa", "b" * room)], tokenizer, seq_len=3 + room + 2, prompt_len=3)
    assert full[0].tolist() == [4, 4, 4, START, *[5] * room, END]


@pytest.mark.parametrize("seq_len, prompt_len", [(5, 0), (5, -1), (5, 3), (5, 5), (2, 1), (0, 1)])
def test_rows_without_room_are_refused(seq_len, prompt_len):
    with pytest.raises(ValueError, match="leave room"):
        dialogue.instruction_rows([("a", "a")], h.CharTokenizer.from_text("a"), seq_len, prompt_len)


@pytest.mark.parametrize("pairs", [[], [("a", "aaaa")], [("", "aaaa"), ("a", "a" * 50)]])
def test_no_row_at_all_is_refused(pairs):
    with pytest.raises(ValueError, match="pass pairs"):
        dialogue.instruction_rows(pairs, h.CharTokenizer.from_text("a"), seq_len=8, prompt_len=3)


def test_unknown_characters_of_a_pair_are_named():
    for pair in (("é", "a"), ("a", "é")):
        with pytest.raises(ValueError, match="é"):
            dialogue.instruction_rows([pair], h.CharTokenizer.from_text("a"), seq_len=8, prompt_len=3)


@st.composite
def instructions(draw):
    """Pairs of texts or of lists of words, a tokenizer, and their rows."""
    words = draw(st.booleans())
    one = st.lists(st.sampled_from(["I", "love", "pizza", "2"]), max_size=7) if words else st.text("abc", max_size=7)
    pairs = draw(st.lists(st.tuples(one, one), min_size=1, max_size=5))
    tokenizer = WordTokenizer.from_text(["I", "love", "pizza", "2"] if words else "abc", draw(st.sampled_from([(), (SEP,)])))
    prompt_len, room = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    assume(any(len(response) <= room for _, response in pairs))
    rows = dialogue.instruction_rows(pairs, tokenizer, prompt_len + room + 2, prompt_len)
    return [(p[-prompt_len:], r) for p, r in pairs if len(r) <= room], tokenizer, rows


@given(instructions())
def test_a_row_is_its_prompt_and_its_response(made):
    pairs, tokenizer, rows = made
    gap = "" if isinstance(tokenizer.characters, str) else " "
    assert len(rows) == len(pairs)
    for row, learned, (prompt, response) in zip(rows, dialogue.response_tokens(rows), pairs):
        assert learned.tolist() == [False] * (len(prompt) + 1) + [True] * (len(row) - len(prompt) - 1)
        assert row[learned].tolist() == [*tokenizer.encode(response).tolist(), *[END] * (int(learned.sum()) - len(response))]
        assert row[-1] == END and not (row == PAD).any()
        assert tokenizer.decode(row[learned]) == gap.join(response) and tokenizer.decode(row[~learned]) == gap.join(prompt)


# --- fine-tuning: the prompt is given ---


@given(instructions(), st.integers(0, 10**6))
def test_what_is_predicted_at_the_prompt_does_not_matter(made, seed):
    """Not for the loss, were it NaN there, nor for the gradient, which reaches the response alone."""
    _, tokenizer, rows = made
    shape, config = h.ModelConfig(tokenizer.vocab_size, rows.shape[1], 1, 1, 8), h.TrainConfig(1, 4)
    for make_batch in (h.diffusion_batch, h.next_token_batch):
        batch = h.training_batch(h.Job(shape, config, rows, rows, make_batch, dialogue.response_tokens), seed)
        prompt = ~dialogue.response_tokens(batch[1])
        logits = torch.randn(*prompt.shape, tokenizer.vocab_size, generator=seeded(seed)).requires_grad_()
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
    tokenizer = h.CharTokenizer.from_text("abcd")
    pairs = [("abc", "dd"), ("b", ""), ("ddda", "abca"), ("", "c")]
    rows = dialogue.instruction_rows(pairs, tokenizer, seq_len=11, prompt_len=4)
    learned, seen, wrong = dialogue.response_tokens(rows), [], WrongPredictor(tokenizer.vocab_size, longest=11)

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

ALPHABET = h.CharTokenizer.from_text("ABCDE:\n hino.")
LAYOUT = dialogue.Layout(ALPHABET, 32)


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=h.PRESETS)
def test_layouts_of_the_presets_fit_and_can_be_decoded_in_blocks(preset):
    layout = dialogue.Layout(ALPHABET, preset.seq_len)
    assert layout.prompt_len + 1 + layout.answer_len == preset.seq_len
    block = layout.answer_len // 5
    assert layout.answer_len % block == 0 and (layout.answer_len // 2) % (layout.answer_len // block) == 0
    assert dialogue.SIZES[preset.name].guided % h.GROUPS == 0


def test_a_prompt_has_what_the_vocabulary_knows():
    assert LAYOUT.ask("hi", "A") == "hi\n\nA:\n" and LAYOUT.ask("Höi!", "AZ") == "i\n\nA:\n"
    (row,) = LAYOUT.rows([("hi hi hi hi hi", "B", "no.")])
    assert ALPHABET.decode(row) == " hi hi\n\nB:\nno." and (row == START).nonzero().tolist() == [[LAYOUT.prompt_len]]
    longest = "n" * (LAYOUT.answer_len - 1)
    assert len(LAYOUT.rows([("", "A", longest), ("", "A", longest + "n")])) == 1


def test_a_text_without_speakers_is_cut_into_turns():
    text = "hi no. " * 40
    train, val, test = dialogue.talks(text, text[: 4 * LAYOUT.answer_len], text, LAYOUT)
    assert [speech for *_, speech in train[:-1]] == [before for before, *_ in train[1:]]
    assert "".join([train[0][0], *(speech for *_, speech in train)]) == text[: len(train[0][0]) * (len(train) + 1)]
    assert len({who for _, who, _ in train}) == 4 and len(LAYOUT.rows(train)) == len(train) and val and test == train


def test_three_speakers_are_no_play():
    play = "\n\n".join(f"{who}:\nhi no." for who in "ABCABC")
    four = f"{play}\n\nD:\nno"
    untested = (four, four, "hi no. " * 9), (four, four, "Z:\nhi no.")  # by no speech that fits
    for texts in ((play, four, four), (four, play, four), *untested):
        assert dialogue.talks(*texts, LAYOUT)[0][0] != ("", "A", "hi no.")
    others = four.replace("A", "Z")  # may speak in the test text
    for texts in ((four, four, four), (four, four, play), (four, four, others)):
        assert dialogue.talks(*texts, LAYOUT) == tuple(map(dialogue.dialogue, texts))


@pytest.mark.parametrize("speech", ["no", "no " * 9], ids=["prompts too short", "answers too long"])
def test_a_play_without_a_usable_speech_is_cut_into_turns(speech):
    """Whatever the speeches are like, there are rows to train on and full prompts to ask with."""
    play = "\n\n".join(f"{who}:\n{speech}" for who in "ABCD" * 9)
    for talk in dialogue.talks(play, play, play, LAYOUT):
        rows = LAYOUT.rows(talk)
        assert len(rows) == len(talk) and len(dialogue.full_prompts(rows, LAYOUT, 3)) == 3


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=h.PRESETS)
def test_the_shortest_text_that_is_not_refused_has_an_exchange(preset):
    layout = dialogue.Layout(ALPHABET, preset.seq_len)
    long = "hi no. " * preset.seq_len
    for talk in dialogue.talks(long, long[: preset.seq_len], long[: preset.seq_len], layout)[1:]:
        assert len(talk) == 1 and len(dialogue.full_prompts(layout.rows(talk), layout, 8)) == 1


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

    def blank(ids):
        return torch.zeros(*ids.shape, ALPHABET.vocab_size)

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
    table = dialogue.answers_table(made, lengths, layout).set_index("row")
    assert table.loc["AR", ["ended properly", "has an end"]].tolist() == pytest.approx([0.6, 0.8])
    assert table.loc["AR", "mean length"] == pytest.approx(5 / 3)
    assert table.loc["AR, before tuning", "ended properly"] == pytest.approx(2 / 3)
    assert table.loc["AR", "ended ±"] == pytest.approx(h.share([1, 1, 1, 0, 0])[1])
    assert table.loc["real", "largest gap to real"] == 0 and table.loc["AR", "largest gap to real"] == pytest.approx(2 / 3)


# --- five sentences, three instructions: a whole training ---

SENTENCES = ["I love pizza", "I love sushi", "You love pizza", "Math is fun", "Transformers are powerful"]
ANSWERS = {
    "Solve : 2 + 2 =": "4",
    "Translate : hello -> Spanish": "hola",
    "What is the capital of France ?": "Paris",
}
TOY_LEN = 12
TOY = WordTokenizer.from_text(" ".join([*SENTENCES, *ANSWERS, *ANSWERS.values(), "London", "Berlin"]).split(), special=(SEP,))
SEP_ID = int(TOY.encode([SEP]))


def toy_row(words):
    return TOY.encode([*words, *["[END]"] * (TOY_LEN - len(words))])


def toy_responses(rows):
    return dialogue.response_tokens(rows, separator=SEP_ID)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The model after pre-training, and after fine-tuning."""
    root = tmp_path_factory.mktemp("toy")
    sentences = torch.stack([toy_row(["[START]", *text.split()]) for text in SENTENCES])
    instructions = torch.stack([toy_row(["[START]", *q.split(), SEP, a]) for q, a in ANSWERS.items()])
    shape = h.ModelConfig(TOY.vocab_size, TOY_LEN, n_layer=2, n_head=2, n_embd=32)
    config = h.TrainConfig(steps=400, batch_size=16, evals=2)
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


@pytest.mark.parametrize("w", [0.0, 1.0])
@pytest.mark.parametrize("words", [["London", "Paris", "Berlin"], ["4", "hola", "Paris"]])
def test_fine_tuned_model_chooses_the_answer_to_the_question(toy, words, w):
    options = [TOY.encode([word, "[END]"]) for word in words]
    for question, answer in ANSWERS.items():
        if answer in words:
            template, head = asked(question)
            model = guided(toy[1].model, lambda ids, head=head: torch.arange(ids.shape[1])[None] < head, w)
            index, scores = choose(model, template[0, :head], options, MASK, n_samples=8, generator=seeded(0))
            assert words[index] == answer and scores[index] > math.log(0.5)
