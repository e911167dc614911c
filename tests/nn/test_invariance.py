"""What never changes a quantiser's state or result: evaluation, a reload, packing, compilation, another run."""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

from meditok import ops
from meditok.nn.quantizer import MultiCodebookQuantizer, VectorQuantizer

from ..ops.helpers import METRICS, randn
from .helpers import KINDS, MODES, several, single, snapshot, train, unchanged

# ---- what changes nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_evaluation_passes_change_no_buffer(kind, mode):
    quantizer = KINDS[kind](mode, window=1)
    train(quantizer, 2)
    quantizer.eval()
    before = snapshot(quantizer)
    for seed in range(10):
        out = quantizer(randn(2, 9, 6, seed=seed))
        assert torch.equal(quantizer.assign(randn(2, 9, 6, seed=seed)), out.ids)
        assert torch.equal(quantizer.lookup(out.ids), out.z)
    assert unchanged(quantizer, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_reload_in_the_middle_of_a_window_changes_no_bit(kind, mode):
    """Saved between two micro-batches: losses, codes and revivals of the next 20 steps are those of the run itself."""
    quantizer = KINDS[kind](mode, window=8)
    train(quantizer, 5)
    quantizer(randn(2, 9, 6, seed=99))
    other = KINDS[kind](mode, window=8)
    train(other, 1)
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    assert unchanged(other, snapshot(quantizer))
    assert torch.equal(train(quantizer, 20, first=5), train(other, 20, first=5))
    assert unchanged(other, snapshot(quantizer)) and quantizer.state.steps == 25


def test_published_keys_stay_and_a_switch_adds_the_state():
    """Two keys a codebook by default; the training state joins for "ema", and files without it still load."""
    published = MultiCodebookQuantizer(2, 16, 3)
    keys = [f"codebooks.{i}.{leaf}" for i in range(2) for leaf in ("vocab_usage", "codebook.weight")]
    assert list(published.state_dict()) == keys
    train(published, 3)
    again = MultiCodebookQuantizer(2, 16, 3)
    again.load_state_dict(published.state_dict())
    assert torch.equal(again.codebook, published.codebook) and again.state.passes == 100 and again.state.steps == 0
    again.codebook_update = "ema"
    assert set(keys) < set(again.state_dict()) and "state.ema_sums" in again.state_dict()
    assert again.load_state_dict(published.state_dict(), strict=False).unexpected_keys == []
    torch.testing.assert_close(again.state.ema_sums, F.normalize(published.codebook.detach(), dim=-1))
    with pytest.raises(RuntimeError, match="surplus"):
        again.load_state_dict({**again.state_dict(), "surplus": torch.zeros(1)})


# ---- packing, compilation, determinism, memory -------------------------------------------------------------


def test_the_codebook_is_packed_once_until_it_moves():
    """One packing serves passes, assign and micro-batches, and steps that change nothing; a changed bit ends it,
    whoever wrote it and however."""
    quantizer, x = several(), randn(2, 9, 6)
    packed = quantizer.packed().packed
    quantizer(x), quantizer(x), quantizer.assign(x)
    quantizer.load_state_dict(quantizer.state_dict())
    assert quantizer.packed().packed is packed
    quantizer.update()
    assert quantizer.packed().packed is not packed
    for write in (lambda c: c.mul_(-1), lambda c: c.data.neg_(), lambda c: c.numpy()[0].fill(3)):
        write(quantizer.codebook)
        expected = ops.vq_assign(x.reshape(-1, 2, 3), quantizer.codebook).view(2, 9, 2).mT
        assert torch.equal(quantizer.assign(x), expected)


@pytest.mark.parametrize("settings", [dict(fused=True), dict(foreach=True)])
def test_no_optimiser_can_leave_an_old_packing(settings):
    """Fused optimisers write without a trace: passes, assign and evaluation still see the codes as they are."""
    quantizer, x = VectorQuantizer(16, 6, codebook_update="gradient"), randn(2, 90, 6)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.5, **settings)

    def same() -> bool:
        expected = ops.vq_assign(x.view(-1, 1, 6), quantizer.codebook).view(2, 90)
        return torch.equal(quantizer.assign(x), expected) and torch.equal(quantizer(x).ids, expected)

    for training in (True, False, False):
        assert quantizer.train(training) is quantizer and same()
        quantizer(x).loss.backward()
        optimizer.step()
        assert same()


def test_casts_drop_the_packed_codebook():
    """To float16 and back leaves other values, at times at the same address: what was packed before is not used."""
    for seed in range(20):
        quantizer, x = MultiCodebookQuantizer(1, 64, 8), randn(1, 50, 8, seed=seed)
        before = quantizer.packed().packed
        quantizer.half().float()
        assert quantizer.packed().packed is not before
        assert torch.equal(quantizer.assign(x).view(-1, 1), ops.vq_assign(x.view(-1, 1, 8), quantizer.codebook))


def test_a_quantiser_made_in_inference_mode_works():
    """Its tensors have no version to tell changes by; values and updates are as ever."""
    with torch.inference_mode():
        quantizer = single("ema")
        x = randn(2, 9, quantizer.codebook.shape[2])
        for _ in range(2):
            ids = quantizer(x).ids
            assert torch.equal(ids.view(-1, 1), ops.vq_assign(x.flatten(0, 1)[:, None], quantizer.codebook))
            quantizer.update()


@pytest.mark.parametrize("kind, mode", [("one l2", "ema"), *(("several", mode) for mode in MODES)])
def test_compiled_training_and_evaluation_equal_eager(kind, mode):
    """With fullgraph=True: the same losses, codes and buffers after 8 steps of one graph, and the same eval pass."""
    eager, compiled = (KINDS[kind](mode, window=2, revive=True, entropy_weight=0.1) for _ in range(2))
    graphs = []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    run = torch.compile(compiled, fullgraph=True, backend=backend)
    torch.testing.assert_close(train(compiled, 8, run=run), train(eager, 8))
    assert len(graphs) == 1
    for name, value in snapshot(eager).items():
        torch.testing.assert_close(snapshot(compiled)[name], value, msg=name)
    compiled.eval()
    found, expected = run(randn(2, 9, 6)), eager.eval()(randn(2, 9, 6))
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.z, expected.z)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mode", ["ema", "gradient"])
def test_thirty_runs_give_the_same_bits(mode, metric):
    """Forward, backward, averages and revivals of 5 steps."""
    runs = []
    for _ in range(30):
        quantizer = single(mode, metric, window=2)
        losses = train(quantizer, 5)
        runs.append((losses, snapshot(quantizer)))
    assert all(torch.equal(losses, runs[0][0]) for losses, _ in runs)
    assert all(torch.equal(state[name], runs[0][1][name]) for _, state in runs for name in state)


def test_a_thousand_steps_do_not_grow_memory():
    """Resident memory after 1,000 steps of passes, backward, update and revival is that after 100, within 2 MiB."""

    def resident() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    quantizer = single(window=5)
    x = randn(4, 50, 6).requires_grad_()
    for step in range(1000):
        quantizer(x * (1 + step % 7)).loss.backward()
        x.grad = None
        quantizer.update()
        if step == 100:
            before = resident()
    assert resident() - before < 2
