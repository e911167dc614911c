"""The loader of the compiled core: what runs, what is told about it, and how it falls back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import meditok
from meditok import native, ops

PACKAGE = Path(meditok.__file__).resolve().parent
USE = "import torch; from meditok import native, ops; ops.vq_assign(torch.zeros(1, 1, 2), torch.ones(1, 3, 2)); print("


def run(code: str, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MEDITOK_")}
    env |= {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=path, timeout=120)


@pytest.fixture
def without_core(tmp_path):
    """A copy of the package without its compiled core."""
    (tmp_path / "meditok").mkdir()
    for name in ("__init__.py", "errors.py", "native.py"):
        shutil.copy(PACKAGE / name, tmp_path / "meditok" / name)
    shutil.copytree(PACKAGE / "ops", tmp_path / "meditok/ops", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.skipif(os.environ.get("MEDITOK_ALLOW_REFERENCE") == "1", reason="MEDITOK_ALLOW_REFERENCE=1")
def test_the_compiled_core_is_what_runs():
    """The suite tests the compiled core; MEDITOK_ALLOW_REFERENCE=1 lets it run without one."""
    assert native.core is not None and native.backend == "native", native.why


def test_a_process_that_a_test_starts_runs_what_the_test_runs():
    """Not the sources in the folder the suite was started from, which hold no compiled core."""
    code = "import meditok; print(meditok.__file__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert os.path.samefile(told.strip(), meditok.__file__)


def test_a_missing_core_falls_back_with_one_warning(without_core):
    """No core: the reference runs, and exactly one warning says so."""
    result = run(USE + "native.backend, native.isa)", without_core)
    assert result.stdout.split() == ["reference", "None"], result.stderr
    assert result.stderr.count("RuntimeWarning") == 1 and "not built" in result.stderr


def test_a_broken_core_falls_back_with_one_warning(without_core):
    """A core that does not load is named in the warning and not used."""
    (without_core / "meditok/_core.abi3.so").write_bytes(b"not a library")
    result = run(USE + "native.backend)", without_core)
    assert result.stdout.split() == ["reference"], result.stderr
    assert result.stderr.count("RuntimeWarning") == 1 and "does not load" in result.stderr


@pytest.mark.parametrize("core, found", [("def build_info(): return {'interface': -1}", "-1"), ("", "None")])
def test_a_core_of_other_sources_is_not_called(without_core, core, found):
    """Another interface number, or none at all: the core is left alone."""
    (without_core / "meditok/_core.py").write_text(core)
    result = run(USE + "native.backend)", without_core)
    assert result.stdout.split() == ["reference"] and f"interface {found}" in result.stderr


@pytest.mark.parametrize("statement", ["import meditok", "import meditok.ops"])
def test_native_without_a_core_is_an_import_error(without_core, statement):
    """MEDITOK_BACKEND=native never falls back."""
    result = run(statement, without_core, MEDITOK_BACKEND="native")
    assert result.returncode != 0 and "ImportError: MEDITOK_BACKEND=native" in result.stderr


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"MEDITOK_BACKEND": "fast"}, "MEDITOK_BACKEND=fast is not one of"),
        ({"MEDITOK_ISA": "sse9"}, "MEDITOK_ISA=sse9 is not one of"),
    ],
)
def test_unknown_wishes_are_errors(environment, words):
    """A value that means nothing here is an ImportError of one line."""
    result = run("import meditok.ops", **environment)
    assert result.returncode != 0 and words in result.stderr.strip().splitlines()[-1]


def test_the_reference_can_be_asked_for_without_a_warning():
    """MEDITOK_BACKEND=reference is silent, and no native kernel runs."""
    result = run(
        USE + "native.backend, sum(native.core.call_counts().values()) if native.core else 0)",
        MEDITOK_BACKEND="reference",
    )
    assert result.stdout.split() == ["reference", "0"] and "Warning" not in result.stderr


def test_report_is_ready_for_json():
    """Everything doctor prints: backend, levels, CUDA, threads, build."""
    report = json.loads(json.dumps(native.report()))
    assert report["backend"] == native.backend and report["native"] == (native.backend == "native")
    assert set(report["isa"]) == {"compiled", "detected", "chosen"}
    assert set(report["cuda"]) == {
        "compiled",
        "architectures",
        "driver_found",
        "driver_needed",
        "usable",
        "why",
        "backends",
    }
    assert set(report["triton"]) == {"usable", "why"}
    if native.core is not None:
        assert "scalar" in report["isa"]["compiled"] and report["build"]["interface"] == native.INTERFACE
        assert report["cuda"]["usable"] or report["cuda"]["why"]


@pytest.mark.skipif(native.core is None, reason="the compiled core is not built")
def test_sizes_of_packed_codebooks_agree():
    """The Python formula and the core's layout are the same: the core writes its last byte inside the
    buffer."""
    import torch

    for groups, codes, width in [(1, 1, 1), (2, 33, 3), (8, 4096, 8), (1, 100, 700)]:
        packed = ops.pack_codebook(torch.ones(groups, codes, width)).packed
        assert packed.numel() == native.core.vq_packed_bytes(groups, codes, width)
