"""Files that appear whole or not at all."""

import os
import signal
import subprocess
import sys

import pytest

from meditok.atomic import atomic_path, remove_leftovers


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and target.read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    code = (
        "import os, signal, sys; from meditok.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"])
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    with atomic_path(tmp_path / "a.txt") as temporary:
        remove_leftovers(tmp_path / "a.txt")
        assert list(tmp_path.iterdir()) == [temporary]
