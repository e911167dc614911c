"""CUDA graphs for calls that come again with the same shape: one launch instead of a thousand."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable

import torch

Run = Callable[[torch.Tensor], torch.Tensor]


def capture(run: Run, x: torch.Tensor) -> Run:
    """`run` for inputs of x's shape, dtype and device, recorded once; kernels have been warmed up by earlier calls."""
    held = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(held)

    def replay(x: torch.Tensor) -> torch.Tensor:
        held.copy_(x)
        graph.replay()
        return out.clone()

    return replay


class GraphCache:
    """Runs a function eagerly until an input shape has come `warm` times, then by the graph captured for it.

    key: whatever else the result depends on: the call, its precision, the weights' versions. At most `limit` graphs are
    held, the one used longest ago goes first. Nothing is captured while autograd or torch.compile is at work.
    """

    def __init__(self, warm: int = 2, limit: int = 8, capture: Callable[[Run, torch.Tensor], Run] = capture):
        self.warm, self.limit, self.capture = warm, limit, capture
        self.seen: Counter[Hashable] = Counter()
        self.graphs: OrderedDict[Hashable, Run] = OrderedDict()

    def __call__(self, key: Hashable, run: Run, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not len(x):
            return run(x)
        key = key, tuple(x.shape), x.dtype, x.device
        if key not in self.graphs:
            self.seen[key] += 1
            if self.seen[key] <= self.warm:
                return run(x)
            self.graphs[key] = self.capture(run, x)
            del self.seen[key]
            if len(self.graphs) > self.limit:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return self.graphs[key](x)
