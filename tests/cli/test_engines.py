"""torchrun and Ray make the store that one process makes, byte for byte."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import meditok
from tests.cli.test_store_runs import contents, descendants, quick_model, until  # noqa: F401

ROOT = str(Path(meditok.__file__).parents[1])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    import numpy as np

    folder = tmp_path_factory.mktemp("in")
    for index in range(60):
        noise = np.random.default_rng(index).integers(0, 256, (24 + index % 9, 40), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index:02d}.png")
    (folder / "07x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "31x.png").write_bytes((folder / "31.png").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def alone(inputs, quick_model, tmp_path_factory):  # noqa: F811
    """The store that one process makes, and the arguments that make it."""
    folder = tmp_path_factory.mktemp("alone")
    key = folder / "key"
    key.write_bytes(b"a key for tests")
    key.chmod(0o600)
    environment = os.environ | {"PYTHONPATH": ROOT, "MEDITOK_KEY_FILE": str(key)}
    arguments = ["-m", "meditok", "tokenize", inputs, "--size", "32", "--shard-size", "4", "--on-error", "skip"]
    arguments = [*map(str, arguments), "--model", quick_model, "--workers", "0", "-o"]
    done = subprocess.run([sys.executable, *arguments, str(folder / "store")], env=environment)
    assert done.returncode == 6
    return contents(folder / "store"), arguments, environment


def test_ranks_of_torchrun_share_the_parts_and_make_the_same_store(alone, tmp_path):
    expected, arguments, environment = alone
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, *arguments, str(tmp_path / "s"), "--engine", "torchrun", "--json", str(tmp_path / "report")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert contents(tmp_path / "s") == expected, done.stderr
    assert '"ok": 60' in (tmp_path / "report").read_text() and done.stderr.count("found 62 files") == 1


def test_actors_of_ray_make_the_same_store_though_one_is_killed_in_the_middle(alone, tmp_path):
    """Two actors on a local cluster; the first that has finished a part is killed with SIGKILL."""
    expected, arguments, environment = alone
    store = tmp_path / "s"
    command = [sys.executable, *arguments, str(store), "--engine", "ray"]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until(lambda: (store / ".part-00000.json").exists(), running, seconds=300)
    actors = [pid for pid in descendants(running.pid) if b"MapWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert actors and running.poll() is None
    os.kill(actors[0], signal.SIGKILL)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 6, err
    assert contents(store) == expected


def test_engines_that_cannot_run_say_so_in_one_line(cli, pictures, tmp_path, process, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    code, _, err = cli("tokenize", pictures, "-o", tmp_path / "s", "--engine", "torchrun")
    assert code == 2 and err.count("\n") == 1 and "torchrun --nproc-per-node" in err
    code, _, err = cli("tokenize", pictures, "-o", tmp_path / "s.parquet", "--engine", "ray")
    assert code == 2 and err.count("\n") == 1 and "folder" in err
    without = (
        "import sys; sys.modules['ray'] = None\n"
        "from meditok.cli import run\n"
        f"sys.exit(run(['tokenize', {str(pictures)!r}, '-o', {str(tmp_path / 's')!r}, '--engine', 'ray']))"
    )
    done = process(code=without)
    assert done.returncode == 4 and done.stderr.count(b"\n") == 1 and b"meditok[ray]" in done.stderr
