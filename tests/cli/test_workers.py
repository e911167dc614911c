"""Reading in worker processes: order, bounded memory, deaths and defects, and what a worker must not import."""

import textwrap
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from meditok.bulk.reading import Reader
from meditok.bulk.workers import cut, default_workers, stream
from meditok.data import discover
from meditok.errors import WorkerError
from meditok.tokens.keys import Namer

FUNCTIONS = """
    import os, signal, sys, time, warnings

    def double(task):
        time.sleep(0.003 * (task.value % 3))
        for part in range(task.value % 4):
            yield task.value, part

    def marked(item):
        return "marked", item

    def die(task):
        if task.value == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield task.value

    def fail(task):
        if task.value == 5:
            raise KeyError("secret value")
        yield task.value

    def slow(task):
        time.sleep(0.01 if task.value else 0.6)
        yield task.value, os.getpid()

    def large(task):
        for _ in range(200):
            yield bytes(1 << 20), os.getpid()

    def modules(task):
        from meditok.bulk.preload import reading
        yield sorted(name for name in sys.modules if name.startswith(("meditok.cli", "meditok.train", "click", "rich")))
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module that worker processes can import, too."""
    (tmp_path / "worker_functions.py").write_text(textwrap.dedent(FUNCTIONS))
    monkeypatch.syspath_prepend(tmp_path)
    import worker_functions

    return worker_functions


def tasks(count):
    return [SimpleNamespace(value=value, path=f"file-{value}") for value in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_items_come_in_the_order_of_the_tasks_whoever_is_faster(functions, workers):
    expected = [(value, part) for value in range(40) for part in range(value % 4)]
    assert list(stream(functions.double, tasks(40), workers)) == expected


def test_workers_pass_items_through_a_function_until_one_of_them_has_nothing_to_do(functions):
    found = list(stream(functions.double, tasks(80), 2, then=functions.marked))
    expected = [(value, part) for value in range(80) for part in range(value % 4)]
    assert [item[1] if item[0] == "marked" else item for item in found] == expected
    assert sum(item[0] == "marked" for item in found) > len(expected) / 2


def test_the_next_tasks_go_to_the_worker_that_is_free(functions):
    """One task takes as long as all others: its worker does little else."""
    found = list(stream(functions.slow, tasks(60), 2))
    assert [value for value, _ in found] == list(range(60))
    slow = found[0][1]
    assert sum(pid == slow for _, pid in found) < 20


def test_a_worker_that_is_killed_is_an_error_that_names_its_file(functions):
    with pytest.raises(WorkerError, match="file-5: the process that read it died .signal 9"):
        list(stream(functions.die, tasks(20), 2))


def test_a_defect_in_a_worker_names_the_file_and_the_place_and_quotes_nothing(functions):
    with pytest.raises(WorkerError, match=r"file-5: .*KeyError at worker_functions.py:\d+") as caught:
        list(stream(functions.fail, tasks(20), 2))
    assert "secret" not in str(caught.value)


def test_workers_that_are_ahead_wait_and_end_when_the_stream_is_closed(functions):
    """200 MiB a task are offered; nobody takes more than one item."""
    from pathlib import Path

    from tests.cli.test_store_runs import alive

    with closing(stream(functions.large, tasks(8), 2)) as items:
        _, pid = next(items)
        time.sleep(1)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        assert resident < 2**30
    assert not alive(pid)


def test_a_worker_process_imports_no_command(functions):
    assert list(stream(functions.modules, tasks(1), 1)) == [[]]


def test_bundles_hold_so_many_pictures_or_one_task():
    assert cut([1] * 5, 2) == [(0, 2), (2, 4), (4, 5)]
    assert cut([9, 1, 1, 9], 4) == [(0, 1), (1, 3), (3, 4)]
    assert cut([], 4) == []


def test_few_files_start_no_process_and_many_do():
    assert default_workers(10, share=0.5) == 0
    assert default_workers(10_000, share=0.5) >= 1


def test_a_file_that_changes_while_it_is_read_fails(make, tmp_path):
    Image.fromarray(make.noise((40, 40))).save(tmp_path / "x.png")
    source = discover([tmp_path]).sources[0]
    items = Reader(32, "pad", (), Namer(b"k"), hashing=True)(source)
    assert next(items).pixels.shape == (3, 32, 32)
    (tmp_path / "x.png").write_bytes(b"other")
    changed, end = items
    assert "changed while it was read" in str(changed.error) and end.end.files


def test_headers_read_by_several_processes_are_those_read_by_one(make, tmp_path):
    """A series with a gap, single slices, a file that is cut, one without pixels: the same sources, failures, notes."""
    import numpy as np
    import pydicom

    make.ct_series(tmp_path / "ct", make.noise((24, 24, 9), 500, dtype=np.int16), missing=(4,))
    for index in range(6):
        make.ct(tmp_path / f"{index}.dcm", make.noise((20, 20), 500, dtype=np.int16), series=f"1.2.{index}")
    (tmp_path / "0.dcm").write_bytes((tmp_path / "0.dcm").read_bytes()[:400])
    data = pydicom.dcmread(tmp_path / "1.dcm")
    del data.PixelData
    data.save_as(tmp_path / "1.dcm")
    one, several = discover([tmp_path]), discover([tmp_path], through=lambda f, t: stream(f, t, 2))
    assert [vars(source) for source in several.sources] == [vars(source) for source in one.sources]
    assert [(path, str(error)) for path, error in several.failed] == [(path, str(error)) for path, error in one.failed]
    assert (several.ignored, several.warnings, several.names) == (one.ignored, one.warnings, one.names)
    assert len(one.failed) == 1 and len(one.ignored) == 1 and "gap" in one.warnings[0]


def test_pixels_cross_a_pipe_bit_for_bit_grey_ones_as_one_channel(make, tmp_path):
    import pickle

    Image.fromarray(make.noise((40, 50))).save(tmp_path / "grey.png")
    Image.fromarray(make.noise((40, 50, 3))).save(tmp_path / "rgb.png")
    for source, size in zip(discover([tmp_path]).sources, (1, 3), strict=True):
        item = next(Reader(32, "pad", (), Namer(b"k"))(source))
        data = pickle.dumps(item)
        assert torch.equal(pickle.loads(data).pixels, item.pixels)
        assert size * 4096 < len(data) < size * 4096 + 4096
