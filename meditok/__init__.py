"""meditok: medical images to discrete tokens and back. Research use, not a medical device."""

from __future__ import annotations

import importlib

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
