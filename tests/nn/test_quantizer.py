"""The quantiser modules: what a pass returns, what moves the codes, and which inputs are refused."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import meditok
from meditok import ops
from meditok.errors import DtypeError, ShapeError, TokenRangeError, TokenShapeError, UsageError
from meditok.nn.quantizer import VectorQuantizer
from meditok.ops import reference

from ..ops.helpers import ROOT, randn
from .helpers import KINDS, MODES, several, single, snapshot, train, unchanged

# ---- modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_one_thing_moves_the_codebook(kind):
    """The averages, the optimiser, or nothing; only under "gradient" is it a Parameter."""
    for mode in MODES:
        quantizer = KINDS[kind](mode, window=2)
        before = quantizer.codebook.detach().clone()
        assert [name for name, _ in quantizer.named_parameters()] == (["codebook"] if mode == "gradient" else [])
        assert ("codebook" in dict(quantizer.named_buffers())) == (mode != "gradient")
        out = quantizer(randn(40, 9, 6).requires_grad_())
        (out.loss + out.z.sum()).backward()
        assert torch.equal(quantizer.codebook, before), "no pass moves the codes"
        quantizer.update()
        assert torch.equal(quantizer.codebook, before) == (mode != "ema")
    with pytest.raises(UsageError, match="'sgd' is unknown; choose one of ema, gradient, frozen"):
        KINDS[kind]("sgd")


@pytest.mark.parametrize(
    "shape, settings, message",
    [
        ((0, 4), {}, "(1, 0, 4)"),
        ((8, 0), {}, "(1, 8, 0)"),
        ((8.0, 4), {}, "(1, 8.0, 4)"),
        ((8, 4), dict(decay=1.5), "decay=1.5"),
        ((8, 4), dict(window=0), "window=0"),
        ((8, 4), dict(eps=-1e-5), "eps=-1e-05"),
        ((8, 4), dict(dead_share=-1), "dead_share=-1"),
    ],
)
def test_settings_that_cannot_work_are_refused(shape, settings, message):
    """When the module is made, in one line that names the value."""
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        VectorQuantizer(*shape, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_form_tells_the_shape_and_what_moves_the_codes(kind):
    text = str(KINDS[kind]("frozen"))
    groups, codes, width = KINDS[kind]("frozen").codebook.shape
    assert f"{groups} x {codes} codes of width {width}" in text and "codebook_update=frozen" in text


def test_frozen_is_one_switch_for_averages_revival_and_gradients():
    """A quantiser switched in the middle of training keeps its codes for good, and its ids are those of eval mode."""
    quantizer = several("ema", window=1, revive=True)
    train(quantizer, 5)
    quantizer.codebook_update = "frozen"
    before = quantizer.codebook.clone()
    x = randn(40, 9, 6).requires_grad_()
    for _ in range(5):
        quantizer(x).loss.backward()
        quantizer.update()
    assert torch.equal(quantizer.codebook, before) and not list(quantizer.parameters()) and x.grad.any()
    assert torch.equal(quantizer(x).ids, quantizer.eval().assign(x))
    quantizer.codebook_update = "gradient"
    assert torch.equal(quantizer.codebook, before) and quantizer.codebook.requires_grad


def test_medunifiers_loss_puts_its_weight_on_the_codebook_term():
    """mean (sg(code) - x)^2 + 0.5 mean (code - sg(x))^2, with gradients to both, at 512 codes of width 768."""
    quantizer = VectorQuantizer(
        512, 768, metric="l2", codebook_update="gradient", commitment_weight=1.0, codebook_weight=0.5
    )
    x = randn(2, 8, 768, scale=0.01).requires_grad_()
    out = quantizer(x)
    ids = torch.cdist(x.detach()[:, :, None].double(), quantizer.codebook[0].detach().double()).argmin(-1).squeeze(-1)
    code = quantizer.codebook[0, ids]
    expected = (code.detach() - x).square().mean() + 0.5 * (code - x.detach()).square().mean()
    assert torch.equal(out.ids, ids) and out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    leaves = (x, quantizer.codebook)
    for a, b in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_ema_equals_its_formula(kind):
    """Counts, sums and codes of one update, from a start in which every code was seen once."""
    quantizer = KINDS[kind]("ema", decay=0.9, revive=False)
    x = randn(30, 9, 6)
    pieces = x.flatten(0, 1).unflatten(-1, (quantizer.codebook.shape[0], -1))
    start = quantizer.codebook.clone()
    if quantizer.metric == "cosine":
        pieces, start = F.normalize(pieces, dim=-1), F.normalize(start, dim=-1)
    ids = reference.vq_assign(pieces, start, metric=quantizer.metric)
    chosen = F.one_hot(ids, 16).float()  # (N, G, K)
    counts = 0.9 + 0.1 * chosen.sum(0)
    sums = 0.9 * start + 0.1 * torch.einsum("ngk,ngc->gkc", chosen, pieces)
    quantizer(x)
    quantizer.update()
    torch.testing.assert_close(quantizer.state.ema_counts, counts)
    torch.testing.assert_close(quantizer.state.ema_sums, sums)
    smoothed = (counts + 1e-5) / (counts.sum(1, keepdim=True) + 16e-5) * counts.sum(1, keepdim=True)
    rows = F.normalize(sums, dim=-1) if quantizer.metric == "cosine" else sums / smoothed[..., None]
    torch.testing.assert_close(quantizer.codebook, rows)


def test_entropy_term_joins_the_loss_with_its_weight():
    """Off by default; with a weight, the published term of the same rows."""
    x = randn(4, 9, 6)
    plain, weighted = several("gradient"), several("gradient", entropy_weight=0.1)
    term = ops.vq_entropy(x.reshape(-1, 2, 3), plain.codebook)
    assert weighted(x).loss.item() == pytest.approx((plain(x).loss + 0.1 * term).item(), rel=1e-6)


def test_a_codebook_that_moves_between_forward_and_backward_is_an_error():
    """So that no backward meets another codebook than its forward did."""
    quantizer = single()
    out = quantizer(randn(2, 9, 6).requires_grad_())
    quantizer.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.z.sum().backward()


def test_a_tokenizer_trains_by_averages_and_saves_as_the_published_ones(tmp_path):
    """Its hash follows the codes, not the training state, and the written model loads without that state."""
    model = meditok.build("tiny", seed=1)
    model.quantizer.codebook_update = "ema"
    model.quantizer.train()
    published = model.hash
    model.quantizer(randn(1, 16, 64))
    assert model.hash == published
    model.quantizer.update()
    assert model.hash != published
    model.save_pretrained(tmp_path)
    loaded = meditok.load(tmp_path, device="cpu")
    assert loaded.hash == model.hash and loaded.quantizer.codebook_update == "gradient"


def test_the_readme_example_runs_as_written():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "VectorQuantizer" in block)
    names = {}
    exec(example, names)
    assert names["z"].shape == (8, 256, 64) and names["ids"].shape == (8, 256) and names["loss"].shape == ()


# ---- masks and odd inputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_moves_nothing(kind, mode):
    """A padded batch, whatever its padding holds, trains exactly as the batch without it."""
    bare, padded = (KINDS[kind](mode, window=1) for _ in range(2))
    x = randn(3, 9, 6)
    junk = torch.full((3, 4, 6), torch.nan)
    mask = torch.arange(13).expand(3, 13) < 9
    for _ in range(20):
        expected, found = bare(x), padded(torch.cat([x, junk], 1), mask)
        bare.update()
        padded.update()
    assert unchanged(padded, snapshot(bare))
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.usage, expected.usage)
    assert torch.equal(found.z[:, :9], expected.z) and not found.z[:, 9:].any()
    assert torch.equal(found.ids[..., :9], expected.ids) and (found.ids[..., 9:] == -1).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_leaves_nothing_gives_no_ids_zero_loss_and_no_update(kind, mode):
    """As does an empty batch; update() after them moves only its step counters."""
    quantizer = KINDS[kind](mode)
    train(quantizer, 2)
    before = snapshot(quantizer)
    x = randn(2, 9, 6).requires_grad_()
    out = quantizer(x, torch.zeros(2, 9, dtype=torch.bool))
    assert (out.ids == -1).all() and not out.z.any() and out.loss == 0 and out.usage == 0
    (out.loss + out.z.sum()).backward()
    assert not x.grad.any()
    for shape in ((0, 9, 6), (2, 0, 6)):
        out = quantizer(torch.empty(shape))
        assert out.z.shape == shape and out.ids.numel() == 0 and out.loss == 0
    assert unchanged(quantizer, before)
    quantizer.update()
    assert unchanged(quantizer, before, ("state.steps", "state.window_steps", "state.keys"))


def test_masks_of_another_shape_or_type_are_refused():
    quantizer, x = single(), randn(2, 9, 6)
    for mask in (torch.ones(9, 2, dtype=torch.bool), torch.ones(18, dtype=torch.bool), torch.ones(2, 9)):
        with pytest.raises(ShapeError, match=r"bool of shape \(2, 9\) is needed"):
            quantizer(x, mask)
    for wrong in (randn(2, 6), randn(2, 9, 5), randn(1, 2, 9, 6)):
        with pytest.raises(ShapeError, match=r"\(B, N, 6\) is needed"):
            quantizer(wrong)
    for dtype in (torch.int64, torch.float64, torch.uint8):
        with pytest.raises(DtypeError, match=str(dtype)):
            quantizer(x.to(dtype))


def test_ids_are_checked_before_any_lookup_and_the_next_call_works():
    quantizer = several()
    for wrong, error in (
        (torch.full((1, 2, 4), -1), TokenRangeError),
        (torch.full((1, 2, 4), 16), TokenRangeError),
        (torch.full((1, 2, 4), 2**31), TokenRangeError),
        (torch.zeros(1, 2, 4), DtypeError),
        (torch.zeros(1, 2, 4, dtype=torch.bool), DtypeError),
        (torch.zeros(1, 3, 4, dtype=torch.int64), TokenShapeError),
        (torch.zeros(2, 4, dtype=torch.int64), TokenShapeError),
    ):
        with pytest.raises(error) as caught:
            quantizer.lookup(wrong)
        assert isinstance(caught.value, ValueError)
    with pytest.raises(TokenRangeError, match=r"from 0 to 16, but the codebook has K = 16 .* position 3 of codebook 1"):
        quantizer.lookup(torch.tensor([[[0, 0, 0, 0], [0, 0, 0, 16]]]))
    with pytest.raises(TokenShapeError):
        single().lookup(torch.zeros(1, 2, 4, dtype=torch.int64))
    assert quantizer.lookup(torch.zeros(1, 2, 4, dtype=torch.int64)).shape == (1, 4, 6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_get_no_id_and_do_not_train(bad):
    """Id -1 for the piece, a loss that shows it, and averages that never see it."""
    quantizer = several(window=1)
    x = randn(20, 9, 6)
    x[1, 2, 4] = bad
    out = quantizer(x)
    quantizer.update()
    assert out.ids[1].flatten().eq(-1).sum() == 1 and out.ids[1, 1, 2] == -1 and not out.loss.isfinite()
    assert all(tensor.isfinite().all() for tensor in snapshot(quantizer).values())
    constant = quantizer(torch.zeros(1, 9, 6))
    assert (constant.ids == 0).all() and constant.loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_depend_on_the_values_alone_not_on_dtype_or_autocast(kind, dtype):
    """Half-precision inputs, the same values in float32, and either under autocast: one result, float32 z and loss."""
    half = randn(4, 9, 6, dtype=dtype).requires_grad_()
    results = []
    full = half.detach().float().requires_grad_()
    for x, cast in ((half, False), (half, True), (full, False), (full, True)):
        quantizer = KINDS[kind]("ema", entropy_weight=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = quantizer(x)
            assert torch.equal(quantizer.assign(x), out.ids)
        (gradient,) = torch.autograd.grad(out.loss + out.z.square().sum(), x)
        assert gradient.dtype == x.dtype and gradient.isfinite().all()
        assert out.z.dtype == out.loss.dtype == torch.float32
        quantizer.update()
        results.append((out.ids, out.z, out.loss, quantizer.codebook))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    codebook = KINDS[kind]("ema").codebook
    pieces = half.detach().double().flatten(0, 1).unflatten(-1, (codebook.shape[0], -1))
    exact = reference.vq_assign(pieces, codebook.double(), metric="l2" if "l2" in kind else "cosine")
    assert torch.equal(results[0][0].flatten(), exact.unflatten(0, (4, 9)).transpose(1, 2).flatten())


def test_strided_inputs_give_the_same_ids_and_rows():
    """Transposed, offset by one element, every second channel, expanded; the loss to rounding."""
    quantizer = several("frozen")
    base = randn(2, 6, 9)
    offset = torch.empty(2 * 9 * 6 + 1)[1:].view(2, 9, 6).copy_(base.transpose(1, 2))
    wide = torch.zeros(2, 9, 12)[..., ::2].copy_(base.transpose(1, 2))
    expected = quantizer(base.transpose(1, 2).contiguous())
    for view in (base.transpose(1, 2), offset, wide):
        found = quantizer(view)
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.z, expected.z)
        torch.testing.assert_close(found.loss, expected.loss)
    expanded = randn(1, 1, 6).expand(3, 9, 6)
    assert torch.equal(quantizer(expanded).ids, quantizer(expanded.contiguous()).ids)
