"""meditok: medical images to discrete tokens and back. Research use, not a medical device."""

from __future__ import annotations

import importlib
import os
import sys

__version__ = "0.1.0"

# Public name -> the module that holds it. Loaded on first use, so that `import meditok` stays quick and needs
# neither image readers nor Parquet.
_PUBLIC = {
    "Tokenizer": "models.tokenizer",
    "TokenizerConfig": "models.config",
    "build": "models.files",
    "load": "models.files",
    "convert": "models.convert",
    "MedicalImage": "data",
    "read": "data",
    "frames": "data",
    "Tokens": "tokens",
    "TokenDataset": "tokens.datasets",
    "TokenStream": "tokens.datasets",
    "tokenize": "pipeline",
    "detokenize": "pipeline",
    "ops": None,
    "errors": None,
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'meditok' has no attribute {name!r}")
    module = _PUBLIC[name]
    if module is None:
        value = importlib.import_module(f".{name}", __name__)
    else:
        value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)


# A backend or instruction set asked for is an error at import where it cannot be had. The command line ("-m" while
# `python -m meditok` starts) is left out: it says so in one line of its own, and `meditok doctor` answers regardless.
_command_line = os.path.basename(sys.argv[0] if sys.argv else "") in ("-m", "meditok", "meditok.exe")
if not _command_line and (os.environ.get("MEDITOK_BACKEND") or os.environ.get("MEDITOK_ISA")):
    importlib.import_module(".native", __name__)
