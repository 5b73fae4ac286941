"""Mask predictors whose every number is known: exact ones by enumeration, and a wrong one from a fixed random table.

And what many tests begin with: generators, templates of masks, models that are not blank.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import llada_helpers as h

PAD, MASK, START, END = range(4)
FIRST = 4  # the first data id


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def masks(rows, length=3):
    return torch.full((rows, length), MASK)


def fill(model, template, **options):
    return h.reverse_process(model, template, **{"mask_id": MASK, "steps": 3, **options})


class PostNormEncoder(torch.nn.Module, PyTorchModelHubMixin):
    """A predictor out of PyTorch's own parts, as a user may bring one: post-norm, learned positions, dropout 0.1."""

    def __init__(self, config: h.ModelConfig):
        super().__init__()
        self.config = config
        self.embed = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = torch.nn.Embedding(config.seq_len, config.n_embd)
        layer = torch.nn.TransformerEncoderLayer(config.n_embd, config.n_head, 4 * config.n_embd, dropout=0.1, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, config.n_layer, enable_nested_tensor=False)
        self.norm = torch.nn.LayerNorm(config.n_embd)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, ids):
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]  # [B, L, n_embd]
        return self.head(self.norm(self.encoder(x, src_key_padding_mask=ids == PAD)))


def with_noise(model, std):
    """A fresh Transformer is blank: its output projections and its head are zero."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def noisy_pair(vocab_size, seq_len, std):
    """ "LLaDA" and "AR", small, equal in shape, with other weights."""
    torch.manual_seed(0)
    shape = {"vocab_size": vocab_size, "seq_len": seq_len, "n_layer": 1, "n_head": 1, "n_embd": 8}
    pair = {name: h.Transformer(h.ModelConfig(causal=name == "AR", **shape)) for name in ("LLaDA", "AR")}
    return {name: with_noise(model, std) for name, model in pair.items()}


class ExactPredictor:
    """log p(x_i | visible tokens) for a fixed random joint distribution p over `symbols`^`length`.

    Data ids count as visible, everything else ([MASK], [PAD]) as unknown. Impossible tokens get -inf.
    """

    def __init__(self, length=3, symbols=3, seed=0, sharpness=1.5):
        self.length, self.vocab_size = length, FIRST + symbols
        self.sequences = torch.tensor(list(itertools.product(range(FIRST, self.vocab_size), repeat=length)))  # [K, L]
        generator = torch.Generator().manual_seed(seed)
        logits = sharpness * torch.randn(len(self.sequences), generator=generator, dtype=torch.float64)
        self.logp = logits.log_softmax(0)
        self.one_hot = torch.nn.functional.one_hot(self.sequences, self.vocab_size).double()  # [K, L, V]

    def __call__(self, ids):
        fits = ((ids[:, None] == self.sequences) | (ids[:, None] < FIRST)).all(dim=-1)  # [B, K]
        weight = fits * self.logp.exp()
        joint = torch.einsum("bk,klv->blv", weight, self.one_hot)
        return (joint / weight.sum(dim=1)[:, None, None]).log().float()

    @property
    def entropy(self):
        return -float((self.logp.exp() * self.logp).sum())

    def index(self, ids):
        """Row numbers of complete sequences [B, L] in `sequences`."""
        base = self.vocab_size - FIRST
        return ((ids - FIRST) * base ** torch.arange(self.length - 1, -1, -1)).sum(dim=1)

    def log_prob(self, ids):
        """log p of what is visible in ids [B, L], the rest summed out."""
        fits = ((ids[:, None] == self.sequences) | (ids[:, None] < FIRST)).all(dim=-1)
        return (fits * self.logp.exp()).sum(dim=1).log()


class ExactAR:
    """The same distribution, left to right: logits [B, l, V] for inputs [START] x_1 ... x_{l-1}."""

    def __init__(self, exact):
        self.exact = exact

    def __call__(self, inputs):
        assert bool((inputs[:, 0] == START).all()), "the first input must be [START]"
        columns = []
        for i in range(inputs.shape[1]):
            seen = torch.full((len(inputs), self.exact.length), MASK)
            seen[:, :i] = inputs[:, 1 : i + 1]
            columns.append(self.exact(seen)[:, i])
        return torch.stack(columns, dim=1)


class WrongPredictor:
    """Fixed random logits that depend on the whole masked sequence, and on nothing else."""

    def __init__(self, vocab_size, longest=8, seed=0, scale=1.5, buckets=1009):
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(buckets, longest, vocab_size, generator=generator)
        self.calls = self.rows = 0

    def __call__(self, ids):
        self.calls += 1
        self.rows += len(ids)
        powers = torch.tensor([pow(31, i + 1, len(self.table)) for i in range(ids.shape[1])])
        return self.table[(ids * powers).sum(dim=1) % len(self.table), : ids.shape[1]]


def enumerated_nelbo(predict, sequence, maskable, mask_id=MASK):
    """(1/n) sum_l (n/l) mean over the subsets of l maskable tokens of their summed cross-entropies; one sequence [L]."""
    where = maskable.nonzero()[:, 0].tolist()
    value = 0.0
    for size in range(1, len(where) + 1):
        subsets = list(itertools.combinations(where, size))
        rows = sequence.repeat(len(subsets), 1)
        for row, subset in zip(rows, subsets):
            row[list(subset)] = mask_id
        logp = predict(rows).double().log_softmax(dim=-1)
        nll = [-float(logp[r, i, sequence[i]]) for r, subset in enumerate(subsets) for i in subset]
        value += sum(nll) / len(subsets) / size
    return value


def enumerated_bernoulli_loss(predict, sequence, maskable, t, mask_id=MASK):
    """The expectation of Eq. 3 at a fixed t: masks of k of n tokens weigh t^k (1-t)^(n-k), losses 1 / (t n)."""
    where = maskable.nonzero()[:, 0].tolist()
    value = 0.0
    for size in range(1, len(where) + 1):
        for subset in itertools.combinations(where, size):
            row = sequence.clone()
            row[list(subset)] = mask_id
            logp = predict(row[None])[0].double().log_softmax(dim=-1)
            nll = -sum(float(logp[i, sequence[i]]) for i in subset)
            value += t**size * (1 - t) ** (len(where) - size) * nll / (t * len(where))
    return value


@dataclass
class ChiSquare:
    """Pearson's statistic of counts against probabilities, and a bound that the truth exceeds with probability < 1e-6."""

    statistic: float
    bound: float

    @classmethod
    def of(cls, counts, probs):
        expected = probs.double() * counts.sum()
        free = int((probs > 0).sum()) - 1
        assert int(counts[probs == 0].sum()) == 0, "something of probability zero was sampled"
        kept = probs > 0
        statistic = float(((counts.double() - expected)[kept] ** 2 / expected[kept]).sum())
        return cls(statistic, free + 2 * math.sqrt(14 * free) + 28)  # Laurent & Massart 2000: exceeded with p < e^-14

    @property
    def fits(self):
        return self.statistic < self.bound


def within(values, expected, errors=4):
    """Does the mean of independent values lie within `errors` standard errors of what is expected?"""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(values))
    return abs(float(values.mean()) - expected) <= errors * error + 1e-6


@st.composite
def templates(draw, vocabulary):
    """A template with masks in some row, a block length that divides every row's number of masks, the number of blocks."""
    length = draw(st.integers(1, 8))
    token = st.integers(0, vocabulary - 1).filter(lambda v: v != MASK)
    block_length = draw(st.one_of(st.none(), st.integers(1, 3)))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.lists(token, min_size=length, max_size=length))
        n = draw(st.integers(0, length))
        n -= n % (block_length or 1)
        for i in draw(st.permutations(range(length)))[:n]:
            row[i] = MASK
        rows.append(row)
    template = torch.tensor(rows)
    most = int((template == MASK).sum(dim=1).max())
    if most == 0:
        template[0, :] = MASK
        most, block_length = length, None
    n_blocks = 1 if block_length is None else most // block_length
    return template, block_length, n_blocks


class Apple(torch.Tensor):
    """A tensor that says it lives on Apple's device; see `WithoutFloat64`."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class WithoutFloat64(TorchFunctionMode):
    """A device "mps" that refuses float64, and to be mixed with tensors of the CPU, as a context: x.to("mps") is on it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, values = getattr(function, "__name__", ""), [*args, *kwargs.values()]
        there, mps = [isinstance(x, Apple) for x in torch.utils._pytree.tree_leaves(values)], torch.device("mps")
        if function == torch.Tensor.device.__get__ and there[0]:
            return mps
        named = (x for x in values if isinstance(x, (str, torch.device)))
        to = next((torch.device(x) for x in named if isinstance(x, torch.device) or x in ("cpu", "mps")), None)
        if name == "cpu" or (name == "to" and to is not None):
            return args[0].as_subclass(Apple if to == mps else torch.Tensor)
        if to == mps:
            kwargs["device"] = "cpu"
        if (any(there) or to == mps) and (name == "double" or any(x is torch.float64 for x in values)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        plain = [x for x in torch.utils._pytree.tree_leaves(values) if type(x) is torch.Tensor and x.ndim]
        if any(there) and plain and not name.startswith("__"):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, mps and cpu!")
        made = function(*args, **kwargs)
        wrap = any(there) or to == mps
        return torch.utils._pytree.tree_map(lambda x: x.as_subclass(Apple) if wrap and isinstance(x, torch.Tensor) else x, made)


def on_apple(predict):
    """The mask predictor, as one that lives on a device without float64: it takes and gives such tensors only."""

    def wrapped(ids):
        assert isinstance(ids, Apple), "the model is asked where it lives"
        return predict(ids.to("cpu")).to("mps")

    return wrapped
