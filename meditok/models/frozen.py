"""Networks that are read and never trained: where their files lie, how they are loaded, and what keeps them still."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import BadInputError, MissingPartError
from .convert import read_checkpoint
from .files import abridged, check_safetensors, misfits

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of values in [0, 1]


class Frozen(nn.Module):
    """A module whose weights take no gradient and which stays in evaluation mode whatever its owner does."""

    def freeze(self):
        """Call at the end of the constructor, or once the weights are in; returns self."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True):
        return super().train(False)


def affine_to_imagenet() -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), each (1, 3, 1, 1) float32: scale * x + shift takes [-1, 1] to ImageNet's zero mean, unit std."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return 0.5 / std, (0.5 - mean) / std


def package_file(package: str, name: str, purpose: str, install: str) -> Path:
    """Path of file `name` shipped by an installed package, which is located and never imported.

    MissingPartError with `install` ("pip install ...") where the package or the file is not there.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, name)
        if path.is_file():
            return path
    raise MissingPartError(f"{purpose}: its weights come with the package {package}, which is not here; run: {install}")


def given_file(path: str | os.PathLike, purpose: str, source: str, passed: str) -> Path:
    """`path` if it is a file; MissingPartError saying where to get it (`source`) and how it is `passed` otherwise."""
    if not path:
        raise MissingPartError(f"{purpose}: needs a weights file and none was given; get {source} and pass {passed}")
    if not Path(path).is_file():
        raise MissingPartError(f"{purpose}: no weights file {str(path)!r}; get {source} and pass {passed}")
    return Path(path)


def read_state(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file, or of a .pth file of plain tensors, whose key starts with `prefix` (cut off).

    Floating tensors come as float32. UnsafeFileError: a pickle of anything but plain tensors (nothing of it is run),
    or a safetensors header that lies; BadInputError: damaged, or no such key.
    """
    if path.suffix == ".safetensors":
        check_safetensors(path)
        try:
            content = load_file(path)
        except SafetensorError as error:
            raise BadInputError(f"{path}: damaged safetensors file ({error}); copy it again") from None
    else:
        content = read_checkpoint(path)
        content = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    state = {
        key.removeprefix(prefix): value.float() if value.is_floating_point() else value
        for key, value in content.items()
        if key.startswith(prefix) and isinstance(value, torch.Tensor)
    }
    if not state:
        raise BadInputError(f"{path}: no key {prefix + '*'!r}; it holds {abridged(content) or 'nothing'}")
    return state


def load_exactly(module: nn.Module, state: dict[str, torch.Tensor], where, what: str, ignore: tuple[str, ...] = ()):
    """Fill `module` with `state`, leaving out keys that start with one of `ignore`; returns the module.

    BadInputError names in one line what is missing, unexpected or of another shape.
    """
    state = {key: value for key, value in state.items() if not key.startswith(ignore)} if ignore else state
    if problems := misfits({key: value.shape for key, value in module.state_dict().items()}, state):
        raise BadInputError(f"{where}: weights do not fit {what}: " + abridged(problems))
    module.load_state_dict(state)
    return module
