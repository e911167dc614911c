"""NumPy arrays in, NumPy arrays out: any strides, read-only, memory-mapped, foreign byte order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meditok import ops
from meditok.errors import TokenRangeError
from meditok.ops import reference

from .helpers import METRICS, has_native

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((40, 2, 8)).astype(np.float32)
CODEBOOK = GENERATOR.standard_normal((2, 100, 8)).astype(np.float32)


def expected(x, codebook, metric="cosine"):
    return reference.vq_assign(torch.tensor(x.copy()), torch.tensor(codebook.copy()), metric=metric).numpy()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_numpy_in_numpy_out(metric, dtype):
    """Ids are int64 arrays, rows keep the codebook's dtype, and both equal the reference."""
    x, codebook = X.astype(dtype), CODEBOOK.astype(dtype)
    ids = ops.vq_assign(x, codebook, metric=metric)
    assert type(ids) is np.ndarray and ids.dtype == np.int64
    np.testing.assert_array_equal(ids, expected(x, codebook, metric))
    rows = ops.vq_lookup(ids, codebook, metric=metric)
    assert type(rows) is np.ndarray and rows.dtype == dtype
    wanted = reference.vq_lookup(torch.tensor(ids), torch.tensor(codebook), metric=metric).numpy()
    np.testing.assert_array_equal(rows, wanted)
    packed = ops.pack_codebook(codebook, metric=metric)
    np.testing.assert_array_equal(ops.vq_assign(x, packed, metric=metric), ids)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda a: a[::-1, :, ::-1], id="negative"),
        pytest.param(lambda a: np.asfortranarray(a), id="fortran"),
        pytest.param(lambda a: np.broadcast_to(a[:1], a.shape), id="broadcast"),
        pytest.param(lambda a: a.astype(a.dtype.newbyteorder()), id="foreign bytes"),
        pytest.param(
            lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape), id="odd"
        ),
    ],
)
def test_any_memory_layout(view):
    """Negative, column-major, broadcast (read-only), foreign and unaligned arrays."""
    x, codebook = view(X), view(CODEBOOK)
    ids = ops.vq_assign(x, codebook)
    np.testing.assert_array_equal(ids, expected(x.astype(np.float32), codebook.astype(np.float32)))
    np.testing.assert_array_equal(ops.vq_assign(x, ops.pack_codebook(codebook)), ids)
    rows = ops.vq_lookup(ids[::-1], codebook)
    np.testing.assert_array_equal(rows, ops.vq_lookup(ids, np.array(codebook, np.float32))[::-1])


def test_memory_mapped_files(tmp_path):
    """A read-only memory map is read in place."""
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(ops.vq_assign(mapped, CODEBOOK), expected(X, CODEBOOK))


@pytest.mark.skipif(not has_native(), reason="the compiled core does not run")
def test_numpy_never_goes_through_torch(monkeypatch):
    """With the compiled core, no tensor is made from a NumPy array."""

    def refuse(*args, **kwargs):
        raise AssertionError("torch was asked to read a NumPy array")

    monkeypatch.setattr(torch, "from_numpy", refuse)
    monkeypatch.setattr(torch, "as_tensor", refuse)
    monkeypatch.setattr(torch, "tensor", refuse)
    ids = ops.vq_assign(X, CODEBOOK)
    assert ops.vq_lookup(ids, CODEBOOK).shape == X.shape
    z, ids, loss, counts = ops.vq_quantize(X, CODEBOOK, mask=np.arange(40) % 2 == 0)
    state = CODEBOOK.copy(), np.ones((2, 100), np.float32), CODEBOOK.copy()
    ops.vq_update_(*state, *ops.vq_stats(X, ids, 100), decay=0.5, eps=1e-5)
    assert z.dtype == X.dtype and type(loss) is np.float32 and counts.sum() == 40


def test_training_ops_and_attention_take_numpy():
    """The other ops return NumPy arrays too; the update writes into the arrays given."""
    z, ids, loss, counts = ops.vq_quantize(X, CODEBOOK)
    assert type(z) is np.ndarray and loss.dtype == np.float32 and counts.sum() == ids.size
    counts, sums = ops.vq_stats(X, ids, 100)
    codebook, ema_counts, ema_sums = CODEBOOK.copy(), np.ones((2, 100), np.float32), CODEBOOK.copy()
    ops.vq_update_(codebook, ema_counts, ema_sums, counts, sums, decay=0.5, eps=1e-5)
    np.testing.assert_allclose(np.linalg.norm(codebook, axis=-1), 1, rtol=1e-5)
    q = X.reshape(1, 40, 2, 8).transpose(0, 2, 1, 3)
    assert type(ops.attention(q, q, q)) is np.ndarray


@pytest.mark.parametrize("metric", METRICS)
def test_numpy_training_gives_the_bits_of_torch(metric):
    """Reversed and column-major arrays through the training ops, the EMA in place on a strided view; state of
    other types goes through the reference; read-only state is refused."""
    x, codebook, mask = X[::-1, :, ::-1], np.asfortranarray(CODEBOOK), np.arange(80)[::-2] % 3 > 0
    settings = dict(metric=metric, rotation=True)
    found = ops.vq_quantize(x, codebook, mask=mask, **settings)
    tensors = (torch.tensor(array.copy()) for array in (x, codebook, mask))
    expected = ops.vq_quantize(*(inputs := list(tensors))[:2], mask=inputs[2], **settings)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b.numpy())
    for dtype in (np.float32, np.float64):
        counts, sums = ops.vq_stats(x, found[1][::-1][::-1], 100)
        wide = np.ones((2, 200, 8), dtype)
        wide[:, ::2] = CODEBOOK
        state = wide[:, ::2], np.ones((2, 100), dtype), CODEBOOK.astype(dtype)
        wanted = [torch.tensor(array.copy()) for array in state]
        ops.vq_update_(*state, counts, sums, decay=0.5, eps=1e-5, metric=metric)
        ops.vq_update_(*wanted, torch.tensor(counts), torch.tensor(sums), decay=0.5, eps=1e-5, metric=metric)
        for a, b in zip(state, wanted, strict=True):
            np.testing.assert_array_equal(a, b.numpy())
        assert (wide[:, 1::2] == 1).all()
    state[0].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        ops.vq_update_(*state, counts, sums, decay=0.5, eps=1e-5, metric=metric)


def test_mixed_kinds_and_wrong_ids():
    """NumPy with torch is a TypeError; ids out of range are named."""
    with pytest.raises(TypeError, match="numpy and torch"):
        ops.vq_assign(X, torch.tensor(CODEBOOK))
    with pytest.raises(TypeError, match="list"):
        ops.vq_assign(X.tolist(), CODEBOOK)
    with pytest.raises(TokenRangeError, match="from 0 to 100.*codebook 1"):
        ops.vq_lookup(np.array([[0, 100]]), CODEBOOK)
