"""Section 1: where the text comes from, the tokenizer, the windows."""

import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import requests
import torch
from hypothesis import given
from hypothesis import strategies as st
from notebooks import ROOT, python_path

import llada_helpers as h

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


class Response:
    def __init__(self, content):
        self.content = content


@pytest.fixture
def web(monkeypatch, tmp_path):
    """No network: an empty cache, a corpus of our own with its own SHA-256, and a list of what was asked for."""
    monkeypatch.setattr(h, "CACHED", tmp_path / "cache" / "llada" / "tinyshakespeare.txt")
    monkeypatch.setattr(h, "CORPUS_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())

    class Web:
        def __init__(self):
            self.calls, self.answer = [], Response(TEXT.encode())

        def get(self, url, **kwargs):
            self.calls.append((url, kwargs))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    fake = Web()
    monkeypatch.setattr(h.requests, "get", fake.get)
    return fake


def test_path_wins_over_environment(web, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("from the path")
    (tmp_path / "b.txt").write_text("from the environment")
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "b.txt"))
    assert h.load_text(tmp_path / "a.txt") == "from the path"
    assert h.load_text(str(tmp_path / "a.txt")) == "from the path"
    assert h.load_text() == "from the environment"
    assert web.calls == []


def test_environment_wins_over_cache(web, tmp_path, monkeypatch):
    h.write_atomically(h.CACHED, TEXT.encode())
    (tmp_path / "b.txt").write_text("from the environment")
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "b.txt"))
    assert h.load_text() == "from the environment"


def test_cache_lies_under_xdg_cache_home(tmp_path):
    code = "import llada_helpers as h; print(h.CACHED)"
    env = {**os.environ, "PYTHONPATH": python_path(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert tmp_path in Path(said.strip()).parents


def test_right_cache_is_read_without_network(web):
    h.write_atomically(h.CACHED, TEXT.encode())
    assert h.load_text() == TEXT
    assert web.calls == []


def test_wrong_cache_is_replaced(web):
    h.write_atomically(h.CACHED, TEXT[:20].encode())  # an interrupted download of long ago
    assert h.load_text() == TEXT
    assert len(web.calls) == 1
    assert h.CACHED.read_text() == TEXT


def test_download_is_cached_once_with_a_timeout(web):
    assert h.load_text() == TEXT
    assert h.load_text() == TEXT
    assert len(web.calls) == 1
    url, kwargs = web.calls[0]
    assert url == h.CORPUS_URL
    assert kwargs.get("timeout"), "without a time-out a dead server hangs the notebook"
    assert [p.name for p in h.CACHED.parent.iterdir()] == [h.CACHED.name], "a temporary file was left behind"


@pytest.mark.parametrize(
    "answer",
    [
        Response(b"<html>not the corpus</html>"),
        Response(b"404: Not Found"),
        requests.Timeout("too slow"),
        requests.ConnectionError("no network"),
    ],
    ids=["wrong SHA", "404", "time-out", "offline"],
)
def test_failed_download_warns_and_serves_the_offline_corpus(web, answer):
    web.answer = answer
    with pytest.warns(UserWarning) as caught:
        text = h.load_text()
    message = str(caught[0].message)
    assert str(h.CACHED) in message and "LLADA_DATA" in message, "the warning must say where to put the file by hand"
    assert len(text) > 100_000 and text == h.OFFLINE_CORPUS
    assert not h.CACHED.exists(), "what failed the check must not be cached"


def test_right_download_does_not_warn(web):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h.load_text()


@pytest.mark.parametrize(
    "raw, text",
    [
        (b"\xef\xbb\xbfabc\n", "abc\n"),
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        ("naïve – π".encode(), "naïve – π"),
    ],
    ids=["BOM", "line ends", "UTF-8"],
)
def test_text_is_normalised(tmp_path, raw, text):
    (tmp_path / "t.txt").write_bytes(raw)
    assert h.load_text(tmp_path / "t.txt") == text


BAD_FILES = {
    "empty": (b"", "is empty"),
    "only BOM": (b"\xef\xbb\xbf", "is empty"),
    "white space": (b" \r\n\t\n", "only white space"),
    "UTF-16 with BOM": ("\ufeffa\u00e9".encode("utf-16-le"), "cannot be read as UTF-8"),
    "UTF-16 without BOM": ("all ASCII".encode("utf-16-le"), "NUL"),
    "Latin-1": ("na\u00efve".encode("latin-1"), "cannot be read as UTF-8"),
    "cut inside a character": ("a\u00e9".encode()[:-1], "cannot be read as UTF-8"),
    "missing": (None, "cannot be read"),
}


@pytest.mark.parametrize("raw, complaint", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("way", ["path", "environment"])
def test_bad_file_is_an_error_that_names_it(tmp_path, monkeypatch, raw, complaint, way):
    path = tmp_path / "the_text.txt"
    if raw is not None:
        path.write_bytes(raw)
    if way == "environment":
        monkeypatch.setenv("LLADA_DATA", str(path))
    with pytest.raises(ValueError, match=rf"the_text\.txt.*{complaint}.*; pass "):
        h.load_text(path if way == "path" else None)


def test_directory_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read.*directory.*; pass a text file"):
        h.load_text(tmp_path)


def test_corpus_name(web, tmp_path, monkeypatch):
    assert h.corpus_name(TEXT) == "TinyShakespeare"
    assert "offline" in h.corpus_name(h.OFFLINE_CORPUS)
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / "moby.txt"))
    assert h.corpus_name("Call me Ishmael.") == "own text (moby)"
    assert h.corpus_name(TEXT) == "TinyShakespeare", "whatever its file is called"


@pytest.mark.parametrize("name", ["TinyShakespeare.txt", "tinyshakespeare", "Tiny_Shakespeare.md", "tiny-shakespeare.txt"])
def test_the_checksum_decides_and_not_the_name(web, tmp_path, monkeypatch, name):
    """One changed letter is another text: other label, and the tracked figures stay as they are."""
    (tmp_path / name).write_text(TEXT.replace("First", "Third"))
    monkeypatch.setenv("LLADA_DATA", str(tmp_path / name))
    text = h.load_text()
    assert h.corpus_name(text) != "TinyShakespeare" and "own text" in h.corpus_name(text) and not h.is_corpus(text.encode())
    assert h.Results(h.PRESETS["cpu"], text).folder == Path("build", "cpu", "figures")


def test_a_text_that_cannot_be_cached_is_used_all_the_same(web, monkeypatch, recwarn):
    """The cache is a file where a folder should be: neither readable nor writable, whoever asks."""
    h.CACHED.parent.parent.parent.mkdir(exist_ok=True)
    h.CACHED.parent.parent.write_text("a file")
    assert h.load_text() == TEXT == h.load_text() and len(web.calls) == 2 and not recwarn.list


@pytest.mark.parametrize("way", ["read_bytes", "write_bytes"])
def test_a_cache_without_permission_is_none(web, monkeypatch, way, recwarn):
    h.write_atomically(h.CACHED, TEXT[:9].encode())

    def refused(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, way, refused)
    assert h.load_text() == TEXT and not recwarn.list


@pytest.mark.parametrize("preset", h.PRESETS.values(), ids=lambda p: p.name)
def test_a_text_too_short_is_refused_with_the_length_that_is_needed(preset):
    """The shortest text that is not refused fills a window in each of its three parts."""
    least = 10 * preset.seq_len
    h.require("x" * least, preset)
    rest = h.split(torch.arange(least))[1]
    assert all(len(part) >= preset.seq_len for part in h.split(rest, 0.5))
    with pytest.raises(ValueError, match=rf"has {least - 1:,} characters; pass a longer one, .*{preset.name} needs {least:,}"):
        h.require("x" * (least - 1), preset)


# --- tokenizer ---


def test_ids_are_the_special_tokens_then_sorted_characters():
    tokenizer = h.CharTokenizer.from_text("banana split")
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.start_id, tokenizer.end_id) == (0, 1, 2, 3)
    characters = sorted(set("banana split"))
    assert tokenizer.vocab_size == 4 + len(characters)
    ids = tokenizer.encode("".join(characters))
    assert ids.dtype == torch.long and ids.tolist() == list(range(4, 4 + len(characters)))


@given(st.text(min_size=1, max_size=40), st.data())
def test_round_trip(text, data):
    tokenizer = h.CharTokenizer.from_text(text)
    other = data.draw(st.text(alphabet=sorted(set(text)), max_size=30))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(other)) == other
    again = h.CharTokenizer.from_json(tokenizer.to_json())
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_empty_string_encodes_to_an_empty_long_vector():
    ids = h.CharTokenizer.from_text("ab").encode("")
    assert ids.dtype == torch.long and ids.shape == (0,)


def test_unknown_characters_are_named_never_masked():
    tokenizer = h.CharTokenizer.from_text("abc")
    with pytest.raises(ValueError) as error:
        tokenizer.encode("aéb7c")
    assert "é" in str(error.value) and "7" in str(error.value)
    assert "'a'" not in str(error.value), "known characters are not to blame"


def test_glyph_of_mask_is_not_encoded_as_mask():
    tokenizer = h.CharTokenizer.from_text("abc")
    with pytest.raises(ValueError):
        tokenizer.encode("a" + tokenizer.decode([1]))


def test_decode_special_tokens():
    tokenizer = h.CharTokenizer.from_text("abc")
    block = tokenizer.decode([1])
    assert len(block) == 1 and block not in "abc "
    assert tokenizer.decode([2, 4, 0, 5, 1, 6]) == f"ab{block}c"
    assert tokenizer.decode(torch.tensor([4, 5, 3, 6, 3, 6])) == "ab"
    assert tokenizer.decode([3, 4]) == ""
    assert tokenizer.decode([]) == ""


SPECIAL = '{"special_tokens": ["[PAD]", "[MASK]", "[START]", "[END]"]'
KNOWN = [f"{SPECIAL}{rest}}}" for rest in ("", ', "characters": 5', ', "characters": "aa"', ', "characters": ""')]


@pytest.mark.parametrize("text", ["", "[]", "{}", "5", "null", "not json", '{"characters": "ab"}', *KNOWN])
def test_bad_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        h.CharTokenizer.from_json(text)


def test_tokenizer_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="pass"):
        h.CharTokenizer.from_text("")


# --- windows ---


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_windows_drop_nothing(n, seq_len, data):
    stride = data.draw(st.one_of(st.none(), st.integers(1, seq_len)))
    ids = torch.arange(4, 4 + n)
    rows = h.windows(ids, seq_len, stride)
    step = stride or seq_len
    assert rows.dtype == torch.long and rows.shape[1] == seq_len
    rebuilt = torch.zeros((len(rows) - 1) * step + seq_len, dtype=torch.long)
    for i, row in enumerate(rows):
        expected = ids[i * step : i * step + seq_len]
        assert row[: len(expected)].tolist() == expected.tolist(), "row i starts at i * stride"
        assert (row[len(expected) :] == 0).all(), "only padding after the end"
        rebuilt[i * step : i * step + seq_len] = row
    assert rebuilt[:n].tolist() == ids.tolist()
    assert (rows[-1] != 0).any(), "no window of padding alone"
    assert len(rows) == 1 or (len(rows) - 2) * step + seq_len < n, "no window more than needed"


def test_windows_pad_id_and_short_text():
    assert h.windows(torch.tensor([7, 8]), 4, pad_id=9).tolist() == [[7, 8, 9, 9]]
    assert h.windows(torch.tensor([7, 8, 9, 10]), 4).tolist() == [[7, 8, 9, 10]]


@pytest.mark.parametrize("seq_len, stride", [(0, None), (-1, None), (4, 0), (4, -1), (4, 5)])
def test_windows_that_would_drop_text_are_errors(seq_len, stride):
    with pytest.raises(ValueError, match="pass"):
        h.windows(torch.arange(10), seq_len, stride)


@pytest.mark.parametrize("shape", [(0,), (2, 3)])
def test_windows_want_a_vector(shape):
    with pytest.raises(ValueError, match="pass"):
        h.windows(torch.ones(shape, dtype=torch.long), 2)


def test_write_atomically_keeps_the_old_file_when_killed_before_the_rename(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "file.txt"
    h.write_atomically(path, b"old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(h.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        h.write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"


# --- a text of one's own, from the file to a filled template ---

SEQ_LEN = 16
EMOJI = "".join(map(chr, range(0x1F600, 0x1F600 + 60)))
MANY = "".join(map(chr, range(0x20, 0x7F))) + "e\u0301\u0308\U0001f468\u200d\U0001f469\u200d\U0001f467\ufe0f\u202e\u2028█" + EMOJI
MANY += "".join(map(chr, range(0x4E00, 0x4E00 + 200 - len(set(MANY)))))
OWN_TEXTS = {
    "a line shorter than a window": b"To be.",
    "two characters": b"ab",
    "the same character twice": b"aa",
    "200 characters": (3 * MANY).encode(),
    "Windows line ends": b"One line.\r\nAnother line.\r\n" * 5,
    "byte-order mark": b"\xef\xbb\xbf" + b"After the mark. " * 5,
    "old Mac line ends": b"One line.\rAnother line.\r" * 5,
    "markup": b"<!-- table x --> $\\ln V$ {} %s <script>&amp;" * 2,
}


def learn_and_write(path, root, monkeypatch, causal):
    """Everything that the notebook does with a text, at the smallest size; returns text, tokenizer, what was written."""
    monkeypatch.setenv("LLADA_DATA", str(path))
    text = h.load_text()
    tokenizer = h.CharTokenizer.from_text(text)
    train_ids, val_ids = h.split(tokenizer.encode(text))
    assert tokenizer.decode(torch.cat((train_ids, val_ids))) == text, "nothing lost"
    rows = h.windows(val_ids, SEQ_LEN)
    model = h.ModelConfig(tokenizer.vocab_size, SEQ_LEN, n_layer=1, n_head=1, n_embd=8, causal=causal)
    job = h.Job(model, h.TrainConfig(steps=2, batch_size=2, evals=1, eval_windows=2), train_ids, val_ids)
    run = h.train("own", job, root=root, quiet=True)
    assert run.summary["steps"] == 2 and 0 < run.summary["best"] < 3 * torch.tensor(tokenizer.vocab_size).log()
    prompt = rows[:1, :1]
    special = (h.PAD_ID, h.START_ID, h.END_ID)
    if causal:
        made = h.generate_ar(run.model, prompt, SEQ_LEN - 1, start_id=h.START_ID, forbidden=(h.MASK_ID, *special))
    else:
        template = torch.cat((prompt, torch.full((1, SEQ_LEN - 1), h.MASK_ID)), dim=1)
        made = h.reverse_process(run.model, template, mask_id=h.MASK_ID, steps=3, temperature=1.0, forbidden=special)
    return text, tokenizer, tokenizer.decode(made.ids[0])


@pytest.mark.parametrize("causal", [False, True], ids=["LLaDA", "AR"])
@pytest.mark.parametrize("raw", OWN_TEXTS.values(), ids=OWN_TEXTS)
def test_own_text_is_learned_and_continued(tmp_path, monkeypatch, raw, causal):
    path = tmp_path / "own.txt"
    path.write_bytes(raw)
    text, tokenizer, written = learn_and_write(path, tmp_path, monkeypatch, causal)
    assert text.encode() == raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n").removeprefix(b"\xef\xbb\xbf")
    assert tokenizer.vocab_size == 4 + len(set(text))
    assert len(written) == SEQ_LEN and set(written) <= set(text)
    assert h.corpus_name(text) == "own text (own)"


def test_the_text_of_many_characters_has_200():
    assert len(set(MANY)) == 200


@pytest.mark.parametrize("text", ["a", "\u00e9", "\U0001f600"])
def test_one_character_cannot_be_split(tmp_path, monkeypatch, text):
    path = tmp_path / "own.txt"
    path.write_bytes(text.encode())
    with pytest.raises(ValueError, match="pass a longer text"):
        learn_and_write(path, tmp_path, monkeypatch, causal=False)
    assert [p.name for p in tmp_path.iterdir()] == ["own.txt"], "nothing half made"


@pytest.mark.parametrize("count, fraction", [(0, 0.8), (1, 0.8), (5, 0.1), (5, 0.0), (5, 1.0), (5, 1.2), (5, -0.5)])
def test_split_into_an_empty_part_is_an_error(count, fraction):
    with pytest.raises(ValueError, match="pass"):
        h.split(torch.arange(count), fraction)


@given(st.integers(2, 200), st.floats(0.5, 0.99))
def test_split_cuts_once_by_position(count, fraction):
    a, b = h.split(torch.arange(count), fraction)
    assert torch.cat((a, b)).tolist() == list(range(count)) and len(a) and len(b)


@pytest.mark.parametrize("train_count, val_count", [(0, 9), (9, 0), (0, 0)])
@pytest.mark.parametrize("rows", [False, True])
def test_train_on_nothing_is_an_error_before_anything_is_written(tmp_path, train_count, val_count, rows):
    model = h.ModelConfig(vocab_size=9, seq_len=4, n_layer=1, n_head=1, n_embd=8)
    shape = [(n, 4) if rows else (n,) for n in (train_count, val_count)]
    data = [torch.full(s, 5) for s in shape]
    with pytest.raises(ValueError, match=rf"\({data[0].numel()}, {data[1].numel()}\) ids: pass"):
        h.train("none", h.Job(model, h.TrainConfig(steps=1, batch_size=1), *data), root=tmp_path)
    assert list(tmp_path.iterdir()) == []
