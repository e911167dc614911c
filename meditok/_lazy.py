"""Optional parts are imported when first needed, and named in one line when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from meditok.errors import MissingPartError

# Import name -> what pip calls it, where the two differ.
_PACKAGES = {
    "PIL": "pillow",
    "torch.utils.tensorboard": "tensorboard",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "libjpeg": "pylibjpeg-libjpeg",
    "openjpeg": "pylibjpeg-openjpeg",
    "rle": "pylibjpeg-rle",
}


def require(module: str, purpose: str) -> ModuleType:
    """Import `module` (e.g. "PIL.Image") or raise MissingPartError naming the package and the pip command.

    `purpose` completes the sentence "... is needed for <purpose>".
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = _PACKAGES.get(module, module).partition(".")[0]
        package = _PACKAGES.get(top, top)
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == top:
            problem = "is not installed"
        else:
            problem = "is installed but does not import"
        raise MissingPartError(
            f"{package} is needed for {purpose} and {problem}; run: pip install {package}"
        ) from error
