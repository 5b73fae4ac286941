"""One training step: no operation in it waits for the device, and there are few of them."""

import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llada_helpers as h

VOCABULARY = 69
SHAPE = h.PRESETS["gpu"].model(VOCABULARY, causal=False)
TINY = h.ModelConfig(10, 8, n_layer=2, n_head=2, n_embd=8, dropout=0.1)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")


class Operations(TorchDispatchMode):
    """Counts what is launched, views aside; refuses what a GPU would have to be waited for, and other devices than `only`."""

    def __init__(self, only=None):
        super().__init__()
        self.count, self.only = Counter(), only

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        given = tree_leaves((args, kwargs))
        assert name not in WAITS, f"{name} reads a value back"
        indices = [i for i in args[1] if i is not None] if name.startswith("index") and isinstance(args[1], (list, tuple)) else []
        assert not any(i.dtype == torch.bool for i in indices), f"{name} by booleans has to know how many are true"
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in (*given, *tree_leaves(result)) if isinstance(x, torch.Tensor) and x.ndim]
        assert not self.only or {x.device.type for x in tensors} <= {self.only}, f"{name} mixes devices"
        if function.namespace == "aten" and not function.is_view and name not in ("_unsafe_view", "detach", "lift_fresh"):
            self.count[name] += 1
        return result


def step(shape, config, precision="no", device="cpu", rows=2, **job):
    """The operations of the training loop's second step, from the moment when its batch has arrived."""
    counted = []

    def watched(batch, accelerator):
        here = [tuple(x.to(device) for x in part) for part in original(batch, accelerator)]
        with Operations(device) as operations:
            yield from here
        counted.append(operations.count)

    original = h.micro_batches
    ids = torch.randint(4, shape.vocab_size, (2 * shape.seq_len,), generator=torch.Generator().manual_seed(0))
    job = h.Job(shape, replace(config, batch_size=rows, steps=4), ids, ids, **job)
    accelerator = h.Accelerator(cpu=True, mixed_precision=precision)
    model = job.architecture(shape).to(device)
    optimizer = h.make_optimizer(model, job.train)
    network, optimizer = accelerator.prepare(model, optimizer, device_placement=[False, False])
    log = h.TrainingLog.__new__(h.TrainingLog)
    log.__dict__ |= {"noted": [], "eval_steps": (), "steps_left": lambda: range(2)}
    model.register_forward_hook(lambda _, ids, logits: setattr(log, "logits", logits.detach()))
    with mock.patch.object(h, "micro_batches", watched):
        h.training_loop(network, optimizer, job, accelerator, log)
    return counted[-1]


@pytest.fixture
def fresh_accelerator():
    """Precision is a thing of the process: leave none behind."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("word", ["item", "nonzero", "index", "mask"])
def test_the_watchman_sees(word):
    x, some = torch.arange(4.0), torch.tensor([True, False, True, True])
    guilty = {
        "item": lambda: float(x.sum()),
        "nonzero": lambda: torch.nonzero(some),
        "index": lambda: x[some],
        "mask": lambda: x.masked_select(some),
    }
    with pytest.raises(AssertionError), Operations():
        guilty[word]()


def test_the_watchman_sees_other_devices():
    with pytest.raises(AssertionError, match="mixes"), Operations("meta"):
        torch.ones(3, device="cpu") + 1


@pytest.mark.parametrize("config", [h.TrainConfig(4, 2), h.TrainConfig(4, 2, muon_lr=0.0)], ids=["Muon", "AdamW"])
@pytest.mark.parametrize("causal", [False, True], ids=["LLaDA", "AR"])
def test_no_operation_of_a_step_waits_or_mixes_devices(fresh_accelerator, causal, config):
    """On "meta" there are no values to read: what asks for one, and what mixes it with the CPU, fails, as it would on a GPU.

    PyTorch's own AdamW, one kernel, knows no such device.
    """
    with mock.patch.object(torch.optim.AdamW, "step", lambda self: None):
        step(replace(TINY, causal=causal), config, device="meta")


def test_an_eager_step_has_few_kernels(fresh_accelerator):
    """Of the `gpu` preset, under autocast to bfloat16, counted on the CPU: 1,236 there were."""
    count = step(SHAPE, h.PRESETS["gpu"].llada, "bf16")
    assert 400 < sum(count.values()) <= 700, count


KERNEL = re.compile(r"(?!assert|#).*(extern_kernels\.\w+\(|cpp_fused\w*\(|torch\.ops\.aten\.\w+)")


def compiled_kernels(block, shape):
    """Calls of kernels in the code that Inductor writes for a block, forward and backward; no C++ compiler is needed."""
    written = []

    def write_only(graph):
        written.append(graph.codegen()[0].value)
        return SimpleNamespace(call=lambda inputs: None)

    model, x = h.Transformer(shape), torch.randn(1, shape.seq_len, shape.n_embd, requires_grad=True)
    with (
        mock.patch.object(GraphLowering, "compile_to_module", write_only),
        inductor_config.patch(force_disable_caches=True),
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        torch.autocast("cpu", torch.bfloat16),
    ):
        torch.compile(block)(x, model.cos, model.sin)
    torch._dynamo.reset()
    assert len(written) == 2, "one graph forward, one backward: nothing breaks it"
    lines = [line.strip() for code in written for line in code[code.index("def call") :].split("\n")]
    return sum(bool(KERNEL.match(line)) for line in lines)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_has_few_kernels(fresh_accelerator):
    """What is outside the blocks is as in the eager step; of the blocks it is what Inductor writes for a CPU.

    There a fused kernel may hold several loops, that for a GPU would be one kernel each: the casts of weights to bfloat16.
    """
    one, two = (sum(step(replace(SHAPE, n_layer=n), h.PRESETS["gpu"].llada, "bf16").values()) for n in (1, 2))
    block = compiled_kernels(h.Block(SHAPE), SHAPE)
    assert 15 < block < (two - one) / 2
    assert one - (two - one) + SHAPE.n_layer * block <= 300
