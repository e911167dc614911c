"""The ops as PyTorch sees them: opcheck, torch.compile, export, vmap; and the attention ops' own
behaviour."""

from __future__ import annotations

import pytest
import torch

from meditok import ops

from .helpers import METRICS, randn

X, CODEBOOK = randn(12, 2, 4), randn(2, 9, 4, seed=1)
IDS = torch.randint(9, (12, 2), generator=torch.Generator().manual_seed(2))


def grad(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().requires_grad_()


OPS = {
    "vq_pack": lambda metric: ((CODEBOOK,), dict(metric=metric)),
    "vq_assign": lambda metric: ((grad(X), CODEBOOK), dict(metric=metric)),
    "vq_lookup": lambda metric: ((IDS, grad(CODEBOOK)), dict(metric=metric)),
    "vq_lookup_backward": lambda metric: ((X, IDS, CODEBOOK), dict(metric=metric)),
    "vq_quantize": lambda metric: ((grad(X), grad(CODEBOOK), torch.arange(12) > 3), dict(metric=metric)),
    "vq_quantize_backward": lambda metric: (
        (X, torch.ones(()), X, CODEBOOK, IDS, torch.arange(12) > 3),
        dict(metric=metric, commitment_weight=0.25, codebook_weight=1.0, rotation=metric == "l2"),
    ),
    "vq_stats": lambda metric: ((X, IDS, 9), {}),
    "vq_update_": lambda metric: (
        (CODEBOOK.clone(), torch.rand(2, 9), randn(2, 9, 4), torch.ones(2, 9).long(), randn(2, 9, 4)),
        dict(decay=0.9, eps=1e-5, metric=metric),
    ),
    "attention": lambda metric: ((grad(randn(2, 3, 5, 4)),) * 3, dict(is_causal=metric == "l2")),
    "attention_qkv": lambda metric: (
        (grad(randn(2, 5, 3, 2, 4)),),
        dict(reduce="mean" if metric == "l2" else None),
    ),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, metric):
    """Schema, fake, autograd registration and dynamic-shape compilation of every op."""
    arguments, settings = OPS[name](metric)
    torch.library.opcheck(getattr(torch.ops.meditok, name), arguments, settings)


def test_compile_without_graph_breaks_and_for_any_batch():
    """fullgraph=True with a packed codebook; another batch size changes no answer."""
    packed = ops.pack_codebook(CODEBOOK)

    def step(x):
        return ops.vq_lookup(ops.vq_assign(x, packed), packed)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7, 30):
        x = randn(rows, 2, 4, seed=rows)
        assert torch.equal(compiled(x), step(x))


def test_compiled_training_step_has_the_same_gradients():
    """Forward and backward of vq_quantize and attention through torch.compile(fullgraph=True)."""
    qkv = randn(2, 6, 3, 2, 4)

    def step(x, codebook, qkv):
        z, _, loss, _ = ops.vq_quantize(x, codebook)
        return z.square().sum() + loss + ops.attention_qkv(qkv, is_causal=True).sum()

    inputs = [grad(tensor) for tensor in (X, CODEBOOK, qkv)]
    expected = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda x, codebook: ops.vq_lookup(IDS, codebook), id="vq_lookup"),
        pytest.param(lambda x, codebook: ops.vq_quantize(x, codebook)[0], id="vq_quantize"),
        pytest.param(lambda x, codebook: ops.vq_entropy(x, codebook), id="vq_entropy"),
    ],
)
def test_a_second_derivative_is_refused(loss):
    """A gradient of the gradient is an error in one line, not a zero."""
    x, codebook = grad(X), grad(CODEBOOK)
    first = torch.autograd.grad(loss(x, codebook).square().sum(), codebook, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="create_graph"):
        first.square().sum().backward()


def test_export_keeps_the_ops():
    """torch.export with a dynamic batch holds vq_assign and vq_lookup as nodes."""

    class Quantise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codebook", CODEBOOK)

        def forward(self, x):
            ids = ops.vq_assign(x, self.codebook)
            return ids, ops.vq_lookup(ids, self.codebook)

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Quantise(), (X,), dynamic_shapes=({0: batch},))
    called = {str(node.target) for node in program.graph.nodes}
    assert {"meditok.vq_assign.default", "meditok.vq_lookup.default"} <= called
    x = randn(5, 2, 4, seed=9)
    ids, rows = program.module()(x)
    assert torch.equal(ids, ops.vq_assign(x, CODEBOOK)) and torch.equal(rows, ops.vq_lookup(ids, CODEBOOK))


@pytest.mark.parametrize("metric", METRICS)
def test_vmap_over_x_and_over_codebooks(metric):
    """vmap equals a loop, over x alone, over ids, and over x and codebook together."""
    xs, codebooks = randn(3, 12, 2, 4, seed=4), randn(3, 2, 9, 4, seed=5)

    def assign(x, codebook):
        return ops.vq_assign(x, codebook, metric=metric)

    def lookup(ids, codebook):
        return ops.vq_lookup(ids, codebook, metric=metric)

    ids = torch.vmap(assign, (0, None))(xs, CODEBOOK)
    assert torch.equal(ids, torch.stack([assign(x, CODEBOOK) for x in xs]))
    packed = ops.pack_codebook(CODEBOOK, metric=metric)
    assert torch.equal(torch.vmap(lambda x: ops.vq_assign(x, packed, metric=metric))(xs), ids)
    rows = torch.vmap(lookup, (0, None))(ids, CODEBOOK)
    assert torch.equal(rows, torch.stack([lookup(i, CODEBOOK) for i in ids]))
    both = torch.vmap(assign)(xs, codebooks)
    assert torch.equal(both, torch.stack([assign(x, c) for x, c in zip(xs, codebooks, strict=True)]))
    assert torch.equal(torch.vmap(lookup)(both, codebooks), torch.stack(list(map(lookup, both, codebooks))))
    last = torch.vmap(assign, (3, None), 2)(xs.movedim(0, 3), CODEBOOK)
    assert torch.equal(last.movedim(2, 0), ids)
    z = torch.vmap(lambda x: ops.vq_quantize(x, CODEBOOK, metric=metric))(xs)
    for index, x in enumerate(xs):
        for a, b in zip(z, ops.vq_quantize(x, CODEBOOK, metric=metric), strict=True):
            assert torch.equal(a[index], b)
