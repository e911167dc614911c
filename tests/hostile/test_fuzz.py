"""A fixed budget of mutated files through every reader: only MeditokError comes out, in bounded time and memory.

MEDITOK_FUZZ_EXAMPLES and MEDITOK_FUZZ_SEED ask for more or for others.
"""

import os

import pytest

from tests.hostile.fuzz import watch

EXAMPLES = int(os.environ.get("MEDITOK_FUZZ_EXAMPLES", "150"))
SEED = int(os.environ.get("MEDITOK_FUZZ_SEED", "0"))
# One process a group, since starting one costs as much as hundreds of examples.
GROUPS = {
    "pictures": ["png", "jpeg", "tiff", "bmp", "npy"],
    "scans": ["dicom", "nifti", "nifti-gzip"],
    "containers": ["tar", "csv", "parquet", "tokens", "store"],
}


@pytest.mark.parametrize("group", GROUPS)
def test_no_mutated_file_crashes_hangs_or_swells_a_reader(group):
    print(f"seed {SEED}, {EXAMPLES} examples of each of {GROUPS[group]}")
    problem = watch(GROUPS[group], SEED, 0, EXAMPLES)
    assert not problem, problem
