"""Section 5: a run is complete, resumed exactly, or refused; never half of each."""

import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tokenize
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from notebooks import python_path
from oracle import PostNormEncoder
from safetensors.torch import load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llada_helpers as h
from beyond import ablations, blocks, crossover, exact
from beyond.ablations import LearnedPositions, TimeConditioned, masked_mean
from beyond.dialogue import response_tokens

MODEL = h.ModelConfig(vocab_size=10, seq_len=8, n_layer=1, n_head=2, n_embd=8, dropout=0.1)
STEADY = replace(MODEL, dropout=0.0)
CONFIG = h.TrainConfig(steps=8, batch_size=4, evals=4, eval_windows=4)
TRAIN_IDS = torch.randint(4, 10, (200,), generator=torch.Generator().manual_seed(0))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = ["step", "tokens", "seconds", "train_loss", "val_loss", "train_acc", "val_acc", "lr", "grad_norm"]
VAL_IDS = torch.randint(4, 10, (60,), generator=torch.Generator().manual_seed(1))  # its last window is padded


def job_of(config=CONFIG, model=MODEL, train_ids=TRAIN_IDS, val_ids=VAL_IDS, module=h, **more):
    return module.Job(model, config, train_ids, val_ids, **more)


def train(root, config=CONFIG, model=MODEL, **more):
    return h.train("tiny", job_of(config, model, **more), root=root)


def val_loss(trained, rows, /, **job):
    job = job_of(**job)
    return float(job.validation_nats(trained, rows).sum() / job.learned(rows).sum())


def checkpoint(run, root):
    return Path(root) / "checkpoints" / run.path.name


def read_state(path):
    """Tensors and rows of metrics of a last.state, without the helper's own reader."""
    data = path.read_bytes()
    assert hashlib.sha256(data[32:]).digest() == data[:32]
    tensors = load(data[32:])
    notes = json.loads(bytes(tensors.pop("notes").tolist()))
    return tensors, notes["rows"]


def step_of(path):
    return read_state(path)[1][-1]["step"]


def last_state(run, root):
    return read_state(checkpoint(run, root) / "last.state")


def complete(root):
    return [record["complete"] for path in root.glob("runs/*/run.json") for record in [json.loads(path.read_text())]]


def same_result(a, root_a, b, root_b):
    """Bit for bit: weights, optimizer, metrics (seconds apart), best model, on disk and in memory."""
    (tensors_a, rows_a), (tensors_b, rows_b) = last_state(a, root_a), last_state(b, root_b)
    assert tensors_a.keys() == tensors_b.keys()
    for key in tensors_a:
        assert torch.equal(tensors_a[key], tensors_b[key]), key
    for metrics in (b.metrics, pd.read_csv(b.path / "metrics.csv"), pd.DataFrame(rows_a), pd.DataFrame(rows_b)):
        pd.testing.assert_frame_equal(a.metrics.drop(columns="seconds"), metrics.drop(columns="seconds"))
    assert a.summary | {"name": "", "seconds": 0} == b.summary | {"name": "", "seconds": 0} and a.summary["complete"]
    assert json.loads((b.path / "run.json").read_text()) == b.summary
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert torch.equal(p, q)


class Killed(BaseException):
    """Death without clean-up."""


@contextlib.contextmanager
def killed_at_rename(monkeypatch, file, occasion, after=False):
    """What runs inside must die just before (or just after) the so-manieth time that a file is renamed to `file`.

    The dead rename nothing more, whatever `finally` says.
    """
    rename, seen = os.replace, []

    def deadly(source, target):
        seen.extend([target] * (Path(target).name == file))
        if len(seen) < occasion or (after and len(seen) == occasion):
            rename(source, target)
        if len(seen) >= occasion:
            seen.append("dead")
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(h.os, "replace", deadly)
        with pytest.raises(Killed):
            yield


def interrupt_in(patch, step):
    """Ctrl-C in the middle of training step `step`: after the loss, before anything else."""
    batch, nll, steps = h.training_batch, h.weighted_nll, []

    def noted(job, number):
        steps.append(number)
        return batch(job, number)

    def interrupted(*given):
        loss = nll(*given)
        if steps[-1] == step - 1:
            raise KeyboardInterrupt
        return loss

    patch.setattr(h, "training_batch", noted)
    patch.setattr(h, "weighted_nll", interrupted)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    root = tmp_path_factory.mktemp("reference")
    return train(root), root


@pytest.fixture
def interrupt_at(monkeypatch):
    return lambda step: interrupt_in(monkeypatch, step)


@pytest.mark.parametrize("causal", [False, True])
def test_training_learns_and_leaves_its_record(tmp_path, causal):
    """Text of one repeated character is learned at once; every file that the docstring names is there."""
    ids = torch.full((100,), 5)
    config = h.TrainConfig(steps=30, batch_size=4, evals=3, eval_windows=4, adamw_lr=0.05)
    model = h.ModelConfig(10, 8, 1, 2, 8, causal=causal)
    run = h.train("learn", h.Job(model, config, ids, ids[:30]), root=tmp_path)
    assert run.metrics.val_loss.iloc[-1] < 0.5 < run.metrics.train_loss.iloc[0]
    assert run.metrics.val_acc.iloc[-1] > 0.9 and run.metrics.train_acc.is_monotonic_increasing
    assert list(run.metrics.columns) == COLUMNS
    assert run.metrics.step.tolist() == [10, 20, 30]
    assert run.metrics.tokens.tolist() == [10 * 32, 20 * 32, 30 * 32]
    pd.testing.assert_frame_equal(pd.read_csv(run.path / "metrics.csv"), run.metrics)
    record = json.loads((run.path / "run.json").read_text())
    assert record == run.summary
    assert record["causal"] is causal and record["batch"] == ("next_token_batch" if causal else "diffusion_batch")
    assert record["complete"] and record["steps"] == 30 and record["tokens"] == 30 * 32
    assert record["best"] == run.metrics.val_loss.min()
    assert record["parameters"] == run.model.n_parameters and record["tokens"] == 30 * 32
    assert {"device", "torch", "python", "commit", "processes", "precision"} <= record.keys()
    assert list(run.path.glob("events.out.tfevents*"))
    folder = tmp_path / "checkpoints" / run.path.name
    assert {p.name for p in (folder / "best").iterdir()} >= {"config.json", "model.safetensors"}
    assert sorted(p.name for p in folder.iterdir()) == ["best", "last.state", "previous.state"]
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()], "no temporary file is left"
    assert run.path.parent == tmp_path / "runs" and run.path.name.startswith("learn-") and not run.model.training


def test_best_model_is_the_one_returned(tmp_path):
    """With a learning rate that wrecks the model late, the best validation loss is not the last."""
    config = replace(CONFIG, steps=20, evals=5, muon_lr=0.5, adamw_lr=0.3, decay=0.0)
    run = train(tmp_path, config, STEADY)
    assert run.summary["best"] == run.metrics.val_loss.min() < run.metrics.val_loss.iloc[-1]
    rows = job_of(config, STEADY).validation_sequences()
    assert val_loss(run.model, rows, config=config, model=STEADY) == pytest.approx(run.summary["best"], abs=1e-5)


class Fours(torch.nn.Module):
    """Right where the truth is 4, and nowhere else."""

    def __init__(self):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        return torch.nn.functional.one_hot(torch.full_like(ids, 4), 10).float()


@pytest.mark.parametrize("causal", [False, True])
def test_accuracy_is_weighted_as_the_loss(causal):
    rows = torch.tensor([[4, 5, 6, 7, 8, 9, 4, 5]] * 3)
    make_batch = h.next_token_batch if causal else h.diffusion_batch
    _, targets, weight = make_batch(rows, torch.Generator().manual_seed(0), h.real_tokens(rows))
    expected = float((weight * (targets == 4)).sum() / weight.sum())
    assert causal or abs(expected - 0.25) > 0.02, "not the share of all tokens"
    assert job_of(model=replace(STEADY, causal=causal)).validation_accuracy(Fours(), rows) == pytest.approx(expected)


def test_complete_run_is_loaded_not_trained(reference, monkeypatch):
    run, root = reference

    def refuse(*_, **__):
        raise AssertionError("it trains again")

    monkeypatch.setattr(h, "tqdm", refuse)
    again = train(root)
    assert again.path == run.path and again.summary == run.summary
    for p, q in zip(run.model.parameters(), again.model.parameters()):
        assert torch.equal(p, q)
    pd.testing.assert_frame_equal(again.metrics, run.metrics)


def test_run_is_known_by_its_fingerprint_whatever_its_name(stopped, tmp_path):
    """The ablations' first row is the main run: it is gone on with, and then loaded, where it lies."""
    root = shutil.copytree(stopped, tmp_path / "copy")
    (folder,) = root.glob("runs/*")
    run = h.train("other", job_of(), root=root)
    assert run.path == folder and complete(root) == [True] and run.metrics.step.tolist() == [2, 4, 6, 8]
    assert h.train("third", job_of(), root=root).summary == run.summary
    assert list(root.glob("runs/*")) == [folder] and len(list(root.glob("checkpoints/*"))) == 1


def test_retrain_forces(reference, tmp_path, monkeypatch):
    """In a copy: other tests read the reference run as its training left it."""
    run, root = reference[0], shutil.copytree(reference[1], tmp_path / "copy")
    bars = []

    class Bar(h.tqdm):
        def __init__(self, *args, **kwargs):
            bars.append(kwargs["initial"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(h, "tqdm", Bar)
    monkeypatch.setenv("LLADA_RETRAIN", "1")
    again = train(root)
    assert bars == [0], "from the first step"
    same_result(run, reference[1], again, root)


@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_interrupted_and_resumed_equals_uninterrupted(reference, tmp_path, interrupt_at, monkeypatch, step):
    run, root = reference
    interrupt_at(step)
    broken = train(tmp_path)
    assert complete(tmp_path) == [False], "an interrupted run must not look complete"
    assert len(broken.metrics) == (step - 1) // 2 and not broken.summary["complete"]
    monkeypatch.undo()
    same_result(run, root, train(tmp_path), tmp_path)


def test_interrupted_by_the_keyboard_between_two_steps(reference, tmp_path, monkeypatch, capsys):
    """It says at which step, and where the checkpoint is from which the next call goes on."""
    run, root = reference

    class Bar(h.tqdm):
        def __iter__(self):
            for step in super().__iter__():
                if step == 5:
                    raise KeyboardInterrupt
                yield step

    monkeypatch.setattr(h, "tqdm", Bar)
    broken = train(tmp_path)
    assert re.search(rf"step 5\b.*{re.escape(str(checkpoint(broken, tmp_path)))}", capsys.readouterr().out)
    monkeypatch.undo()
    same_result(run, root, train(tmp_path), tmp_path)


@pytest.mark.parametrize("occasion", [1, 3, 4])
def test_interrupted_during_validation(reference, tmp_path, monkeypatch, occasion):
    """In the last validation, all steps have been made: that is not complete yet."""
    run, root = reference
    calls, nats = [], h.Job.validation_nats

    def interrupted(*given):
        calls.append(1)
        if len(calls) == occasion:
            raise KeyboardInterrupt
        return nats(*given)

    with monkeypatch.context() as patch:
        patch.setattr(h.Job, "validation_nats", interrupted)
        broken = train(tmp_path)
    assert len(broken.metrics) == occasion - 1 and complete(tmp_path) == [False]
    same_result(run, root, train(tmp_path), tmp_path)


FILES = ["config.json", "model.safetensors", "metrics.csv", "previous.state", "last.state"]
RENAMES = [(file, occasion) for file in FILES for occasion in (1, 4 - (file[0] == "p"))]


@pytest.mark.parametrize("file, occasion", RENAMES)
def test_interrupted_while_saving(reference, tmp_path, monkeypatch, file, occasion):
    """Ctrl-C at each rename: what comes back says of itself that it is not complete, and the next call makes it so."""
    run, root = reference
    rename, seen = os.replace, []

    def interrupted(source, target):
        seen.extend([target] * (Path(target).name == file))
        if Path(target).name == file and len(seen) == occasion:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(h.os, "replace", interrupted)
        broken = train(tmp_path)
    assert not broken.summary["complete"] and complete(tmp_path) == [False]
    same_result(run, root, train(tmp_path), tmp_path)


@pytest.mark.parametrize("file, occasion", [*RENAMES, ("run.json", 1), ("run.json", 2)])
def test_killed_just_before_a_file_appears(reference, tmp_path, monkeypatch, file, occasion):
    """Death (no clean-up) at each rename: the next call still ends where the uninterrupted run does, metrics.csv included."""
    run, root = reference
    with killed_at_rename(monkeypatch, file, occasion):
        train(tmp_path)
    assert True not in complete(tmp_path)
    same_result(run, root, train(tmp_path), tmp_path)
    same_result(run, root, train(tmp_path), tmp_path)


def test_killed_while_the_checkpoint_is_being_written(reference, tmp_path, monkeypatch):
    """Half a file under its final name would be refused by the next call; the last whole checkpoint must survive."""
    run, root = reference
    write, seen = Path.write_bytes, []

    def half(path, data):
        seen.extend([path] * ("last.state" in path.name))
        if len(seen) < 3:
            return write(path, data)
        write(path, data[:500])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(Killed):
            train(tmp_path)
    same_result(run, root, train(tmp_path), tmp_path)


@pytest.mark.parametrize("step", [1, 4])
def test_interrupted_retraining_is_not_taken_for_complete(reference, tmp_path, interrupt_at, monkeypatch, step):
    """LLADA_RETRAIN=1, interrupted: the old record must not vouch for the new half-trained weights."""
    run, root = reference
    train(tmp_path)
    monkeypatch.setenv("LLADA_RETRAIN", "1")
    interrupt_at(step)
    broken = train(tmp_path)
    assert complete(tmp_path) == [False] and len(broken.metrics) == (step - 1) // 2
    monkeypatch.undo()
    assert not os.environ.get("LLADA_RETRAIN")
    same_result(run, root, train(tmp_path), tmp_path)


KILLED = h.TrainConfig(steps=120, batch_size=4, evals=60, eval_windows=1)
PYTHONPATH = python_path(Path(h.__file__).resolve().parent, Path(__file__).resolve().parent)
SCRIPT = """
import test_training as t
t.train({root!r}, config=t.KILLED)
"""


def newest_step(folder):
    """Of the checkpoints as they lie there; last.state may be missing for a moment, between two renames."""
    steps = [0]
    for path in folder.glob("checkpoints/*/*.state"):
        with contextlib.suppress(OSError):
            steps.append(step_of(path))
    return max(steps)


def test_sigkill_at_random_moments_then_resume(tmp_path):
    """kill -9 between or within steps, checkpoints and renames, three times; then the bits are those of a run never killed."""
    moments = random.Random(0)
    folder = tmp_path / "killed"
    script = SCRIPT.format(root=str(folder))
    step = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and child.poll() is None:
                if newest_step(folder) > step:
                    break
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
            _, errors = child.communicate()
        finally:
            child.kill()
        assert child.returncode == -signal.SIGKILL, errors.decode()[-2000:]
        step = newest_step(folder)
    assert 0 < step < KILLED.steps and True not in complete(folder)
    resumed, whole = train(folder, config=KILLED), train(tmp_path / "whole", config=KILLED)
    same_result(whole, tmp_path / "whole", resumed, folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run interrupted at step 5: last.state is of step 4, previous.state of step 2."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in(patch, 5)
        train(root)
    return root


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of it to damage: root, last.state, previous.state."""
    root = shutil.copytree(stopped, tmp_path / "copy")
    (folder,) = root.glob("checkpoints/*")
    last, previous = folder / "last.state", folder / "previous.state"
    assert [step_of(p) for p in (last, previous)] == [4, 2]
    return root, last, previous


def cut(keep):
    return lambda data: data[:keep]


def flip(where):
    """One flipped bit, at a share of the file."""

    def flipped(data):
        place = int(where * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return flipped


def flip_in_the_notes(before, after):
    """One flipped bit in the JSON text that says where to go on."""

    def flipped(data):
        assert data.count(before) == 1 and sum((a ^ b).bit_count() for a, b in zip(before, after)) == 1
        return data.replace(before, after)

    return flipped


DAMAGE = {
    **{f"cut to {n}": cut(n) for n in (0, 5, 32, 300, -10)},
    **{name: flip(where) for name, where in {"checksum": 0, "header": 0.02, "weight": 0.5, "last byte": 1}.items()},
    "step": flip_in_the_notes(b'"step": 4', b'"step": 6'),
    "key": flip_in_the_notes(b'"fingerprint"', b'"gingerprint"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_passed_over_for_the_previous_one(reference, copy, damage):
    (run, reference_root), (root, last, previous) = reference, copy
    last.write_bytes(DAMAGE[damage](last.read_bytes()))
    with pytest.warns(UserWarning, match=rf"{re.escape(str(last))} is damaged.*the one before it"):
        resumed = train(root)
    same_result(run, reference_root, resumed, root)
    assert [step_of(p) for p in (last, previous)] == [8, 6]


@pytest.mark.parametrize("damage", ["cut to 0", "cut to -10", "weight"])
def test_two_damaged_checkpoints_are_refused_by_name(copy, damage):
    """The warning names one, the error the other; nothing is trained over them."""
    root, last, previous = copy
    damaged = {path: DAMAGE[damage](path.read_bytes()) for path in (last, previous)}
    for path, data in damaged.items():
        path.write_bytes(data)
    with pytest.warns(UserWarning, match=re.escape(str(last))), pytest.raises(ValueError, match="delete") as error:
        train(root)
    assert str(previous) in str(error.value)
    assert complete(root) == [False] and {path: path.read_bytes() for path in damaged} == damaged
    previous.unlink()
    with pytest.raises(ValueError, match="delete") as error:
        train(root)
    assert str(last) in str(error.value)


def test_without_checkpoints_it_begins_anew(reference, copy):
    """What the message tells to do."""
    (run, reference_root), (root, last, previous) = reference, copy
    last.unlink()
    previous.unlink()
    same_result(run, reference_root, train(root), root)


@pytest.mark.parametrize("finished", [True, False])
def test_without_the_best_model_it_begins_anew(reference, copy, tmp_path, finished):
    """The last state is not the best one: whoever deletes best/ gets it back as it was."""
    (run, reference_root), (root, *_) = reference, copy
    if finished:
        root = tmp_path / "finished"
        shutil.copytree(reference_root, root)
    (best,) = root.glob("checkpoints/*/best")
    shutil.rmtree(best)
    same_result(run, reference_root, train(root), root)


@pytest.mark.parametrize("occasion", [1, 2, 3])
def test_damaged_checkpoint_does_not_replace_the_sound_one(reference, copy, monkeypatch, occasion):
    """A kill while a checkpoint after the damage is put in place must not leave the damaged one alone."""
    (run, reference_root), (root, last, _) = reference, copy
    last.write_bytes(DAMAGE["weight"](last.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"), killed_at_rename(monkeypatch, "last.state", occasion):
        train(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = train(root)
    same_result(run, reference_root, resumed, root)


def test_warning_points_at_the_caller(copy):
    """A warning that is shown at a line of contextlib helps nobody."""
    root, last, _ = copy
    last.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged") as caught:
        train(root)
    assert [Path(w.filename).name for w in caught] == [Path(__file__).name]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The last.state of a run that differs in its seed alone: all shapes are those of ours."""
    root = tmp_path_factory.mktemp("foreign")
    return checkpoint(train(root, config=replace(CONFIG, seed=1)), root) / "last.state"


def test_checkpoint_of_another_run_is_passed_over(reference, copy, foreign):
    (run, reference_root), (root, last, _) = reference, copy
    shutil.copy(foreign, last)
    with pytest.warns(UserWarning, match=f"another run, {mark(config=replace(CONFIG, seed=1))}.*the one before it"):
        resumed = train(root)
    same_result(run, reference_root, resumed, root)


@pytest.mark.parametrize("name", ["last.state", "previous.state"])
def test_checkpoint_of_another_run_alone_is_refused(copy, foreign, name):
    root, last, previous = copy
    last.unlink()
    previous.unlink()
    shutil.copy(foreign, last.with_name(name))
    with pytest.raises(ValueError, match=rf"{name} is of another run, {mark(config=replace(CONFIG, seed=1))}.*{mark()}"):
        train(root)


def test_killed_between_the_two_renames_of_a_checkpoint(reference, tmp_path, monkeypatch):
    """The moment when there is a previous.state and no last.state: no warning, no step lost but the last two."""
    run, root = reference
    with killed_at_rename(monkeypatch, "previous.state", 1, after=True):
        train(tmp_path)
    (folder,) = tmp_path.glob("checkpoints/*")
    assert not (folder / "last.state").exists() and step_of(folder / "previous.state") == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = train(tmp_path)
    same_result(run, root, resumed, tmp_path)


def test_interrupted_before_the_first_validation_returns_the_model_as_it_is(tmp_path, interrupt_at, capsys):
    """Not a third one, freshly drawn: with `start`, that would hand back noise for a trained model. And nothing is promised."""
    start = trained_like(STEADY)
    interrupt_at(1)
    run = train(tmp_path, model=STEADY, config=replace(CONFIG, muon_lr=1e-9, adamw_lr=1e-9), start=start)
    assert len(run.metrics) == 0 and list(run.metrics.columns) == COLUMNS
    assert math.isnan(run.summary["best"]) and run.summary["tokens"] == run.summary["seconds"] == 0
    said = capsys.readouterr().out
    assert "step 0" in said and "if there is one" in said
    for p, q in zip(run.model.parameters(), start.parameters()):
        assert torch.allclose(p.cpu(), q, atol=1e-6)


BEST = {"cut to 0": cut(0), "cut to 100": cut(100), "weight": flip(0.9), "header": flip(0.05), "last byte": flip(1)}


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", BEST)
def test_damaged_best_model_is_refused_by_name(reference, tmp_path, damage, file):
    """A finished run is as protected as a state."""
    root = shutil.copytree(reference[1], tmp_path / "copy")
    (best,) = root.glob("checkpoints/*/best")
    (best / file).write_bytes(BEST[damage]((best / file).read_bytes()))
    for load_it in (lambda: h.load_model(best), lambda: train(root)):
        with pytest.raises(ValueError, match=rf"{re.escape(str(best))}.*LLADA_RETRAIN=1"):
            load_it()


def test_what_damaged_best_says_to_do_helps(reference, tmp_path, monkeypatch):
    run, root = reference[0], shutil.copytree(reference[1], tmp_path / "copy")
    (best,) = root.glob("checkpoints/*/best")
    (best / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("LLADA_RETRAIN", "1")
    same_result(run, reference[1], train(root), root)


def test_a_folder_without_a_model_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}.*pass"):
            h.load_model(folder)


def test_what_killed_processes_left_is_cleared_away(reference, copy):
    """`.last.state.PID` and its like, as long as the model, in all three folders; nothing else that lies there."""
    (run, reference_root), (root, last, _) = reference, copy
    left = [folder / name for name in (".last.state.4711", ".run.json.12") for folder in (last.parent, last.parent / "best")]
    (folder,) = root.glob("runs/*")
    for path in (*left, folder / ".metrics.csv.4711", folder / "my notes.txt"):
        path.write_text("half a file")
    same_result(run, reference_root, train(root), root)
    assert [p.name for p in root.rglob("*") if p.is_file() and p.read_bytes() == b"half a file"] == ["my notes.txt"]


def test_another_setting_in_the_config_is_noticed(copy):
    """The checksum in the model's header is of both files."""
    (config,) = copy[0].glob("checkpoints/*/best/config.json")
    config.write_text(config.read_text().replace("200.0", "100.0"))
    with pytest.raises(ValueError, match=r"checksum.*LLADA_RETRAIN"):
        h.load_model(config.parent)


def test_a_model_saved_by_hub_is_loaded(tmp_path):
    model = trained_like(STEADY)
    model.save_pretrained(tmp_path)
    assert torch.equal(h.load_model(tmp_path).head.weight, model.head.weight)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", None])
def test_damaged_record_is_written_anew(reference, tmp_path, text):
    """And the metrics, if they are gone: the last state has all."""
    run, root = reference[0], shutil.copytree(reference[1], tmp_path / "copy")
    (record,) = root.glob("runs/*/run.json")
    (record if text is not None else record.with_name("metrics.csv")).unlink()
    if text is not None:
        record.write_text(text)
    same_result(run, reference[1], train(root), root)


HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_waits_until_the_first_is_dead(reference, copy):
    """Killed without clean-up, the first leaves no lock behind."""
    (run, reference_root), (root, _, _) = reference, copy
    (folder,) = root.glob("runs/*")
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        second = threading.Thread(target=lambda: made.append(train(root)))
        made = []
        second.start()
        second.join(1)
        assert not made and second.is_alive()
        first.send_signal(signal.SIGKILL)
        second.join(300)
    finally:
        first.kill()
        first.wait()
    same_result(run, reference_root, made[0], root)


@pytest.mark.parametrize("error", [PermissionError, NotImplementedError])
def test_a_finished_run_is_loaded_where_nothing_can_be_locked(reference, monkeypatch, error):
    """A read-only disk, or one without locks."""

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(h.FileLock, "acquire", refuse)
    assert train(reference[1]).summary == reference[0].summary


def test_two_processes_at_the_same_training_end_alike(reference, tmp_path):
    run, root = reference
    code = "import sys, test_training as t; t.train(sys.argv[1])"
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(process.communicate(timeout=300)[1][-2000:], process.returncode)[1] for process in both] == [0, 0]
    same_result(run, root, train(tmp_path), tmp_path)
    assert len(list(tmp_path.glob("runs/*/events.out.tfevents*"))) == 1, "one trained, one waited"


def test_a_compiler_that_fails_is_done_without(reference, tmp_path):
    """A g++ that is there and exits with 1: PyTorch says so, and what is trained is as without it."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    code = "import sys, test_training as t; t.h.train('tiny', t.job_of(), root=sys.argv[1], compiled=True)"
    threads = str(torch.get_num_threads())
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, "CXX": str(compiler), "OMP_NUM_THREADS": threads}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WON'T CONVERT" in done.stderr
    same_result(reference[0], reference[1], train(tmp_path), tmp_path)


def test_a_mac_trains_on_its_gpu_and_hands_out_what_can_do_float64(reference):
    """The rest of the page asks for likelihoods, in float64, which "mps" does not have."""
    _, root = reference
    mac = SimpleNamespace(device=torch.device("mps"), is_main_process=True)
    log = h.TrainingLog("tiny", job_of(), root, mac, quiet=True)
    assert log.complete() and log.run().model.head.weight.device.type == "cpu"


def test_training_needs_no_float64(tmp_path):
    """Slow on GPUs. Validation aside, which is the estimators' own affair."""

    class NoDoubles(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)), function
            return result

    def watched(batch, accelerator):
        with NoDoubles():
            yield from original(batch, accelerator)

    original = h.micro_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h, "micro_batches", watched)
        assert train(tmp_path).summary["complete"]


def test_overfitting_does_not_stop_a_training(tmp_path, monkeypatch):
    """A validation loss far above a blank model's, while the training loss falls: best/ has the model from before."""
    nats, factors = h.Job.validation_nats, iter([1, 5, 50, 500])
    monkeypatch.setattr(h.Job, "validation_nats", lambda *given: nats(*given) * next(factors))
    run = train(tmp_path)
    assert run.summary["complete"] and run.metrics.val_loss.max() > 9 * math.log(10)
    assert run.summary["best"] == run.metrics.val_loss.iloc[0]
    monkeypatch.undo()
    rows = job_of().validation_sequences()
    assert val_loss(run.model, rows) == pytest.approx(run.summary["best"], abs=1e-5)


def test_a_training_loss_above_a_blank_models_stops_it(tmp_path):
    """Once it has had time, after the hundredth step: here targets that change as soon as they are learned."""

    def turning(sequences, generator, learned):
        inputs, targets, weight = h.diffusion_batch(sequences, generator, learned)
        return inputs, torch.full_like(targets, 4 + generator.initial_seed() // 4 % 6), weight

    config = replace(CONFIG, steps=100, evals=4, muon_lr=0.0, adamw_lr=0.1, decay=0.0)
    assert train(tmp_path, config, make_batch=turning).metrics.train_loss.max() > math.log(10)
    with pytest.raises(RuntimeError, match=r"'step': 104\b.*lower.*checkpoint"):
        train(tmp_path, replace(config, steps=104), make_batch=turning)


def mark(**changes):
    return job_of(**changes).fingerprint()


def test_fingerprint_is_stable():
    assert mark() == mark(train_ids=TRAIN_IDS.clone()) == mark(make_batch=h.diffusion_batch) and len(mark()) == 12


CHANGES = {
    "steps": {"config": replace(CONFIG, steps=9)},
    "seed": {"config": replace(CONFIG, seed=1)},
    "rate": {"config": replace(CONFIG, muon_lr=0.021)},
    "accumulation": {"config": replace(CONFIG, accumulation=2)},
    "causal": {"model": replace(MODEL, causal=True)},
    "dropout": {"model": replace(MODEL, dropout=0.2)},
    "rotary base": {"model": replace(MODEL, rotary_base=123.0)},
    "attention scale": {"model": replace(MODEL, attention_scale=1.23)},
    "training data": {"train_ids": torch.cat((TRAIN_IDS[:-1], TRAIN_IDS[-1:] % 6 + 4))},
    "validation data": {"val_ids": VAL_IDS.flip(0)},
    "split point": {"train_ids": torch.cat((TRAIN_IDS, VAL_IDS[:20])), "val_ids": VAL_IDS[20:]},
    "shape of the data": {"train_ids": TRAIN_IDS.view(-1, 8)},
    "batch": {"make_batch": h.next_token_batch},
    "batch with a switch": {"make_batch": ablations.switched(masked_mean, h.diffusion_batch, 2)},
    "batch with another switch": {"make_batch": ablations.switched(masked_mean, h.diffusion_batch, 3)},
    "learned tokens": {"learned": response_tokens},
    "time": {"architecture": TimeConditioned},
    "positions": {"architecture": LearnedPositions},
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_changes_with(change):
    others = [mark(), *(mark(**changed) for name, changed in CHANGES.items() if name != change)]
    assert mark(**CHANGES[change]) not in others, "nor are two changes alike"


def test_fingerprint_changes_with_the_named_version_of_the_code(monkeypatch):
    before = mark(), mark(make_batch=masked_mean)
    monkeypatch.setattr(h, "TRAINING_PATH", h.TRAINING_PATH + "x")
    assert not {*before} & {mark(), mark(make_batch=masked_mean)}


def test_fingerprint_changes_with_the_power_of_the_schedule_where_it_is_used(monkeypatch):
    before = mark(), mark(make_batch=h.next_token_batch), mark(make_batch=ablations.square_times)
    monkeypatch.setattr(h, "POWER", h.POWER + 0.25)
    after = mark(), mark(make_batch=h.next_token_batch), mark(make_batch=ablations.square_times)
    assert [a == b for a, b in zip(before, after)] == [False, True, True]


@pytest.fixture
def a_mac(monkeypatch):
    """A device "mps" that is the CPU."""
    eye = torch.eye
    monkeypatch.setattr(torch, "eye", lambda n, device="cpu", **options: eye(n, **options))


def test_a_macs_gpu_is_used_where_a_step_comes_out_right(a_mac, monkeypatch):
    """As Macs had it once: an optimizer's step that does nothing, and says nothing."""
    assert h.best_device() == "mps"
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    assert h.best_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_device_that_is_there_and_does_not_work_is_done_without(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert h.best_device() == "cpu" and h.mixed_precision() == "no"


# What decides the weights that a training ends with. Runs are known by TRAINING_PATH and by names, not by this code, so
# somebody has to say, whenever it changes, whether runs of before still count.
DECIDES = {
    "llada_helpers": (
        *(h._uniform, h.forward_process, h.stratified_times, h.windows, h.RMSNorm, h._rotate, h.Block, h.Transformer),
        *(h.diffusion_batch, h.next_token_batch, h.real_tokens, h.weighted_nll, h.orthogonalize, h.Muon, h.make_optimizer),
        *(h.learning_rate_factor, h.training_batch, h.micro_batches, h.training_loop, h.train, h.Job.validation_sequences),
        *(h.Job.validation_nats, h.ar_nll, h.token_nll, h.exact_masks, h.nelbo, h.stratified_shares),
    ),
    "beyond": (
        *(masked_mean, ablations.masked_mean_over_t, ablations.exercise_loss),
        *(ablations.uniform_times, ablations.independent_times, ablations.bell_times),
        *(ablations.one_time_per_batch, ablations.square_times, ablations.bell, ablations._bell_times, ablations.switched),
        *(ablations.bell_times_weighted, ablations.AdaptiveNorm, TimeConditioned, ablations.PositionEmbedding, LearnedPositions),
        *(response_tokens, crossover.MaskedInputs, crossover.RandomInputs, exact.decoder_batch),
        *(blocks.block_mask, blocks.BlockDiffusion, blocks.block_masks, blocks.block_batch, blocks.block_nelbo, blocks.BlockJob),
    ),
}
SHA256_OF_TOKENS = {  # of (module, TRAINING_PATH)
    ("llada_helpers", "2"): "3caef89af1cb2f752ce0ab8c5d9da5ea3b9963b464ea5d8aae44f4312f1f0859",
    ("beyond", "2"): "d9e2a47ccf3e0272f6acd9fd8eb7da0bc358bbdda3dc9890fed1a06e8cbd8597",
}


def code_of(thing):
    """The tokens of its source, joined; comments, docstrings and white space aside. The same on every version of Python."""
    kept, beginning = [], True  # of a logical line: a string there is a docstring
    for kind, text, *_ in tokenize.generate_tokens(io.StringIO(textwrap.dedent(inspect.getsource(thing))).readline):
        if kind in (tokenize.COMMENT, tokenize.NL):
            continue
        if not (kind == tokenize.STRING and beginning):
            kept.append(text)
        beginning = kind in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return re.sub(r"\s|(?<={){|(?<=})}", "", "".join(kept))  # doubled braces are one token since Python 3.12, and single


@pytest.mark.parametrize("module", DECIDES)
def test_a_change_of_the_code_that_trains_is_noticed(module):
    sha256 = hashlib.sha256("".join(map(code_of, DECIDES[module])).encode()).hexdigest()
    assert SHA256_OF_TOKENS.get((module, h.TRAINING_PATH)) == sha256, (
        f"code that trains has changed in {module}. If a training now ends with other weights, raise llada_helpers.TRAINING_PATH "
        f'(or, in beyond, rename what has changed). Then renew SHA256_OF_TOKENS: ("{module}", "{h.TRAINING_PATH}"): "{sha256}"'
    )


def test_comments_and_docstrings_and_layout_are_no_code():
    def plain(x):
        return f"{x + 1} a"

    def documented(x):
        """Twice."""
        # A comment.
        return f"{x + 1} a"  # another  # fmt: skip

    def changed(x):
        return f"{x - 1} a"

    codes = [code_of(f).replace(f.__name__, "f") for f in (plain, documented, changed)]
    assert codes == ['deff(x):returnf"{x+1}a"'] * 2 + ['deff(x):returnf"{x-1}a"']


def trained_like(model, seed=0):
    """A Transformer of which no weight is what a fresh one has."""
    generator = torch.Generator().manual_seed(seed)
    start = h.Transformer(model)
    with torch.no_grad():
        for p in start.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return start


def test_fingerprint_changes_with_the_start():
    start, nearly = trained_like(MODEL), trained_like(MODEL)
    with torch.no_grad():
        nearly.head.weight[3, 2] += 1e-4
    marks = [mark(), mark(start=start), mark(start=nearly), mark(start=trained_like(MODEL, seed=1))]
    assert len(set(marks)) == 4 and mark(start=trained_like(MODEL)) == marks[1]


def test_changed_config_goes_to_another_directory(reference, tmp_path):
    run, _ = reference
    other = train(tmp_path, config=h.TrainConfig(steps=8, batch_size=4, evals=4, eval_windows=4, seed=1))
    assert other.path.name != run.path.name and other.path.name.startswith("tiny-")
    assert not torch.equal(other.model.embed.weight, run.model.embed.weight)


def test_infinite_loss_names_the_step_and_keeps_the_good_checkpoint(tmp_path):
    def poisoned(sequences, generator, learned):
        inputs, targets, weight = h.diffusion_batch(sequences, generator, learned)
        calls.append(1)
        return inputs, targets, weight * (math.inf if len(calls) == 5 else 1)

    calls = []
    with pytest.raises(RuntimeError, match=r"'step': 6\b.*checkpoint") as error:
        train(tmp_path, make_batch=poisoned)
    assert "lower" in str(error.value), "it says what to do"
    (path,) = tmp_path.glob("checkpoints/*/last.state")
    tensors, rows = read_state(path)
    assert rows[-1]["step"] == 4 and all(v.isfinite().all() for v in tensors.values())
    assert complete(tmp_path) == [False]


def test_infinite_loss_in_the_last_steps_is_not_complete(tmp_path):
    """All steps were made; the next call goes on from the good checkpoint, and is refused again."""

    def poisoned(sequences, generator, learned):
        inputs, targets, weight = h.diffusion_batch(sequences, generator, learned)
        return inputs, targets, weight * (math.inf if generator.initial_seed() == CONFIG.steps - 1 else 1)

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'step': 8\b"):
            train(tmp_path, make_batch=poisoned)
        assert complete(tmp_path) == [False]
    (path,) = tmp_path.glob("checkpoints/*/last.state")
    assert step_of(path) == 6


EXPLOSIVE = replace(CONFIG, steps=40, evals=20, adamw_lr=30.0, warmup=1.0)


def test_exploding_training_stops(tmp_path):
    """A finite loss far above that of a blank model: nothing more is learned, and the message says where it happened."""
    with pytest.raises(RuntimeError, match="lower") as error:
        train(tmp_path, config=EXPLOSIVE)
    step, rate = re.search(r"'step': (\d+).*'lr': ([\d.]+)", str(error.value)).groups()
    assert float(rate) == pytest.approx(EXPLOSIVE.muon_lr * h.learning_rate_factor(int(step) - 1, EXPLOSIVE))
    (path,) = tmp_path.glob("checkpoints/*/last.state")
    assert str(path.parent) in str(error.value) and 0 < step_of(path) < int(step)
    (folder,) = tmp_path.glob("runs/*")
    assert complete(tmp_path) == [False]
    assert pd.read_csv(folder / "metrics.csv").train_loss.max() < 3 * math.log(10)


def test_exploding_at_the_first_validation_leaves_no_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match=r"'step': 2\b"):
        train(tmp_path, config=replace(EXPLOSIVE, warmup=0.0))
    assert not list(tmp_path.glob("checkpoints/*/*.state"))


@pytest.mark.parametrize("sizes", [{"steps": 0}, {"batch_size": 0}, {"evals": 0}, {"accumulation": 0}, {"eval_windows": 0}])
def test_empty_training_is_refused(tmp_path, sizes):
    with pytest.raises(ValueError, match="pass"):
        train(tmp_path, config=h.TrainConfig(**{"steps": 2, "batch_size": 2, **sizes}))
    assert not list(tmp_path.iterdir())


def test_more_validations_than_steps(tmp_path):
    run = train(tmp_path, config=h.TrainConfig(steps=2, batch_size=2, evals=20, eval_windows=2))
    assert run.metrics.step.tolist()[-1] == 2 and (pd.read_csv(run.path / "metrics.csv").step >= 1).all()


@pytest.mark.parametrize("make_batch", [h.diffusion_batch, h.next_token_batch])
def test_batch_is_a_function_of_seed_and_step_alone(make_batch):
    def batch(seed, step):
        return h.training_batch(job_of(replace(CONFIG, seed=seed), make_batch=make_batch), step)

    first = batch(0, 3)
    torch.manual_seed(99)
    torch.rand(5)
    batch(0, 4)
    for a, b in zip(first, batch(0, 3)):
        assert torch.equal(a, b)
    assert not torch.equal(first[1], batch(0, 4)[1]) and not torch.equal(first[1], batch(1, 3)[1])


def test_dropout_is_a_function_of_seed_and_step_alone(tmp_path, monkeypatch):
    """Another one in every step, the same in every run, whatever was drawn before."""
    nll, seeds = h.weighted_nll, []
    monkeypatch.setattr(h, "weighted_nll", lambda *given: seeds.append(torch.initial_seed()) or nll(*given))
    for root, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(5)
        train(tmp_path / root, config=replace(CONFIG, seed=seed))
    assert seeds[:8] == seeds[8:16] and len(set(seeds)) == 16


def test_batch_rows_are_windows_of_the_text_at_every_offset():
    """Also the very last window is drawn: off-by-one here would never train on the end of the text."""
    job = job_of(model=replace(MODEL, seq_len=5), train_ids=torch.arange(4, 16))
    starts = set()
    for step in range(60):
        _, targets, _ = h.training_batch(job, step)
        for row in targets:
            assert row.tolist() == list(range(int(row[0]), int(row[0]) + 5))
            starts.add(int(row[0]))
    assert starts == set(range(4, 12))


def test_text_shorter_than_a_window_is_padded():
    _, targets, weight = h.training_batch(job_of(model=replace(MODEL, seq_len=4), train_ids=torch.tensor([5, 6])), 0)
    assert targets.tolist() == [[5, 6, 0, 0]] * 4 and (weight[:, 2:] == 0).all()


def test_learning_rate_rises_then_falls_and_is_never_zero():
    config = h.TrainConfig(steps=100, batch_size=1, warmup=0.1, decay=0.4)
    factors = [h.learning_rate_factor(s, config) for s in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and factors[59] == 1
    assert factors[99] == pytest.approx(1 / 40) and all(0 < f <= 1 for f in factors)
    assert factors[60:] == sorted(factors[60:], reverse=True) and factors[80] == pytest.approx(0.5)
    assert h.learning_rate_factor(0, h.TrainConfig(steps=1, batch_size=1)) == 1


def test_orthogonalize_gives_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in [(2, 6, 6), (1, 4, 9), (3, 9, 4)]:
        x = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(h.orthogonalize(x))
        assert float(values.max()) < 1.3 and float(values.median()) > 0.6
        cosine = (h.orthogonalize(x) * x).sum() / h.orthogonalize(x).norm() / x.norm()
        assert cosine > 0.7, "toward the nearest, not any, orthogonal matrix"


@pytest.mark.parametrize("architecture", [h.Transformer, TimeConditioned, LearnedPositions])
def test_every_parameter_is_in_exactly_one_group(architecture):
    """Muon has the blocks' own matrices, whatever else is in them."""
    model = architecture(h.ModelConfig(10, 8, 2, 2, 8))
    groups = h.make_optimizer(model, CONFIG).param_groups
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    matrices = {id(p) for name, p in model.named_parameters() if re.search(r"(qkv|attention_out|mlp_in|mlp_out)\.weight", name)}
    assert {id(p) for g in groups if "parts" in g for p in g["params"]} == matrices and len(matrices) == 8
    assert {(g["lr"], g["peak"]) for g in groups if "parts" in g} == {(CONFIG.muon_lr,) * 2}
    assert {(g["lr"], g["peak"]) for g in groups if "parts" not in g} == {(CONFIG.adamw_lr,) * 2}


def test_muon_is_nesterov_momentum_orthogonalised_matrix_by_matrix():
    """Written out for one matrix at a time, three steps; what is left is torch's own AdamW."""
    config = replace(CONFIG, weight_decay=0.1)
    model = trained_like(replace(STEADY, n_layer=2))
    optimizer, momentum = h.make_optimizer(model, config), {}
    plain = torch.optim.AdamW(
        [model.embed.weight.detach().clone(), model.head.weight.detach().clone()], 3e-3, (0.9, 0.98), weight_decay=0.1
    )
    matrices = {name: p.detach().clone() for name, p in model.blocks.named_parameters()}
    for step in range(3):
        model.zero_grad()
        h.weighted_nll(model, *h.training_batch(job_of(config, STEADY), step)).backward()
        for p, twin in zip((model.embed.weight, model.head.weight), plain.param_groups[0]["params"]):
            twin.grad = p.grad.clone()
        for name, p in model.blocks.named_parameters():
            momentum[name] = 0.95 * momentum.get(name, 0) + 0.05 * p.grad
            nesterov = 0.95 * momentum[name] + 0.05 * p.grad
            parts = [h.orthogonalize(part[None])[0] for part in nesterov.chunk(3 if "qkv" in name else 1)]
            scale = max(1, len(parts[0]) / parts[0].shape[1]) ** 0.5
            matrices[name] = matrices[name] * (1 - config.muon_lr * 0.1) - config.muon_lr * scale * torch.cat(parts)
        optimizer.step()
        plain.step()
    for name, p in model.blocks.named_parameters():
        assert torch.allclose(p, matrices[name], atol=1e-4), name
    for p, twin in zip((model.embed.weight, model.head.weight), plain.param_groups[0]["params"]):
        assert torch.allclose(p, twin, atol=1e-5)


def test_validation_counts_real_tokens_only_and_repeats_itself():
    model = h.Transformer(MODEL).eval()
    rows = h.windows(VAL_IDS, 8)
    assert (rows == 0).any()
    assert val_loss(model, rows) == pytest.approx(math.log(10), abs=1e-5), "uniform: ln V per real token"
    torch.nn.init.normal_(model.head.weight)
    assert val_loss(model, rows) == val_loss(model, rows)


def test_validation_counts_the_response_alone():
    """A uniform model pays ln V for each response token; the exact AR model sees the prompt and is not asked for it."""
    rows = torch.tensor([[4, 5, 6, 2, 7, 8, 3, 0], [9, 2, 5, 3, 0, 0, 0, 0], [4, 4, 4, 4, 4, 4, 2, 3]])
    learned, counts = response_tokens(rows), torch.tensor([3.0, 2.0, 1.0])
    seen = []

    def uniform(ids):
        seen.append(ids)
        return torch.zeros(*ids.shape, 10)

    nats = job_of(learned=response_tokens).validation_nats(uniform, rows)
    assert torch.allclose(nats, counts * math.log(10), atol=1e-4)
    masked = torch.cat(seen)
    where = learned.repeat(len(masked) // len(rows), 1)
    assert torch.equal(masked[~where], rows.repeat(len(masked) // len(rows), 1)[~where]), "the prompt stays visible"
    model = trained_like(replace(STEADY, causal=True)).eval()
    with torch.no_grad():
        logp = model(torch.cat((torch.full((3, 1), h.START_ID), rows[:, :-1]), dim=1)).log_softmax(-1)
    expected = -(logp.gather(2, rows[..., None])[..., 0] * learned).sum(dim=1)
    nats = job_of(model=replace(STEADY, causal=True), learned=response_tokens).validation_nats(model, rows)
    assert torch.allclose(nats, expected, atol=1e-4)


@st.composite
def conversations(draw):
    """Rows: prompt, [START], response, padding; of one length."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6))
    rows = torch.zeros(len(lengths), 9, dtype=torch.long)
    for row, (prompt, response) in zip(rows, lengths):
        size = prompt + 1 + response
        row[:size] = torch.tensor(draw(st.lists(st.integers(4, 9), min_size=size, max_size=size)))
        row[prompt] = h.START_ID
    return rows


@given(conversations(), st.integers(0, 10**6), st.integers(1, 8))
def test_prompt_is_never_masked_and_never_counted(rows, step, batch_size):
    known = {tuple(row) for row in rows.tolist()}
    for make_batch in (h.diffusion_batch, h.next_token_batch):
        config, model = replace(CONFIG, batch_size=batch_size), replace(MODEL, seq_len=9)
        job = job_of(config, model, train_ids=rows, make_batch=make_batch, learned=response_tokens)
        inputs, targets, weight = h.training_batch(job, step)
        assert len(targets) == batch_size and {tuple(row) for row in targets.tolist()} <= known, "rows are taken whole"
        response = response_tokens(targets)
        assert (weight >= 0).all() and (weight[~response] == 0).all() and weight.isfinite().all()
        if make_batch is h.diffusion_batch:
            assert torch.equal(inputs[~response], targets[~response])
            assert torch.equal(weight > 0, inputs == h.MASK_ID)
        else:
            assert (inputs[:, 0] == h.START_ID).all() and torch.equal(inputs[:, 1:], targets[:, :-1])
            assert torch.equal(weight > 0, response)
            assert float(weight.sum()) == pytest.approx(batch_size if response.any() else 0)


def test_every_row_of_the_data_is_drawn():
    rows = torch.arange(4, 4 + 7 * 5).view(7, 5)
    job = job_of(replace(CONFIG, batch_size=3), replace(MODEL, seq_len=5), train_ids=rows)
    drawn = [h.training_batch(job, step)[1] for step in range(40)]
    assert torch.equal(torch.cat(drawn).unique(dim=0), rows)


def responses(n, seed):
    """Prompts of 3 characters, then one of them repeated to the end."""
    first = torch.randint(4, 10, (n, 3), generator=torch.Generator().manual_seed(seed))
    return torch.cat((first, torch.full((n, 1), h.START_ID), first[:, :1].expand(-1, 3), torch.full((n, 1), h.END_ID)), dim=1)


@pytest.mark.parametrize("causal", [False, True])
def test_training_on_rows_learns_the_response(tmp_path, causal):
    """Fine-tuning: below the loss of a model that knows the response's characters but has not read the prompt."""
    config = h.TrainConfig(steps=150, batch_size=32, evals=3, eval_windows=40)
    rows, held_out = responses(60, 0), responses(40, 1)
    model = replace(STEADY, causal=causal, n_embd=32)
    job = {"config": config, "model": model, "train_ids": rows, "val_ids": held_out, "learned": response_tokens}
    run = train(tmp_path, **job)
    assert run.metrics.tokens.iloc[-1] == 150 * 32 * 8
    assert run.summary["best"] < math.log(6) / 4
    assert run.summary["best"] == pytest.approx(val_loss(run.model, held_out, **job), abs=1e-5)


@pytest.mark.parametrize("rows", [TRAIN_IDS[:72].view(9, 8), TRAIN_IDS[:24].view(3, 8)])
def test_validation_rows_are_spread_over_the_data(rows):
    chosen = job_of(val_ids=rows).validation_sequences()
    assert len(chosen) == min(4, len(rows)) and torch.equal(chosen[0], rows[0]) and torch.equal(chosen[-1], rows[-1])
    assert {tuple(r) for r in chosen.tolist()} <= {tuple(r) for r in rows.tolist()}


def test_training_begins_at_the_start(tmp_path):
    start = trained_like(STEADY)
    before = [p.detach().clone() for p in start.parameters()]
    config = h.TrainConfig(steps=1, batch_size=4, evals=1, eval_windows=4, muon_lr=1e-5, adamw_lr=1e-5)
    run, fresh = train(tmp_path, config, STEADY, start=start), train(tmp_path, config, STEADY)
    for p, q, old in zip(run.model.parameters(), start.parameters(), before):
        assert torch.allclose(p.cpu(), q, atol=1e-3) and not torch.equal(p.cpu(), q), "one small step away"
        assert torch.equal(q, old), "the model that was passed is not touched"
    assert run.path != fresh.path
    assert any(not torch.allclose(p, q, atol=0.1) for p, q in zip(run.model.parameters(), fresh.model.parameters()))


def test_interrupted_training_from_a_start_goes_on(tmp_path, interrupt_at, monkeypatch):
    """The start must not be loaded over the checkpoint."""
    whole = train(tmp_path / "whole", start=trained_like(MODEL))
    interrupt_at(5)
    train(tmp_path / "broken", start=trained_like(MODEL))
    monkeypatch.undo()
    same_result(whole, tmp_path / "whole", train(tmp_path / "broken", start=trained_like(MODEL)), tmp_path / "broken")


ADAMW = replace(CONFIG, muon_lr=0.0)
KINDS = {
    "AdamW alone": {"config": ADAMW},
    "learned positions": {"architecture": LearnedPositions},
    "causal attention with the diffusion loss": {"model": replace(MODEL, causal=True), "make_batch": h.diffusion_batch},
    "autoregressive": {"model": replace(MODEL, causal=True)},
    "time conditioning": {"architecture": TimeConditioned},
    "post-norm": {"config": ADAMW, "model": STEADY, "architecture": PostNormEncoder},
    "micro-batches": {"config": replace(CONFIG, accumulation=2)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_is_resumed_saved_and_loaded(tmp_path, interrupt_at, monkeypatch, kind):
    whole = train(tmp_path / "whole", **KINDS[kind])
    job = job_of(**KINDS[kind])
    assert job.batch_function is (h.next_token_batch if kind == "autoregressive" else h.diffusion_batch)
    assert type(whole.model) is job.architecture
    rows = job.validation_sequences()
    assert val_loss(whole.model, rows, **KINDS[kind]) == pytest.approx(whole.summary["best"], abs=1e-5)
    interrupt_at(5)
    train(tmp_path / "broken", **KINDS[kind])
    monkeypatch.undo()
    same_result(whole, tmp_path / "whole", train(tmp_path / "broken", **KINDS[kind]), tmp_path / "broken")
    again = train(tmp_path / "whole", **KINDS[kind])
    assert again.summary == whole.summary and again.model.config == whole.model.config
    with torch.no_grad():
        rows = rows.to(next(again.model.parameters()).device)
        assert torch.equal(again.model(rows), whole.model(rows))


@pytest.mark.parametrize("kind", ["learned positions", "causal attention with the diffusion loss", "post-norm", "AdamW alone"])
def test_every_kind_of_training_learns(tmp_path, kind):
    ids = torch.full((100,), 5)
    change = {**KINDS[kind], "config": replace(KINDS[kind].get("config", CONFIG), steps=60, evals=2, adamw_lr=0.03)}
    assert train(tmp_path, **change, train_ids=ids, val_ids=ids[:30]).metrics.val_loss.iloc[-1] < 0.5


@pytest.mark.parametrize("architecture", [h.Transformer, TimeConditioned, LearnedPositions, PostNormEncoder])
def test_without_muon_there_is_adamw_for_everything(architecture):
    model = architecture(MODEL)
    (group,) = h.make_optimizer(model, ADAMW).param_groups
    assert "parts" not in group and {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}


PADDED = h.windows(TRAIN_IDS[:150], 8).masked_fill(torch.arange(8) >= torch.arange(1, 20)[:, None], h.PAD_ID)  # 1, 2, ... real
SHARED = {
    "llada": job_of(model=STEADY),
    "ar": job_of(model=replace(STEADY, causal=True), train_ids=PADDED, config=replace(CONFIG, accumulation=2, batch_size=8)),
}


def same_up_to_rounding(a, b):
    for column in ("step", "tokens", "train_loss", "val_loss", "lr", "grad_norm"):
        assert a.metrics[column].tolist() == pytest.approx(b.metrics[column].tolist(), rel=1e-4, abs=1e-5), column
    assert a.summary["best"] == pytest.approx(b.summary["best"], abs=1e-5)
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert torch.allclose(p, q, atol=1e-4)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    return {name: h.train(name, job, root=root) for name, job in SHARED.items()}


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_micro_batches_change_nothing(one_process, tmp_path, accumulation):
    """Rows with unlike numbers of real tokens: the mean is over the whole batch, not one of the micro-batches' means."""
    config = replace(SHARED["ar"].train, accumulation=accumulation)
    same_up_to_rounding(train(tmp_path, config, SHARED["ar"].model, train_ids=PADDED), one_process["ar"])


def test_training_tells_the_model_of_padding(tmp_path, monkeypatch):
    told, forward = [], h.Transformer.forward

    def watched(self, ids, *rest):
        told.extend([(self.padding, bool((ids == h.PAD_ID).any()))] * self.training)
        return forward(self, ids, *rest)

    monkeypatch.setattr(h.Transformer, "forward", watched)
    train(tmp_path, SHARED["ar"].train, SHARED["ar"].model, train_ids=PADDED)
    assert (True, True) in told and all(said is not False for said, there in told if there)


def test_an_interrupted_model_looks_for_padding_itself(tmp_path, interrupt_at):
    interrupt_at(1)
    model = train(tmp_path, model=STEADY, start=trained_like(STEADY)).model.cpu()
    with torch.no_grad():
        padded = model(torch.tensor([[4, 5, 6, 0, 0, 0, 0, 0]]))[:, :3]
        assert torch.allclose(padded, model(torch.tensor([[4, 5, 6]])), atol=1e-4)


@pytest.mark.parametrize("accumulation", [3, 8])
def test_uneven_micro_batches_are_refused(tmp_path, accumulation):
    with pytest.raises(ValueError, match=rf"batch_size=4.*{accumulation} micro-batches"):
        train(tmp_path, replace(CONFIG, accumulation=accumulation))
    assert not list(tmp_path.iterdir())


TOGETHER = """
import json, os, pathlib, sys
import llada_helpers as h, test_training as t
root = pathlib.Path(sys.argv[1])
said = {}
for name, job in t.SHARED.items():
    run = h.train(name, job, root=root)
    said[name] = run.summary | {"rows": len(run.metrics), "head": run.model.head.weight.sum().item()}
try:
    t.train(root / "refused", t.replace(t.CONFIG, batch_size=5), t.STEADY)
except ValueError as error:
    said["refused"] = str(error)
(root / f"rank{os.environ['RANK']}.json").write_text(json.dumps(said))
"""


def launched(root, processes):
    """Both trainings of SHARED by so many processes over gloo, on the CPU, since there may be fewer GPUs; what each says."""
    (root / "script.py").write_text(TOGETHER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = subprocess.Popen(
        [*launch, str(root / "script.py"), str(root)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, errors = launcher.communicate(timeout=240)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, errors.decode()[-3000:]
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The root of what two processes trained, what each of them says, and the root of what one trained in the same way."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("alone")
    said = launched(two, 2)
    launched(one, 1)
    return two, said, one


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_train_what_one_does(two_processes, monkeypatch, name):
    """One batch, shared; one directory; and one process takes the result for its own."""
    root, _, alone = two_processes
    (folder,) = root.glob(f"runs/{name}-*")
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    assert len(list(folder.glob("events.out.tfevents*"))) == 1, "one process writes"
    monkeypatch.setattr(h, "tqdm", None)
    run, one = (h.train(name, SHARED[name], root=trained) for trained in (root, alone))
    assert run.path == folder
    same_up_to_rounding(run, one)
    states = [next(trained.glob(f"checkpoints/{name}-*/last.state")) for trained in (root, alone)]
    (tensors, rows), (tensors_alone, rows_alone) = map(read_state, states)
    assert tensors.keys() == tensors_alone.keys() and len(rows) == len(rows_alone) and rows[-1]["step"] == 8
    assert all(torch.allclose(tensors[k], tensors_alone[k], atol=1e-4) for k in tensors)


def test_two_processes_are_told_the_same(two_processes):
    """Every process gets the best model, the metrics and their summary."""
    _, (first, second), _ = two_processes
    for name in SHARED:
        assert first[name] == {**second[name], "seconds": first[name]["seconds"]}
        assert abs(first[name]["seconds"] - second[name]["seconds"]) < 5 and first[name]["rows"] == 4


def test_batch_that_two_processes_cannot_share_is_refused(two_processes):
    root, said, _ = two_processes
    assert all("batch_size=5" in s["refused"] and "2 processes" in s["refused"] for s in said)
    assert not (root / "refused").exists()


def loop(monkeypatch, job, scaler=None):
    """Three steps of the loop itself under a loss scale; the gradient norms and the parameters at the end."""
    torch.manual_seed(0)
    accelerator, norms = h.Accelerator(cpu=not torch.cuda.is_available()), []
    accelerator.scaler = scaler
    model = h.Transformer(job.model)
    network, optimizer = accelerator.prepare(model, h.make_optimizer(model, job.train))
    log = SimpleNamespace(steps_left=lambda: range(3), note=lambda *_: None, eval_steps={1, 2, 3}, validate=norms.append)
    with monkeypatch.context() as patch:
        if scaler:
            patch.setattr(accelerator, "native_amp", True)
            patch.setattr(h.Accelerator, "mixed_precision", "fp16")
        h.training_loop(network, optimizer, job, accelerator, log)
    return [float(norm) for norm in norms], [p.detach().cpu().clone() for p in model.parameters()], optimizer


@pytest.mark.parametrize("config", [CONFIG, ADAMW], ids=["Muon and AdamW", "AdamW alone"])
def test_one_loss_scale_for_muon_and_adamw(monkeypatch, config):
    """fp16 scales the loss; the scale must be taken out of all gradients exactly once, before they are clipped."""
    job = job_of(config, STEADY)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2)
    norms, plain, _ = loop(monkeypatch, job)
    norms_scaled, scaled, optimizer = loop(monkeypatch, job, scaler)
    assert scaler.get_scale() == 2.0**11, "it was updated once a step"
    assert norms == pytest.approx(norms_scaled, rel=1e-5) and not optimizer.step_was_skipped
    for p, q in zip(plain, scaled):
        assert torch.allclose(p, q, atol=1e-6)


def test_an_overflow_skips_the_step_and_lowers_the_scale(monkeypatch):
    """Neither Muon's part nor AdamW's moves."""

    def infinite(sequences, generator, learned):
        inputs, targets, weight = h.diffusion_batch(sequences, generator, learned)
        return inputs, targets, weight * math.inf

    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    _, after, optimizer = loop(monkeypatch, job_of(model=STEADY, make_batch=infinite), scaler)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(h.Transformer(STEADY).parameters(), after))
    assert optimizer.step_was_skipped and scaler.get_scale() == 2.0**7


@pytest.fixture
def scaled(monkeypatch):
    """Calls of `train` under a loss scale, as on a GPU without bfloat16, and the accelerators that they had."""
    made = []

    def with_scaler(*given, **options):
        accelerator = accelerate(*given, **options)
        accelerator.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=3)
        made.append(accelerator)
        return accelerator

    def call(*given, **options):
        with monkeypatch.context() as patch:
            patch.setattr(h, "Accelerator", with_scaler)
            return train(*given, **options)

    accelerate = h.Accelerator
    return call, made


def test_a_resumed_loss_scale_is_where_it_was(scaled, tmp_path, monkeypatch):
    """What a GPU without bfloat16 needs to go on exactly."""
    scaled_train, made = scaled
    with monkeypatch.context() as patch:
        interrupt_in(patch, 6)
        scaled_train(tmp_path, model=STEADY)
    scaled_train(tmp_path, model=STEADY)
    scaled_train(tmp_path / "whole", model=STEADY)
    scales = [accelerator.scaler.state_dict() for accelerator in made]
    assert scales[1] == scales[2] != scales[0]


@pytest.mark.parametrize("first", ["with", "without"])
def test_a_state_is_resumed_where_precision_is_another(scaled, tmp_path, monkeypatch, first):
    """From a T4 to a CPU and back: the state has a loss scale that is of no use, or lacks one. It goes on, and says so."""
    kinds = [scaled[0], train] if first == "with" else [train, scaled[0]]
    with monkeypatch.context() as patch:
        interrupt_in(patch, 6)
        kinds[0](tmp_path, model=STEADY)
    with pytest.warns(UserWarning, match="precision, unlike before"):
        run = kinds[1](tmp_path, model=STEADY)
    assert run.summary["complete"] and run.metrics.step.tolist() == [2, 4, 6, 8]
