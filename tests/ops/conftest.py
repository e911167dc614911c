"""The CUDA kernels on the CPU, built once for all test files that run them."""

from __future__ import annotations

import os
import shutil

import pytest

from meditok import native

from .emulation import build
from .helpers import ROOT, levels_here


def emulated(tmp_path_factory, op: str):
    if shutil.which("g++") is None or os.uname().machine != "x86_64":
        pytest.skip("g++ on x86_64 is needed")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the C++ sources are not beside the tests")
    return build(tmp_path_factory.mktemp("cuda"), op)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The kernels of csrc/vq compiled by g++ against tests/ops/cuda_emulation."""
    return emulated(tmp_path_factory, "vq")


@pytest.fixture(scope="session")
def attention_kernels(tmp_path_factory):
    """The kernels of csrc/attention, likewise."""
    return emulated(tmp_path_factory, "attention")


@pytest.fixture(params=levels_here() or ["reference"])
def level(request):
    """Every level of this build and machine in turn, then the one chosen at import again."""
    if request.param != "reference":
        native.core.choose_isa(request.param)
    yield request.param
    if request.param != "reference":
        native.core.choose_isa(native.isa)
