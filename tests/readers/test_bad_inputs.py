"""Every bad input fails with its named error, in one line, and is predicted by a dry run."""

import subprocess
import sys
import textwrap
import warnings

import pytest

from meditok.data import ReadOptions, discover, frames
from meditok.errors import MeditokError
from tests.readers.bad_inputs import BAD_INPUTS
from tests.readers.memory import PEAK_GIB

_READ = [entry for entry in BAD_INPUTS if not entry[0].startswith("B30")]


@pytest.mark.parametrize(("name", "make", "error", "code", "options"), _READ, ids=[entry[0] for entry in _READ])
def test_frames_raises_the_named_error_in_one_line(tmp_path, name, make, error, code, options):
    """The error has the stated class and exit code; its message starts with the path and is one line."""
    path = make(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing else may speak up
        with pytest.raises(MeditokError) as caught:
            list(frames(path, **options))
    assert type(caught.value) is error and caught.value.exit_code == code, caught.value
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    ("name", "make", "error", "code", "options"), BAD_INPUTS, ids=[entry[0] for entry in BAD_INPUTS]
)
def test_a_dry_run_predicts_the_failure(tmp_path, name, make, error, code, options):
    """discover and probe name the same error that reading raises, and nothing is written."""
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = discover([path], ReadOptions(**options))
    failures = [(type(problem).__name__, problem.exit_code) for _, problem in found.failed]
    failures += [
        (record["error_type"], record["exit_code"])
        for source in found.sources
        for record in source.probe()
        if record["error"]
    ]
    assert (error.__name__, code) in failures
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["B2", "B11", "B12-deep", "B21-bomb", "B21-huge"])
def test_bombs_stop_under_a_gibibyte_and_five_seconds(tmp_path, name):
    """Peak memory of a fresh process beyond its imports, and the time of the read, stay bounded."""
    entry = next(entry for entry in BAD_INPUTS if entry[0] == name)
    path = entry[1](tmp_path)
    script = textwrap.dedent(f"""
        import time
        from meditok.data import frames
        from meditok.errors import UnsafeFileError
        import pydicom, nibabel, PIL.Image
        start = time.monotonic()
        try:
            list(frames({str(path)!r}))
        except UnsafeFileError:
            print(time.monotonic() - start, peak_gib())
    """)
    command = [sys.executable, "-c", PEAK_GIB + script]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 5 and float(out[1]) < 1.0, out
