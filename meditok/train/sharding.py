"""Weights spread over the processes, for models whose weights, gradients and moments do not fit one device.

Modules that a task names (the transformer blocks, 93 % of the large model) are sharded by torch's FSDP2: each process
keeps a part of every weight, its gradient and its moments, and gathers a block's weights while it computes with them.
Everything else stays whole on every process, and its gradients are averaged once a step. Checkpoints and exported
weights hold full tensors, whatever they were trained on.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .distributed import World


def shard(blocks: Iterable[nn.Module], world: World) -> None:
    """Shard the parameters of each block over all processes, in place; make optimisers afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)


def hold_gradients(module: nn.Module, *, reduce: bool) -> None:
    """Whether the next backward pass spreads the gradients of sharded blocks: only the last micro-batch's does."""
    for part in module.modules():
        if hasattr(part, "set_requires_gradient_sync"):
            part.set_requires_gradient_sync(reduce, recurse=False)


@torch.no_grad()
def average_whole_gradients(module: nn.Module, world: World) -> None:
    """Average over the processes what is not sharded; the same collectives on every process, gradient or not."""
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            world.average_(parameter.grad)


@torch.no_grad()
def clip_gradients(module: nn.Module, limit: float, world: World) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ over sharded and whole gradients together; returns the norm before."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    parts = {True: [], False: []}
    for gradient in gradients:
        parts[isinstance(gradient, DTensor)].append(local(gradient))
    squares = [sum((g.float().square().sum() for g in parts[sharded]), torch.zeros((), device=world.device))
               for sharded in (True, False)]  # fmt: skip
    if world.size > 1:
        dist.all_reduce(squares[0])
    norm = (squares[0] + squares[1]).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in parts[True] + parts[False]:
        gradient.mul_(factor)
    return norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process; any other tensor itself. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """A full tensor spread as `pattern` is."""
    if not isinstance(pattern, DTensor):
        return value
    return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements)
