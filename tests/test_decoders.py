"""Section 6, the decoders beyond the paper's: adaptive counts, the block cache, infilling."""

import pytest
import torch
from oracle import MASK, ChiSquare, ExactPredictor, WrongPredictor

import llada_helpers as h

EXACT = ExactPredictor(length=3, symbols=3, seed=1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = h.Transformer(h.ModelConfig(vocab_size=12, seq_len=24, n_layer=2, n_head=2, n_embd=16)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("remasking", ["random", "entropy", "margin"])
def test_one_token_a_pass_samples_the_true_distribution(remasking):
    """These orders look at the state only, never at the sampled value, so revealing one by one is exact."""
    template = torch.full((6000, 3), MASK)
    made = h.reverse_process(EXACT, template, mask_id=MASK, steps=3, temperature=1.0, remasking=remasking, generator=seeded(0))
    counts = torch.bincount(EXACT.index(made.ids), minlength=len(EXACT.sequences))
    assert ChiSquare.of(counts, EXACT.logp.exp()).fits


def test_low_confidence_is_not_exact_even_one_by_one():
    """It keeps the likeliest of the sampled values, which favours likely values: the reader should know, so it is a test."""
    template = torch.full((6000, 3), MASK)
    made = h.reverse_process(EXACT, template, mask_id=MASK, steps=3, temperature=1.0, generator=seeded(0))
    counts = torch.bincount(EXACT.index(made.ids), minlength=len(EXACT.sequences))
    assert not ChiSquare.of(counts, EXACT.logp.exp()).fits


def greedy_entropy_bound(predict, template, bound):
    """The EB-Sampler's rule, row by row, in plain Python; returns ids, order."""
    ids, order = template.clone(), torch.full_like(template, -1)
    for row, commits in zip(ids, order):
        step = 0
        while MASK in row.tolist():
            logits = predict(row[None])[0].double()
            probs = logits.softmax(dim=-1)
            entropy = -(probs * probs.clamp(min=1e-300).log()).sum(dim=-1)
            waiting = sorted((i for i in range(len(row)) if row[i] == MASK), key=lambda i: float(entropy[i]))
            run = 1
            while run < len(waiting) and float(entropy[waiting[:run]].sum()) <= bound:
                run += 1
            logits[:, MASK] = -torch.inf
            for i in waiting[:run]:
                row[i], commits[i] = logits[i].argmax(), step
            step += 1
    return ids, order


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.5, 3.0, 100.0])
@pytest.mark.parametrize("seed", range(5))
def test_entropy_bound_follows_its_rule(bound, seed):
    predict = WrongPredictor(vocab_size=9, longest=8, seed=seed)
    template = torch.randint(4, 9, (4, 8), generator=seeded(seed))
    template[torch.rand(4, 8, generator=seeded(seed + 1)) < 0.7] = MASK
    template[:, 0] = MASK
    options = {"mask_id": MASK, "steps": 1, "remasking": "entropy", "entropy_bound": bound}
    ids, order = greedy_entropy_bound(predict, template, bound)
    for row in range(4):  # alone, since a batch's rows share the count of passes
        made = h.reverse_process(predict, template[row : row + 1], **options)
        assert torch.equal(made.ids[0], ids[row]) and torch.equal(made.order[0], order[row])
        assert made.nfe == int(order[row].max()) + 1
    together = h.reverse_process(predict, template, **options)
    assert torch.equal(together.ids, ids) and torch.equal(together.order, order)


def test_entropy_bound_extremes():
    predict = WrongPredictor(vocab_size=9, longest=8)
    template = torch.full((1, 8), MASK)
    options = {"mask_id": MASK, "steps": 8, "remasking": "entropy"}
    assert h.reverse_process(predict, template, entropy_bound=0.0, **options).nfe == 8
    assert h.reverse_process(predict, template, entropy_bound=1e9, **options).nfe == 1


@pytest.mark.parametrize("remasking", h.REMASKING)
def test_cache_is_exact_where_every_block_takes_one_pass(transformer, remasking):
    template = torch.randint(4, 12, (3, 24), generator=seeded(0))
    template[:, 6:] = MASK
    options = {"mask_id": MASK, "steps": 3, "block_length": 6, "remasking": remasking, "temperature": 1.0}
    a, b = (h.reverse_process(transformer, template, cache=c, generator=seeded(1), **options) for c in (True, False))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.order, b.order) and a.nfe == b.nfe


def test_cache_is_exact_where_one_block_is_everything(transformer):
    """Nothing lies outside the block, so nothing is stale."""
    template = torch.full((2, 24), MASK)
    for scale in (0.0, 0.7):
        options = {"mask_id": MASK, "steps": 12, "cfg_scale": scale}
        a, b = (h.reverse_process(transformer, template, cache=c, **options) for c in (True, False))
        assert torch.equal(a.ids, b.ids) and torch.equal(a.order, b.order)


def test_cache_computes_the_block_alone(transformer, monkeypatch):
    widths = []
    forward = h.Transformer.forward

    def counted(self, ids, *args, **kwargs):
        widths.append(ids.shape[1])
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(h.Transformer, "forward", counted)
    template = torch.full((2, 24), MASK)
    h.reverse_process(transformer, template, mask_id=MASK, steps=12, block_length=6, cache=True)
    assert widths == [24, 6, 6] * 4


def test_block_pass_equals_full_pass_while_nothing_changed(transformer):
    """The cached keys and values are those of the full pass: a slice recomputed against them gives the same logits."""
    ids = torch.randint(4, 12, (2, 24), generator=seeded(2))
    cache = h.KVCache(transformer.config, 2, transformer.embed.weight)
    with torch.no_grad():
        whole = transformer(ids, cache=cache)
        part = transformer(ids[:, 7:15], cache=cache, start=7)
    assert torch.allclose(whole, transformer(ids), atol=1e-5) and torch.allclose(part, whole[:, 7:15], atol=1e-5)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"threshold": 0.9, "entropy_bound": 1.0, "remasking": "entropy"}, "one of them"),
        ({"entropy_bound": 1.0}, "remasking='entropy'"),
        ({"entropy_bound": -1.0, "remasking": "entropy"}, "bound >= 0"),
        ({"cache": True}, "Transformer"),
    ],
)
def test_options_that_do_not_go_together(options, word):
    with pytest.raises(ValueError, match=word):
        h.reverse_process(EXACT, torch.full((1, 3), MASK), mask_id=MASK, steps=3, **options)


TOKENIZER = h.CharTokenizer.from_text("abcdefgh ")


def test_infill_keeps_the_text_and_fills_each_blank_to_its_width():
    model = h.Transformer(h.ModelConfig(TOKENIZER.vocab_size, 24, 1, 2, 8)).eval()
    torch.nn.init.normal_(model.head.weight)
    texts = ["ab[__]cd[_]e", "[____]", "bad [_] cab [___]"]
    filled = h.infill(model, TOKENIZER, texts, steps=4, temperature=1.0, generator=seeded(0))
    for text, result in zip(texts, filled):
        pattern = "".join(f".{{{len(p)}}}" if p.startswith("_") else p for p in h.BLANK.split(text) if p)
        assert h.re.fullmatch(pattern, result), (text, result)


def test_infill_needs_a_blank():
    with pytest.raises(ValueError, match="no blank"):
        h.infill(EXACT, TOKENIZER, ["ab"], steps=1)


class EndsEarly:
    """Everywhere the likeliest token is [END], by far, and the next is token 5."""

    def __call__(self, ids):
        logits = torch.zeros(*ids.shape, 9)
        logits[..., h.END_ID], logits[..., 5] = 8.0, 4.0
        logits[:, 0, 5] = 8.5  # but for the first position, where 5 is a little likelier
        return logits


def test_late_tokens_are_committed_last():
    """Without `late`, [END] is locked in before the less certain first token; with it, only after."""
    template = torch.full((1, 4), MASK)
    options = {"mask_id": MASK, "steps": 4}
    plain = h.reverse_process(EndsEarly(), template, **options)
    late = h.reverse_process(EndsEarly(), template, late=(h.END_ID,), **options)
    assert plain.ids.tolist() == late.ids.tolist() == [[5, 3, 3, 3]]
    assert int(plain.order[0, 0]) == 3 and int(late.order[0, 0]) == 0
    hasty = h.reverse_process(EndsEarly(), template, late=(h.END_ID,), threshold=0.5, **options)
    assert hasty.nfe == 4, "a late token never passes the threshold, it comes one at a time"


@pytest.mark.parametrize("revisions", [1, 3])
@pytest.mark.parametrize("remasking", ["low_confidence", "random", "entropy"])
def test_revisions_redo_and_record(revisions, remasking):
    predict = WrongPredictor(vocab_size=9, longest=8, seed=3)
    template = torch.randint(4, 9, (3, 8), generator=seeded(0))
    template[:, 2:] = MASK
    options = {"mask_id": MASK, "steps": 3, "remasking": remasking, "temperature": 1.0, "forbidden": (0, 2, 3)}
    plain = h.reverse_process(predict, template, generator=seeded(1), **options)
    made = h.reverse_process(predict, template, generator=seeded(1), revisions=revisions, **options)
    assert made.nfe == plain.nfe + revisions
    assert torch.equal(made.ids[:, :2], template[:, :2]) and (made.ids >= 4).all()
    assert torch.equal(made.order == -1, template != MASK)
    assert len(made.states) == 1 + 3 + revisions
    assert torch.equal(made.state_after(-1), template) and torch.equal(made.state_after(3 + revisions - 1), made.ids)
    for step in range(-1, 3):
        assert torch.equal(made.state_after(step), plain.state_after(step)), "revision comes after the schedule"
    for step in range(3, 3 + revisions):
        changed = made.state_after(step) != made.state_after(step - 1)
        assert int(changed.sum(dim=1).max()) <= 2, "as many as a step reveals"
        assert (made.order[changed] >= step).all()
    assert ((made.order == 3 + revisions - 1).sum(dim=1) == 2).all(), "the last pass redid two of each row"


def test_revision_takes_back_the_least_certain():
    """A predictor that is sure of everything but one position: that one is redone, now with its neighbours in sight."""

    def predict(ids):
        logits = torch.zeros(*ids.shape, 9)
        logits[..., 4] = 5.0
        complete = (ids != MASK).sum(dim=1) == ids.shape[1] - 1
        logits[:, 2] = torch.tensor([0, 0, 0, 0, 0.5, 0, 0, 0, 0.0])
        logits[complete, 2, 7] = 9.0
        return logits

    options = {"mask_id": MASK, "steps": 6, "threshold": 0.0}  # everything in one pass, one token per revision
    made = h.reverse_process(predict, torch.full((1, 6), MASK), **options)
    assert made.ids.tolist() == [[4] * 6] and made.nfe == 1
    redone = h.reverse_process(predict, torch.full((1, 6), MASK), revisions=1, **options)
    assert redone.ids.tolist() == [[4, 4, 7, 4, 4, 4]] and redone.order.tolist() == [[0, 0, 1, 0, 0, 0]]


def test_negative_revisions_are_refused():
    with pytest.raises(ValueError, match="revisions"):
        h.reverse_process(EXACT, torch.full((1, 3), MASK), mask_id=MASK, steps=3, revisions=-1)
