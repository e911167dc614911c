"""Twenty thousand images in one run: all there, and memory that does not grow with them."""

import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from meditok.tokens.store import open_tokens
from tests.cli.test_store_runs import descendants, launch, quick_model  # noqa: F401

IMAGES = 20_000


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path):
    """Ten tars: 19,900 synthetic PNGs of 200 kinds, and 100 copies of a real CT slice."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 32, 32), dtype=np.uint8)
    pictures = []
    for pixels in noise:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    scan = (Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm").read_bytes()
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(10):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for index in range(IMAGES // 10):
                real = index % 200 == 199
                add(archive, f"{index:05d}.{'dcm' if real else 'png'}", scan if real else pictures[index % 200])
    return folder


def resident(pids):
    """MiB held by these processes alone (their proportional share), 0 for those that are gone."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total / 1024


@pytest.mark.slow
def test_twenty_thousand_images_go_through_in_one_run_with_flat_memory(tars, tmp_path, launch):  # noqa: F811
    store = tmp_path / "store"
    arguments = [tars, "-o", store, "--size", 32, "--shard-size", 2000, "--workers", 2, "--no-stable"]
    started = time.monotonic()
    running = launch(*arguments, "--batch-size", 64, "--json", tmp_path / "report.json", "--quiet")
    samples = []  # (finished parts, MiB)
    while running.poll() is None:
        parts = len(list(store.glob(".part-*.json"))) if store.exists() else 0
        samples.append((parts, resident(descendants(running.pid) | {running.pid})))
        time.sleep(0.2)
    _, err = running.communicate()
    assert running.returncode == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] == report["rows"] == IMAGES == len(open_tokens(store))
    early = max(memory for parts, memory in samples if 1 <= parts <= 3)
    late = max(memory for parts, memory in samples if 7 <= parts <= 9)
    print(f"{time.monotonic() - started:.0f} s, {early:.0f} MiB early, {late:.0f} MiB late, {report['seconds']}")
    assert late < early + 64
