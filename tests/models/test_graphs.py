"""Which calls are captured as CUDA graphs, shown with a recorder in the place of the capture."""

from __future__ import annotations

import pytest
import torch

import meditok
from meditok.models.graphs import GraphCache, capture


def recorder(captured):
    def take(run, x):
        captured.append(tuple(x.shape))
        return run

    return take


@torch.no_grad()
def test_a_shape_is_captured_once_it_has_come_twice_and_replayed_from_then_on():
    captured, calls = [], []
    cache = GraphCache(capture=recorder(captured))
    for size in (4, 4, 3, 4, 4, 3, 3):
        x = torch.rand(size, 2)
        assert torch.equal(cache("double", lambda t: (calls.append(len(t)), 2 * t)[1], x), 2 * x)
    assert captured == [(4, 2), (3, 2)] and calls == [4, 4, 3, 4, 4, 3, 3]
    cache("double", torch.neg, torch.rand(4, 2, dtype=torch.float64))
    cache("another", torch.neg, torch.rand(4, 2))
    assert len(captured) == 2 and len(cache.graphs) == 2


@torch.no_grad()
def test_the_graph_used_longest_ago_makes_room():
    captured = []
    cache = GraphCache(warm=0, limit=2, capture=recorder(captured))
    for size in (1, 2, 1, 3, 1, 2):
        cache("key", torch.neg, torch.rand(size, 1))
    assert captured == [(1, 1), (2, 1), (3, 1), (2, 1)] and len(cache.graphs) == 2


def test_nothing_is_captured_where_a_gradient_may_be_wanted_or_nothing_is_computed():
    captured = []
    cache = GraphCache(warm=0, capture=recorder(captured))
    cache("key", torch.neg, torch.rand(2, 1))
    with torch.no_grad():
        cache("key", torch.neg, torch.rand(0, 1))
    assert captured == [] and not cache.graphs


def test_a_tokenizer_captures_anew_once_its_weights_or_its_precision_change(monkeypatch):
    """Graphs read the memory of weights and of what was folded from them."""
    captured = []
    model, x = meditok.build("tiny", seed=0, encoder_depth=1, decoder_depth=1), torch.zeros(1, 3, 16, 16)
    model.graphs = GraphCache(warm=1, capture=recorder(captured))
    for _ in range(3):
        model.tokenize(x)
    assert captured == [(1, 3, 16, 16)]
    with torch.no_grad():
        model.encoder.norm.weight.mul_(2)
    for _ in range(2):
        model.tokenize(x)
    model.precision = "bf16"
    for _ in range(2):
        model.tokenize(x)
    assert len(captured) == 3
    tokens = model.tokenize(x)
    for _ in range(2):
        model.detokenize(tokens)
    assert captured[3:] == [tuple(tokens.shape)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_a_captured_call_gives_what_the_eager_one_gives():
    x = torch.rand(3, 5, device="cuda")
    replay = capture(lambda t: t.sin().sum(1), x)
    for seed in range(3):
        x = torch.rand(3, 5, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        assert torch.equal(replay(x), x.sin().sum(1))
