"""The one loader of the compiled core `meditok._core`, and the one place that chooses what runs.

Importing this module never fails because the core is missing, broken or stale: one warning names the reason
and the PyTorch reference runs instead. Two environment variables, read once here, force a choice and do
raise: `MEDITOK_BACKEND` (auto, native, triton, reference) and `MEDITOK_ISA` (scalar, avx2, avx512,
avx512vnni, neon).

| MEDITOK_BACKEND | CPU (`backend`)                           | CUDA (`cuda_backend`)                                 |
|-----------------|-------------------------------------------|-------------------------------------------------------|
| auto            | native, else reference                    | native, else triton, else reference, with one warning |
| native          | native, else an error at import           | native, else an error at the first call               |
| triton          | reference (Triton has no CPU; interpreted | triton, else an error at import                       |
|                 | if TRITON_INTERPRET=1)                    |                                                       |
| reference       | reference                                 | reference                                             |
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

INTERFACE = 7  # number of the entry points' signatures; a core built from other sources is not called
BACKENDS = ("auto", "native", "triton", "reference")
LEVELS = ("scalar", "avx2", "avx512", "avx512vnni", "neon")
WISH = os.environ.get("MEDITOK_BACKEND", "auto") or "auto"


def _load() -> tuple[ModuleType | None, str]:
    """The compiled core and "", or None and why it cannot be used."""
    try:
        from meditok import _core
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            return (
                None,
                "meditok._core is not built (a wheel made with MEDITOK_NATIVE=OFF, or a bare source tree)",
            )
        return None, f"meditok._core does not load: {error}"
    found = getattr(_core, "build_info", dict)().get("interface")
    if found != INTERFACE:
        return (
            None,
            f"meditok._core has interface {found}, this Python code needs {INTERFACE}; build it again",
        )
    return _core, ""


def triton_problem() -> str:
    """ "" when Triton is installed, else the reason in one line."""
    return "" if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton)"


def _choose() -> tuple[ModuleType | None, str, str, str | None]:
    """(core, why not, backend, isa) after the environment's wishes."""
    level = os.environ.get("MEDITOK_ISA", "")
    if WISH not in BACKENDS:
        raise ImportError(f"MEDITOK_BACKEND={WISH} is not one of {', '.join(BACKENDS)}")
    if level and level not in LEVELS:
        raise ImportError(f"MEDITOK_ISA={level} is not one of {', '.join(LEVELS)}")
    if WISH == "triton" and (problem := triton_problem()):
        raise ImportError(f"MEDITOK_BACKEND=triton, but {problem}")
    core, why = _load()
    if WISH == "native" and core is None:
        raise ImportError(f"MEDITOK_BACKEND=native, but {why}")
    isa = None
    if core is not None:
        try:
            isa = core.choose_isa(level)
        except ValueError as error:
            raise ImportError(f"MEDITOK_ISA={level}: {error}") from None
    if WISH in ("reference", "triton"):
        return core, f"MEDITOK_BACKEND={WISH}", WISH, None
    if core is None:
        instead = "its slower PyTorch reference, on CUDA Triton where installed"
        warnings.warn(f"{why}; meditok uses {instead}", RuntimeWarning, stacklevel=2)
        return None, why, "reference", None
    return core, "", "native", isa


core, why, backend, isa = _choose()


def threads() -> int:
    """Threads a CPU kernel may use in a call made now: torch's own setting."""
    return torch.get_num_threads()


def cpu_backend() -> str:
    """ "native", "triton" (its interpreter) or "reference": what runs on the CPU."""
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return "reference" if backend == "triton" and not interpreted else backend


@functools.cache
def cuda_problem() -> str:
    """ "" when the compiled CUDA kernels can run here, else the reason, naming what was found and what is
    needed."""
    if core is None or backend != "native":
        return why
    info = core.cuda_info()
    if not info["compiled"]:
        return "meditok._core was built without CUDA"
    if info["driver"] < info["driver_needed"]:
        driver = f"the NVIDIA driver supports CUDA up to {_cuda_version(info['driver'])}"
        found = driver if info["driver"] else "no NVIDIA driver was found"
        return f"{found}, the kernels need one for CUDA {_cuda_version(info['driver_needed'])}"
    return ""


def _cuda_choice(device: int) -> tuple[str, str]:
    """(what runs on this CUDA device, why nothing faster does)."""
    if WISH in ("reference", "triton"):
        return WISH, why
    problem = cuda_problem() or core.cuda_problem(device)
    if not problem:
        return "native", ""
    missing = triton_problem()
    return ("reference", f"{problem}; {missing}") if missing else ("triton", problem)


@functools.cache
def cuda_backend(device: int) -> str:
    """ "native", "triton" or "reference": what runs on this CUDA device. Warns once where it is not the first;
    RuntimeError where MEDITOK_BACKEND=native asked for nothing else."""
    chosen, reason = _cuda_choice(device)
    if reason and WISH == "native":
        raise RuntimeError(f"MEDITOK_BACKEND=native, but on cuda:{device} {reason}")
    if reason and WISH == "auto" and core is not None:  # a missing core was told at import
        instead = "Triton kernels" if chosen == "triton" else "slower PyTorch reference"
        warnings.warn(f"{reason}; meditok uses its {instead} on cuda:{device}", RuntimeWarning, stacklevel=3)
    return chosen


def cuda_usable(device: int) -> bool:
    """Whether the compiled CUDA kernels run on this device."""
    return cuda_backend(device) == "native"


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@contextmanager
def count_calls() -> Iterator[dict[str, int]]:
    """Counts the calls of every native entry inside the block: `with count_calls() as calls: ...;
    calls["vq_assign"]`."""
    before = core.call_counts() if core is not None else {}
    calls: dict[str, int] = {}
    try:
        yield calls
    finally:
        after = core.call_counts() if core is not None else {}
        calls.update({name: count - before.get(name, 0) for name, count in after.items()})


def report() -> dict[str, Any]:
    """Everything `meditok doctor` tells about the kernels; plain values, ready for JSON."""
    build = core.build_info() if core is not None else {}
    cuda = (
        core.cuda_info()
        if core is not None
        else {"compiled": False, "architectures": "", "driver": 0, "driver_needed": 0}
    )
    problem = cuda_problem()
    return {
        "native": backend == "native",
        "why": why,
        "backend": backend,
        "isa": {
            "compiled": list(build.get("isa_compiled", [])),
            "detected": list(build.get("isa_detected", [])),
            "chosen": isa,
        },
        "cuda": {
            "compiled": bool(cuda["compiled"]),
            "architectures": [name for name in cuda["architectures"].split(",") if name],
            "driver_found": _cuda_version(cuda["driver"]) if cuda["driver"] else None,
            "driver_needed": _cuda_version(cuda["driver_needed"]) if cuda["driver_needed"] else None,
            "usable": not problem,
            "why": problem,
            "backends": [_cuda_choice(device)[0] for device in range(torch.cuda.device_count())],
        },
        "triton": {"usable": not triton_problem(), "why": triton_problem()},
        "threads": threads(),
        "build": {name: value for name, value in build.items() if not name.startswith("isa_")},
    }
