"""Stores: shared work, interruptions, --overwrite, locks, full disks. Every way to one result gives the same bytes."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

import meditok
from meditok.bulk import folder as folders
from meditok.tokens import Tokens
from meditok.tokens.store import open_tokens

SHARDS = ("--size", "32", "--shard-size", "4")


def contents(folder):
    """Name -> bytes of everything in a folder, hidden files and folders included."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def quick_model(tmp_path_factory):
    """Two codebooks and one block: as quick as a model can be."""
    folder = tmp_path_factory.mktemp("quick")
    small = dict(width=64, encoder_depth=1, decoder_depth=1, stage_depths=(1, 1), num_codebooks=2, codebook_size=256)
    meditok.build("tiny", seed=0, **small).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def many(tmp_path, make):
    """19 pictures, a volume of 6 slices, and a picture that is cut."""
    import numpy as np

    folder = tmp_path / "in"
    make.ct_series(folder / "ct", make.noise((24, 24, 6), 500, dtype=np.int16))
    for index in range(19):
        Image.fromarray(make.noise((24 + index, 40), seed=index)).save(folder / f"{index:02d}.png")
    data = (folder / "03.png").read_bytes()
    (folder / "07x.png").write_bytes(data[: len(data) // 2])
    return folder


@pytest.fixture
def launch(quick_model):
    """launch(*arguments) -> a started `python -m meditok tokenize` of the quick model."""
    root = str(Path(meditok.__file__).parents[1])

    def start(*arguments, limit=None, stderr=subprocess.PIPE, **environment):
        command = [sys.executable, "-m", "meditok", "tokenize", *map(str, arguments), "--model", quick_model]
        environment = os.environ | {"PYTHONPATH": root} | environment
        return subprocess.Popen(command, env=environment, stderr=stderr, text=True, preexec_fn=limit)

    return start


def until(found, running, seconds=120):
    """Wait until `found()` or the process has ended."""
    end = time.monotonic() + seconds
    while not found() and running.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("several", [1, 2])
def test_workers_and_batches_change_no_byte_of_a_store(cli, many, tmp_path, quick_model, threads, several):
    """Tokens, order, failures and index are the same with 0, 1, 2 and 4 workers and batches of 1, 3 and 16; workers run
    the model where there is one for each thread, and else the threads do."""
    threads(several)
    runs = {"0": (0, 16), "1": (1, 1), "2": (2, 3), "4": (4, 16)}
    for name, (workers, batch) in runs.items():
        arguments = ["--workers", workers, "--batch-size", batch, "--on-error", "skip", "--model", quick_model]
        code, _, err = cli("tokenize", many, "-o", tmp_path / name, *SHARDS, *arguments)
        assert code == 6 and "found 26 files: 25 ok, 1 failed" in err
    expected = contents(tmp_path / "0")
    assert all(contents(tmp_path / name) == expected for name in runs)
    index = json.loads(expected["store.json"])
    assert [part["rows"] for part in index["parts"]] == [4, 4, 3, 4, 4, 6]
    assert [part["failed"] for part in index["parts"]] == [0, 0, 1, 0, 0, 0]
    assert sorted(expected) == ["failures.jsonl", *(f"part-{i:05d}.parquet" for i in range(6)), "store.json"]


def test_batches_that_change_ids_are_cut_at_parts_so_that_a_resumed_run_agrees(cli, many, tmp_path, quick_model):
    arguments = [*SHARDS, "--no-stable", "--batch-size", 3, "--on-error", "skip", "--model", quick_model]
    assert cli("tokenize", many, "-o", tmp_path / "whole", *arguments)[0] == 6
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "part-00002.parquet").unlink()
    assert cli("tokenize", many, "-o", tmp_path / "cut", *arguments)[0] == 6
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


KILLED = """
    import os, random, signal, sys, time
    from meditok.cli import run
    import meditok.cli.store_run, meditok.bulk.ray_engine, meditok.models.files, meditok.data, pyarrow.parquet
    seed, out, whole, *arguments = sys.argv[1:]
    chance = random.Random(int(seed))

    def start(name):
        child = os.fork()
        if not child:
            os._exit(run(["tokenize", *arguments, "--quiet", "-o", name]))
        return child

    def end(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    began = time.monotonic()
    code = end(start(whole))
    length = time.monotonic() - began
    killed = 0
    for attempt in range(20):
        child = start(out)
        time.sleep(chance.uniform(0, length * (0.3 if attempt < 15 else 1)))
        os.kill(child, signal.SIGKILL)
        killed += end(child) == -signal.SIGKILL
    print(killed, code, end(start(out)))
"""


def test_a_run_killed_at_20_random_moments_and_then_finished_equals_one_that_was_not(many, tmp_path, quick_model):
    """Every attempt goes on where the one before was killed; at the end all files are byte-equal."""
    for index in range(40):
        shutil.copy(many / "00.png", many / f"{index:02d}-again.png")
    root = str(Path(meditok.__file__).parents[1])
    arguments = [many, *SHARDS, "--on-error", "skip", "--workers", "0", "--model", quick_model]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), "1", tmp_path / "killed", tmp_path / "whole", *arguments]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=900
    )
    killed, *codes = map(int, done.stdout.split())
    assert killed >= 10 and codes == [6, 6], done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_run_with_workers_that_is_killed_leaves_no_process_behind_and_can_be_finished(cli, many, tmp_path, launch):
    (many / "07x.png").unlink()
    arguments = [many, *SHARDS, "--workers", 2]
    running = launch(*arguments, "-o", tmp_path / "killed")
    until(lambda: (tmp_path / "killed" / ".part-00000.json").exists(), running)
    family = descendants(running.pid)
    running.kill()
    running.communicate()
    assert launch(*arguments, "-o", tmp_path / "killed").wait() == 0
    assert launch(*arguments, "-o", tmp_path / "whole", "--workers", 0).wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    end = time.monotonic() + 20
    while any(alive(pid) for pid in family):
        assert time.monotonic() < end, "workers outlived the run"
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid):
    """Process ids below `pid`."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_finished_parts_says_how_to_go_on_and_exits_130(many, tmp_path, launch, number):
    (many / "07x.png").unlink()
    for index in range(60):
        shutil.copy(many / "00.png", many / f"{index:03d}-again.png")
    running = launch(many, *SHARDS, "-o", tmp_path / "store", "--workers", 1)
    until(lambda: (tmp_path / "store" / ".part-00000.json").exists(), running)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.strip().count("\n") == 0 and "kept" in err and "run the same command again" in err
    assert (tmp_path / "store" / "part-00000.parquet").exists()
    assert not list((tmp_path / "store").glob("*.tmp")) and not (tmp_path / "store" / ".lock").exists()
    stamp = (tmp_path / "store" / "part-00000.parquet").stat().st_mtime_ns
    again = launch(many, *SHARDS, "-o", tmp_path / "store")
    assert "parts are there already" in again.communicate()[1] or again.returncode == 0
    assert (tmp_path / "store" / "part-00000.parquet").stat().st_mtime_ns == stamp


def interrupt_after(model, monkeypatch, calls):
    """Make the model raise KeyboardInterrupt from its call number `calls` on."""
    tokenize, made = model.tokenize, iter(range(calls))

    def broken(images, **options):
        if next(made, None) is None:
            raise KeyboardInterrupt
        return tokenize(images, **options)

    monkeypatch.setattr(model, "tokenize", broken, raising=False)


def test_overwriting_keeps_the_old_result_until_the_new_one_is_complete(cli, many, tmp_path, patch_model, monkeypatch):
    """An interrupted --overwrite leaves the old store readable; the same command goes on with the new one."""
    arguments = ["tokenize", many, "-o", tmp_path / "store", "--on-error", "skip", *SHARDS]
    assert cli(*arguments)[0] == 6
    (tmp_path / "store" / "notes.txt").write_text("mine")
    old = contents(tmp_path / "store")
    with monkeypatch.context() as patch:
        interrupt_after(patch_model, patch, 10)
        code, _, err = cli(*arguments, "--fit", "stretch", "--overwrite")
    assert code == 130 and "kept" in err
    assert {name: data for name, data in contents(tmp_path / "store").items() if ".overwrite" not in name} == old
    assert len(Tokens.load(tmp_path / "store")) == 25
    assert cli(*arguments, "--fit", "stretch")[0] == 2
    code, _, err = cli(*arguments, "--fit", "stretch", "--overwrite")
    assert code == 6 and "2 of 6 parts are there already" in err
    assert cli(*arguments, "--fit", "stretch", "-o", tmp_path / "fresh")[0] == 6
    made = contents(tmp_path / "store")
    assert made.pop("notes.txt") == b"mine" and made == contents(tmp_path / "fresh")


def test_a_swap_cut_at_any_step_is_finished_by_the_next_run(cli, many, tmp_path, patch_model, monkeypatch):
    arguments = ["tokenize", many, "--on-error", "skip", "--size", "32"]
    assert cli(*arguments, "-o", tmp_path / "old", "--shard-size", 3)[0] == 6
    assert cli(*arguments, "-o", tmp_path / "new", "--shard-size", 4)[0] == 6
    replace, steps = os.replace, 0
    for cut in range(100):
        out = tmp_path / f"cut{cut}"
        shutil.copytree(tmp_path / "old", out)
        shutil.copytree(tmp_path / "new", out / ".overwrite")
        left = iter(range(cut))

        def step(*paths, left=left):
            if next(left, None) is None:
                raise InterruptedError
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(folders.os, "replace", step)
            try:
                folders.finish_swap(out)
            except InterruptedError:
                steps += 1
        assert cli(*arguments, "-o", out, "--shard-size", 4, "--overwrite")[0] == 6
        assert contents(out) == contents(tmp_path / "new")
        if steps == cut:
            break
    assert steps == len(contents(tmp_path / "new"))


def test_a_terminal_is_shown_images_a_second_and_the_time_left(many, tmp_path, launch):
    (many / "07x.png").unlink()
    for index in range(40):
        shutil.copy(many / "00.png", many / f"{index:03d}-again.png")
    leader, follower = os.openpty()
    arguments = [many, *SHARDS, "--workers", 0, "-o", tmp_path / "store"]
    running = launch(*arguments, stderr=follower, COLUMNS="160", TERM="xterm")
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while data := os.read(leader, 65536):
            shown += data
    os.close(leader)
    assert running.wait() == 0 and re.search(rb"tokenising.*65/65.*\d:\d\d:\d\d.*\d\.\d/s", shown), shown[-2000:]


def test_two_runs_on_one_store_are_a_usage_error_in_one_line(cli, many, tmp_path, patch_model):
    with folders.lock(tmp_path / "store"):
        code, _, err = cli("tokenize", many, "-o", tmp_path / "store", *SHARDS)
        assert code == 2 and err.count("\n") == 1 and "another process is writing" in err
    assert not (tmp_path / "store").exists()
    assert cli("tokenize", many, "-o", tmp_path / "store", *SHARDS, "--on-error", "skip")[0] == 6


def test_the_lock_of_a_killed_process_holds_nobody_up(cli, many, tmp_path, patch_model):
    code = f"""
        import fcntl, os
        os.makedirs({str(tmp_path / "store")!r})
        fcntl.flock(os.open({str(tmp_path / "store" / ".lock")!r}, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
        os.kill(os.getpid(), 9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert (tmp_path / "store" / ".lock").exists()
    assert cli("tokenize", many, "-o", tmp_path / "store", *SHARDS, "--on-error", "skip")[0] == 6
    handle = os.open(tmp_path / "store", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(many, tmp_path, launch):
    """The file size limit stands for the disk: a part does not fit, nothing half-written stays."""
    import resource

    (many / "07x.png").unlink()
    arguments = [many, "-o", tmp_path / "store", "--size", 128, "--shard-size", 6, "--workers", 0]
    limited = launch(*arguments, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    _, err = limited.communicate(timeout=120)
    assert limited.returncode == 1 and err.count("\n") == 1 and "free some space" in err
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").glob("*.tmp"))
    assert launch(*arguments).wait() == 0
    assert len(open_tokens(tmp_path / "store")) == 25


@pytest.fixture
def disk(tmp_path):
    """disk(bytes) -> a folder on a file system of its own of that size; a second call gives it another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def sized(size):
        how = ["-o", f"{'remount,' if mounted else ''}size={size}", "-t", "tmpfs", "none", str(folder)]
        done = subprocess.run(["mount", *how], capture_output=True, text=True)
        if done.returncode and not mounted:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(size)
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_file_system_that_is_full_leaves_whole_parts_and_a_run_that_can_go_on(many, tmp_path, launch, disk, share):
    """A tmpfs that holds a tenth of the store, or some of its parts; then one that holds all."""
    (many / "07x.png").unlink()
    arguments = [many, "--size", 128, "--shard-size", 6, "--workers", 0, "-o"]
    assert launch(*arguments, tmp_path / "whole").wait() == 0
    total = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    store = disk(int(total * share)) / "store"
    running = launch(*arguments, store)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 1 and err.count("\n") == 1 and "No space left on device; free some space" in err, err
    left = contents(store) if store.exists() else {}
    assert not [name for name in left if name.endswith((".tmp", ".lock"))]
    parts = [name for name in left if name.endswith(".parquet")]
    assert (len(parts) > 0) == (share > 0.5)
    assert all(left[name] == (tmp_path / "whole" / name).read_bytes() for name in parts)
    disk(1 << 20)
    assert launch(*arguments, store).wait() == 0
    assert contents(store) == contents(tmp_path / "whole")


def test_touched_or_copied_inputs_are_the_same_and_changed_ones_are_not(cli, many, tmp_path, patch_model):
    arguments = ["tokenize", many, "-o", tmp_path / "store", "--on-error", "skip", *SHARDS]
    assert cli(*arguments)[0] == 6
    os.utime(many / "01.png", (1, 1))
    code, _, err = cli(*arguments)
    assert code == 6 and "nothing to do" in err
    data = bytearray((many / "01.png").read_bytes())
    data[-20] ^= 1
    (many / "01.png").write_bytes(data)
    code, _, err = cli(*arguments)
    assert code == 2 and "part-00000.parquet" in err and "--overwrite" in err


def test_lost_and_damaged_parts_of_a_finished_store_are_made_again(cli, many, tmp_path, patch_model):
    arguments = ["tokenize", many, "-o", tmp_path / "store", "--on-error", "skip", *SHARDS]
    assert cli(*arguments)[0] == 6
    whole = contents(tmp_path / "store")
    (tmp_path / "store" / "part-00001.parquet").unlink()
    damaged = bytearray(whole["part-00003.parquet"])
    damaged[100] ^= 1
    (tmp_path / "store" / "part-00003.parquet").write_bytes(damaged)
    code, _, err = cli(*arguments)
    assert code == 6 and "4 of 6 parts are there already" in err
    assert contents(tmp_path / "store") == whole


def test_an_unfinished_store_of_other_options_is_refused_without_overwrite(
    cli, many, tmp_path, patch_model, monkeypatch
):
    arguments = ["tokenize", many, "-o", tmp_path / "store", *SHARDS]
    code, _, _ = cli(*arguments)
    assert code == 3 and (tmp_path / "store" / ".part-00000.json").exists()
    assert cli(*arguments, "--fit", "stretch")[0] == 2
    assert cli(*arguments, "--fit", "stretch", "--on-error", "skip", "--overwrite")[0] == 6
    assert len(Tokens.load(tmp_path / "store")) == 25
