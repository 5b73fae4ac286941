"""Section 5: a run is complete, resumed exactly, or refused; never half of each."""

import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open

import llada_helpers as h

MODEL = h.ModelConfig(vocab_size=10, seq_len=8, n_layer=1, n_head=2, n_embd=8, dropout=0.1)
CONFIG = h.TrainConfig(steps=8, batch_size=4, evals=4, eval_windows=4)
TRAIN_IDS = torch.randint(4, 10, (200,), generator=torch.Generator().manual_seed(0))
VAL_IDS = torch.randint(4, 10, (60,), generator=torch.Generator().manual_seed(1))  # its last window is padded


def train(root, config=CONFIG, model=MODEL, **more):
    return h.train("tiny", model, config, TRAIN_IDS, VAL_IDS, root=root, **more)


def checkpoint(run, root):
    return Path(root) / "checkpoints" / run.path.name


def read_state(path):
    """Tensors and notes of a last.safetensors, without the helper's own reader."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["meta"])  # noqa: SIM118


def last_state(run, root):
    return read_state(checkpoint(run, root) / "last.safetensors")


def same_result(a, root_a, b, root_b):
    """Bit for bit: weights, optimizers, metrics (seconds apart), best model."""
    (tensors_a, meta_a), (tensors_b, meta_b) = last_state(a, root_a), last_state(b, root_b)
    assert tensors_a.keys() == tensors_b.keys()
    for key in tensors_a:
        assert torch.equal(tensors_a[key], tensors_b[key]), key
    drop = ["seconds"]
    pd.testing.assert_frame_equal(a.metrics.drop(columns=drop), b.metrics.drop(columns=drop))
    assert {k: v for k, v in a.summary.items() if k != "seconds"} == {k: v for k, v in b.summary.items() if k != "seconds"}
    assert meta_a["step"] == meta_b["step"] and meta_a["best"] == meta_b["best"]
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert torch.equal(p, q)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    root = tmp_path_factory.mktemp("reference")
    return train(root), root


@pytest.fixture
def interrupt_at(monkeypatch):
    """Ctrl-C in the middle of training step `step`."""

    def install(step):
        class Bar(h.tqdm):
            def update(self, n=1):
                super().update(n)
                if self.n == step:
                    raise KeyboardInterrupt

        monkeypatch.setattr(h, "tqdm", Bar)

    return install


@pytest.mark.parametrize("causal", [False, True])
def test_training_learns_and_leaves_its_record(tmp_path, causal):
    """Text of one repeated character is learned at once; every file that the docstring names is there."""
    ids = torch.full((100,), 5)
    config = h.TrainConfig(steps=30, batch_size=4, evals=3, eval_windows=4, adamw_lr=0.05)
    model = h.ModelConfig(10, 8, 1, 2, 8, causal=causal)
    run = h.train("learn", model, config, ids, ids[:30], root=tmp_path)
    assert run.metrics.val_loss.iloc[-1] < 0.5 < run.metrics.train_loss.iloc[0]
    assert list(run.metrics.columns) == ["step", "tokens", "seconds", "train_loss", "val_loss", "lr", "grad_norm"]
    assert run.metrics.step.tolist() == [10, 20, 30]
    assert run.metrics.tokens.tolist() == [10 * 32, 20 * 32, 30 * 32]
    on_disk = pd.read_csv(run.path / "metrics.csv")
    pd.testing.assert_frame_equal(on_disk, run.metrics)
    record = json.loads((run.path / "run.json").read_text())
    assert record["model"]["causal"] is causal and record["train"]["steps"] == 30
    assert {"device", "torch", "python", "data_sha256", "fingerprint"} <= record.keys()
    assert list(run.path.glob("events.out.tfevents*"))
    folder = tmp_path / "checkpoints" / run.path.name
    assert {p.name for p in (folder / "best").iterdir()} >= {"config.json", "model.safetensors"}
    assert sorted(p.name for p in folder.iterdir()) == ["best", "last.safetensors"], "no temporary file is left"
    assert json.loads((run.path / "final.json").read_text()) == run.summary
    assert run.path.parent == tmp_path / "runs" and not run.model.training


def test_best_model_is_the_one_returned(tmp_path):
    """With a learning rate that wrecks the model late, the best validation loss is not the last."""
    run = train(tmp_path)
    windows = h.windows(VAL_IDS, MODEL.seq_len)
    spread = torch.linspace(0, len(windows) - 1, 4).long()
    assert h.validation_loss(run.model, windows[spread]) == pytest.approx(run.summary["best"], abs=1e-6)
    assert run.summary["best"] == run.metrics.val_loss.min()


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


def test_retrain_forces(reference, monkeypatch):
    run, root = reference
    bars = []

    class Bar(h.tqdm):
        def __init__(self, *args, **kwargs):
            bars.append(kwargs["initial"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(h, "tqdm", Bar)
    monkeypatch.setenv("LLADA_RETRAIN", "1")
    again = train(root)
    assert bars == [0], "from the first step"
    same_result(run, root, again, root)


@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_interrupted_and_resumed_equals_uninterrupted(reference, tmp_path, interrupt_at, monkeypatch, step):
    run, root = reference
    with monkeypatch.context() as patch:
        patch.setattr(h, "tqdm", h.tqdm)  # restored at the end of the block
        interrupt_at(step)
        broken = train(tmp_path)
    assert not (broken.path / "final.json").exists(), "an interrupted run must not look complete"
    assert len(broken.metrics) == (step - 1) // 2
    monkeypatch.undo()
    resumed = train(tmp_path)
    same_result(run, root, resumed, tmp_path)
    assert (pd.read_csv(resumed.path / "metrics.csv").step == run.metrics.step).all()


def test_interrupted_during_validation(reference, tmp_path, patch_like, monkeypatch):
    run, root = reference
    calls = []

    def third_call_is_interrupted(original):
        def wrapped(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return wrapped

    patch_like(h, "validation_loss", third_call_is_interrupted)
    broken = train(tmp_path)
    assert len(broken.metrics) == 2 and broken.path.name == run.path.name
    monkeypatch.undo()
    same_result(run, root, train(tmp_path), tmp_path)


FILES = ["config.json", "model.safetensors", "last.safetensors", "metrics.csv"]


@pytest.mark.parametrize("file, occasion", [*((f, n) for f in FILES for n in (1, 4)), ("final.json", 1)])
def test_killed_just_before_a_file_appears(reference, tmp_path, monkeypatch, file, occasion):
    """Death (no clean-up) at each rename: the next call still ends where the uninterrupted run does, metrics.csv included."""
    run, root = reference
    seen = []

    class Killed(BaseException):
        pass

    replace = os.replace

    def deadly(source, target):
        if Path(target).name == file:
            seen.append(target)
            if len(seen) == occasion:
                raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(h.os, "replace", deadly)
        with pytest.raises(Killed):
            train(tmp_path)
    resumed = train(tmp_path)
    same_result(run, root, resumed, tmp_path)
    assert pd.read_csv(resumed.path / "metrics.csv").step.tolist() == run.metrics.step.tolist()
    again = train(tmp_path)
    assert again.metrics.step.tolist() == run.metrics.step.tolist()


def test_killed_while_the_checkpoint_is_being_written(reference, tmp_path, monkeypatch):
    """Half a file under its final name would be refused by the next call; the last whole checkpoint must survive."""
    run, root = reference
    seen = []

    class Killed(BaseException):
        pass

    save_file = h.save_file

    def half(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        seen.append(path)
        if len(seen) == 3:
            Path(path).write_bytes(Path(path).read_bytes()[:500])
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(h, "save_file", half)
        with pytest.raises(Killed):
            train(tmp_path)
    same_result(run, root, train(tmp_path), tmp_path)


def test_interrupted_retraining_is_not_taken_for_complete(reference, tmp_path, interrupt_at, monkeypatch):
    """LLADA_RETRAIN=1, interrupted after a checkpoint: the old final.json must not vouch for the new half-trained weights."""
    run, root = reference
    train(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(h, "tqdm", h.tqdm)
        patch.setenv("LLADA_RETRAIN", "1")
        interrupt_at(4)
        train(tmp_path)
    monkeypatch.undo()
    assert not os.environ.get("LLADA_RETRAIN")
    same_result(run, root, train(tmp_path), tmp_path)


KILLED = h.TrainConfig(steps=120, batch_size=4, evals=60, eval_windows=1)
SCRIPT = """
import torch, llada_helpers as h, test_training as t
t.train({root!r}, config=t.KILLED)
"""


def test_sigkill_at_random_moments_then_resume(tmp_path):
    """kill -9 between or within steps, checkpoints and renames, twice; then the bits are those of a run never killed."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(Path(h.__file__).resolve().parent), str(here)])
    moments = random.Random(0)
    folder = tmp_path / "killed"
    script = SCRIPT.format(root=str(folder))
    step = 0
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and child.poll() is None:
                found = list(folder.glob("checkpoints/*/last.safetensors"))
                if found and read_state(found[0])[1]["step"] > step:
                    break
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
            _, errors = child.communicate()
        finally:
            child.kill()
        assert child.returncode == -signal.SIGKILL, errors.decode()[-2000:]
        step = read_state(next(iter(folder.glob("checkpoints/*/last.safetensors"))))[1]["step"]
    assert 0 < step < KILLED.steps and not list(folder.glob("runs/*/final.json"))
    resumed, whole = train(folder, config=KILLED), train(tmp_path / "whole", config=KILLED)
    same_result(whole, tmp_path / "whole", resumed, folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -10])
def test_damaged_checkpoint_is_refused_by_name(tmp_path, interrupt_at, monkeypatch, keep):
    interrupt_at(5)
    broken = train(tmp_path)
    monkeypatch.undo()
    path = checkpoint(broken, tmp_path) / "last.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"last\.safetensors") as error:
        train(tmp_path)
    assert str(path) in str(error.value) and "delete" in str(error.value)


def mark(model=MODEL, config=CONFIG, train_ids=TRAIN_IDS, val_ids=VAL_IDS, make_batch=h.diffusion_batch, module=h):
    return module.fingerprint(model, config, train_ids, val_ids, make_batch)


def test_fingerprint_is_stable():
    assert mark() == mark(train_ids=TRAIN_IDS.clone()) and len(mark()) == 12


@pytest.mark.parametrize(
    "change",
    [
        {"config": h.TrainConfig(steps=9, batch_size=4, evals=4, eval_windows=4)},
        {"config": h.TrainConfig(steps=8, batch_size=4, evals=4, eval_windows=4, seed=1)},
        {"config": h.TrainConfig(steps=8, batch_size=4, evals=4, eval_windows=4, muon_lr=0.021)},
        {"model": h.ModelConfig(10, 8, 1, 2, 8, dropout=0.1, causal=True)},
        {"model": h.ModelConfig(10, 8, 1, 2, 8, dropout=0.2)},
        {"train_ids": torch.cat((TRAIN_IDS[:-1], TRAIN_IDS[-1:] % 6 + 4))},
        {"val_ids": VAL_IDS.flip(0)},
        {"make_batch": h.next_token_batch},
        {"train_ids": torch.cat((TRAIN_IDS, VAL_IDS[:20])), "val_ids": VAL_IDS[20:]},
    ],
    ids=["steps", "seed", "rate", "causal", "dropout", "training data", "validation data", "batch", "split point"],
)
def test_fingerprint_changes_with(change):
    assert mark(**change) != mark()


@pytest.mark.parametrize(
    "old, new",
    [
        (r"< t\[:, None\]\) & maskable", "<= t[:, None]) & maskable"),
        (r"b, c = 3\.4445", "b, c = 3.4444"),
        (r"(?m)^ROTARY_BASE = .*$", "ROTARY_BASE = 123.0"),
        (r"(?m)^ATTENTION_SCALE = .*$", "ATTENTION_SCALE = 1.23"),
        (r"\(a \* cos \+ b \* sin,", "(a * cos - b * sin,"),
    ],
    ids=["forward process", "Muon", "rotary base", "attention scale", "rotation"],
)
def test_fingerprint_changes_with_the_code_of_the_training_path(tmp_path, old, new):
    """Else a run trained by other code would be loaded as if it were this code's."""
    edited_source, count = re.subn(old, new, Path(h.__file__).read_text())
    assert count == 1, "the line that this test edits has changed"
    (tmp_path / "edited.py").write_text(edited_source)
    spec = importlib.util.spec_from_file_location("edited_helpers", tmp_path / "edited.py")
    sys.modules["edited_helpers"] = edited = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(edited)
        model, config = edited.ModelConfig(10, 8, 1, 2, 8, dropout=0.1), edited.TrainConfig(8, 4, evals=4, eval_windows=4)
        assert mark(model, config, make_batch=edited.diffusion_batch, module=edited) != mark()
    finally:
        del sys.modules["edited_helpers"]


def test_changed_config_goes_to_another_directory(reference, tmp_path):
    run, _ = reference
    other = train(tmp_path, config=h.TrainConfig(steps=8, batch_size=4, evals=4, eval_windows=4, seed=1))
    assert other.path.name != run.path.name and other.path.name.startswith("tiny-")
    assert not torch.equal(other.model.embed.weight, run.model.embed.weight)


def test_infinite_loss_names_the_step_and_keeps_the_good_checkpoint(tmp_path):
    def poisoned(sequences, generator=None):
        inputs, targets, weight = h.diffusion_batch(sequences, generator)
        calls.append(1)
        return inputs, targets, weight * (math.inf if len(calls) == 5 else 1)

    calls = []
    with pytest.raises(RuntimeError, match=r"step 6\b.*last\.safetensors") as error:
        train(tmp_path, make_batch=poisoned)
    assert "lower" in str(error.value), "it says what to do"
    (path,) = tmp_path.glob("checkpoints/*/last.safetensors")
    tensors, meta = read_state(path)
    assert meta["step"] == 4 and all(v.isfinite().all() for v in tensors.values())
    assert not list(tmp_path.glob("runs/*/final.json"))


@pytest.mark.parametrize("sizes", [{"steps": 0}, {"batch_size": 0}, {"evals": 0}])
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
        return h.training_batch(TRAIN_IDS, 8, 4, seed, step, make_batch)

    first = batch(0, 3)
    torch.manual_seed(99)
    torch.rand(5)
    batch(0, 4)
    for a, b in zip(first, batch(0, 3)):
        assert torch.equal(a, b)
    assert not torch.equal(first[1], batch(0, 4)[1]) and not torch.equal(first[1], batch(1, 3)[1])


def test_batch_rows_are_windows_of_the_text_at_every_offset():
    """Also the very last window is drawn: off-by-one here would never train on the end of the text."""
    ids = torch.arange(4, 16)
    starts = set()
    for step in range(60):
        _, targets, _ = h.training_batch(ids, 5, 4, 0, step, h.diffusion_batch)
        for row in targets:
            assert row.tolist() == list(range(int(row[0]), int(row[0]) + 5))
            starts.add(int(row[0]))
    assert starts == set(range(4, 12))


def test_text_shorter_than_a_window_is_padded():
    _, targets, weight = h.training_batch(torch.tensor([5, 6]), 4, 3, 0, 0, h.diffusion_batch)
    assert targets.tolist() == [[5, 6, 0, 0]] * 3 and (weight[:, 2:] == 0).all()


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


def test_every_parameter_is_in_exactly_one_optimizer():
    model = h.Transformer(h.ModelConfig(10, 8, 2, 2, 8, time_conditioning=True))
    held = [id(p) for o in h.make_optimizers(model, CONFIG) for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_validation_counts_real_tokens_only_and_repeats_itself():
    model = h.Transformer(MODEL).eval()
    rows = h.windows(VAL_IDS, 8)
    assert (rows == 0).any()
    assert h.validation_loss(model, rows) == pytest.approx(math.log(10), abs=1e-5), "uniform: ln V per real token"
    torch.nn.init.normal_(model.head.weight)
    assert h.validation_loss(model, rows) == h.validation_loss(model, rows)


class OneProcess:
    """What `optimizer_step` needs of an Accelerator, with or without loss scaling."""

    num_processes, process_index, device = 1, 0, torch.device("cpu")

    def __init__(self, scaler=None):
        self.scaler = scaler

    def backward(self, loss):
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def reduce(self, value, _):
        return value


def test_both_optimizers_step_under_one_loss_scale():
    """fp16 scales the loss; the scale must be taken out of both optimizers' gradients exactly once, and updated once."""
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        torch.manual_seed(0)
        model = h.Transformer(h.ModelConfig(10, 8, 1, 2, 8))
        optimizers, norms = h.make_optimizers(model, CONFIG), []
        for step in range(3):
            batch = h.training_batch(TRAIN_IDS, 8, 4, 0, step, h.diffusion_batch)
            norms.append(float(h.optimizer_step(OneProcess(scaler), model, optimizers, batch, CONFIG)[1]))
        ends.append((norms, [p.detach().clone() for p in model.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    for plain, scaled in zip(ends[0][1], ends[1][1]):
        assert torch.allclose(plain, scaled, atol=1e-6)


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = h.Transformer(h.ModelConfig(10, 8, 1, 2, 8))
    before = [p.detach().clone() for p in model.parameters()]
    inputs, targets, weight = h.training_batch(TRAIN_IDS, 8, 4, 0, 0, h.diffusion_batch)
    batch = inputs, targets, weight * math.inf
    h.optimizer_step(OneProcess(scaler), model, h.make_optimizers(model, CONFIG), batch, CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and scaler.get_scale() < 2.0**10
