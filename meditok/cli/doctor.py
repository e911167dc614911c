"""`meditok doctor`: versions, kernels, devices, decoders, licences. Never fails, whatever is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform

import click

from .console import write_json
from .options import speaking

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "pillow",
    "pydicom",
    "nibabel",
    "pyarrow",
    "scikit-image",
    "rich",
    "click",
    "triton",
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
)
# What stands in for native.report() where even that cannot be asked.
NO_KERNELS = {
    "native": False,
    "why": "",
    "backend": "none",
    "isa": {"compiled": [], "detected": [], "chosen": None},
    "cuda": {
        "compiled": False,
        "architectures": [],
        "driver_found": None,
        "driver_needed": None,
        "usable": False,
        "backends": [],
    },
    "triton": {"usable": False},
}
# Transfer syntax -> pydicom plugins that decode it.
SYNTAXES = {
    "JPEG Baseline (8 bit)": ("1.2.840.10008.1.2.4.50", "JPEGBaseline8BitDecoder"),
    "JPEG Extended (12 bit)": ("1.2.840.10008.1.2.4.51", "JPEGExtended12BitDecoder"),
    "JPEG Lossless": ("1.2.840.10008.1.2.4.57", "JPEGLosslessDecoder"),
    "JPEG Lossless SV1": ("1.2.840.10008.1.2.4.70", "JPEGLosslessSV1Decoder"),
    "JPEG-LS Lossless": ("1.2.840.10008.1.2.4.80", "JPEGLSLosslessDecoder"),
    "JPEG-LS Near Lossless": ("1.2.840.10008.1.2.4.81", "JPEGLSNearLosslessDecoder"),
    "JPEG 2000 Lossless": ("1.2.840.10008.1.2.4.90", "JPEG2000LosslessDecoder"),
    "JPEG 2000": ("1.2.840.10008.1.2.4.91", "JPEG2000Decoder"),
    "HTJ2K Lossless": ("1.2.840.10008.1.2.4.201", "HTJ2KLosslessDecoder"),
    "HTJ2K": ("1.2.840.10008.1.2.4.203", "HTJ2KDecoder"),
    "RLE Lossless": ("1.2.840.10008.1.2.5", "RLELosslessDecoder"),
}


def report() -> dict:
    """Everything a bug report needs, as plain values; a part that cannot be found out says why instead."""
    from .. import __version__

    kernels = _guarded(_kernels)
    found = {
        "meditok": __version__,
        "notice": "research use, not a medical device",
        "licence": "Apache-2.0 (code; the models' own licences are below)",
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
    }
    # The kernels' own fields stand at the top, where scripts ask for "native", "isa" and "cuda".
    found |= kernels if "error" not in kernels else NO_KERNELS | {"why": kernels["error"]}
    found["device"] = _guarded(_device)
    found["decoders"] = _guarded(_decoders)
    found["models"] = _guarded(_models)
    return found


def _guarded(probe) -> dict:
    try:
        return probe()
    except Exception as error:  # a diagnosis tool reports every fault instead of stopping at it
        return {"error": f"{type(error).__name__}: {error}"}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels() -> dict:
    from .. import native

    return native.report()


def _device() -> dict:
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                }
            )
    return {"default": "cuda" if gpus else "cpu", "gpus": gpus, "torch_cuda": torch.version.cuda}


def _decoders() -> dict:
    if importlib.util.find_spec("pydicom") is None:
        return {"pydicom": "not installed; DICOM files cannot be read: pip install pydicom"}
    from pydicom.pixels import decoders

    found = {}
    for name, (uid, attribute) in SYNTAXES.items():
        decoder = getattr(decoders, attribute, None)
        plugins = list(decoder.available_plugins) if decoder is not None else []
        found[f"{name} ({uid})"] = ", ".join(plugins) or "missing: pip install 'meditok[dicom]'"
    return found


def _models() -> dict:
    from safetensors import safe_open

    from ..models.files import bundled

    found = {}
    for name, weights in bundled().items():
        with safe_open(str(weights), framework="np") as file:
            config = json.loads((file.metadata() or {}).get("meditok", "{}")).get("config", {})
        found[name] = {"licence": config.get("licence"), "intended_use": config.get("intended_use")}
    return found


@click.command("doctor", help="Say what is installed, compiled and usable. Same as `python -m meditok`.")
@speaking
def command(json_out: str | None) -> int:
    found = report()
    write_json(json_out, found)
    if json_out != "-":
        click.echo("\n".join(_lines(found)))
    return 0


def _lines(values: dict, indent: str = "") -> list[str]:
    width = max((len(str(key)) for key in values), default=0)
    lines = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [
                f"{indent}{key}:",
                *(f"{indent}  {' · '.join(map(str, item.values()))}" for item in value),
            ]
        else:
            lines.append(f"{indent}{key:<{width}}  {_plain(value)}")
    return lines


def _plain(value: object) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return "none" if value in (None, "", {}) else str(value)
