"""What a built module holds: linkage, CUDA architectures, one PTX, no register spills.

The module examined is MEDITOK_BUILT_MODULE=path (an _core*.so or a wheel), else the loaded core. The CUDA
checks read its cubins with cuobjdump (PyPI package nvidia-cuda-cuobjdump, or a CUDA toolkit) and need no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest

from meditok import native

SPILL_FREE = (
    "assign_small_dim_kernel",
    "assign_large_dim_kernel",
    "lookup_kernel",
    "pack_kernel",
    # the training path; kernels of the same name in several files are all looked at
    "count_kernel",
    "place_kernel",
    "order_kernel",
    "finish_kernel",
    "loss_kernel",
    "step_kernel",
    "norms_kernel",
    "rows_kernel",
    "sum_kernel",
    "codes_kernel",
    "any_kernel",
    "counts_kernel",
    "template_op_kernel",
)
# CMake's name -> cubin architecture; "virtual" ones are PTX.
DEFAULT_ARCHITECTURES = {"sm_75", "sm_80", "sm_90a", "sm_100", "sm_120"}
DEFAULT_PTX = {"sm_80"}


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    given = os.environ.get("MEDITOK_BUILT_MODULE")
    if given and given.endswith(".whl"):
        folder = tmp_path_factory.mktemp("wheel")
        with zipfile.ZipFile(given) as wheel:
            names = [name for name in wheel.namelist() if re.fullmatch(r"meditok/_core.*\.so", name)]
            assert len(names) == 1, f"{given} holds {names or 'no compiled core'}"
            return Path(wheel.extract(names[0], folder))
    if given:
        return Path(given)
    if native.core is None:
        pytest.skip("the compiled core is not built, and MEDITOK_BUILT_MODULE names none")
    return Path(native.core.__file__)


@pytest.fixture(scope="module")
def cuobjdump(module):
    """cuobjdump(option) -> its output for the module; skips where there is no CUDA code or no tool."""
    if b".nv_fatbin" not in module.read_bytes():
        pytest.skip(f"{module.name} was built without CUDA")
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    tool = shutil.which("cuobjdump") or (str(packaged[0]) if packaged else None)
    if tool is None:
        pytest.skip("cuobjdump is not installed (pip install nvidia-cuda-cuobjdump)")
    return lambda option: subprocess.run([tool, option, module], capture_output=True, text=True).stdout


def test_nothing_of_cuda_or_torch_is_linked(module):
    """The module needs the C and C++ runtimes only, so it loads without a driver and beside any torch."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed (Debian package binutils)")
    text = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", text)
    allowed = (
        "libc.",
        "libm.",
        "libstdc++.",
        "libgcc_s.",
        "libpthread.",
        "librt.",
        "libdl.",
        "ld-linux",
        "libasan.",
        "libubsan.",
    )
    assert needed and all(name.startswith(allowed) for name in needed), needed


def test_the_module_exports_its_init_function_only(module):
    """Hidden visibility: no symbol of ours can be taken for another library's."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed (Debian package binutils)")
    text = subprocess.run(["nm", "-D", "--defined-only", module], capture_output=True, text=True, check=True).stdout
    ours = [line.split()[-1] for line in text.splitlines() if "meditok" in line or "PyInit" in line]
    assert ours == ["PyInit__core"], ours


def test_architectures_and_one_ptx(cuobjdump):
    """Machine code for every default architecture, and PTX of exactly one for those to come."""
    assert set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("-lelf"))) == DEFAULT_ARCHITECTURES
    assert set(re.findall(r"\.(sm_\w+)\.ptx", cuobjdump("-lptx"))) == DEFAULT_PTX


def test_hot_kernels_do_not_spill(cuobjdump):
    """Neither stack nor local memory in any kernel, on any architecture."""
    usage = cuobjdump("-res-usage")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    for kernel in SPILL_FREE:
        copies = [entry for entry in found if kernel in entry[0]]
        assert len(copies) >= len(DEFAULT_ARCHITECTURES), f"{kernel} is missing on some architecture"
        spilled = [entry for entry in copies if entry[2] != "0" or entry[3] != "0"]
        assert not spilled, f"{kernel} uses stack or local memory: {spilled}"
