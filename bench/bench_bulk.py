"""Files to stored tokens, end to end, against a plain DataLoader loop: python bench/bench_bulk.py [--images 64]

Both read the same pictures (PNG and DICOM, 256 to 512 pixels a side), fit them by the same rule and compute the same
model with the same weights; both use every core. The loop is the one the published code has: Pillow or pydicom in
DataLoader workers, batches through the model of baseline_model.py, one array saved at the end. Ours is
`meditok tokenize` without the start of Python: plan, read, encode, write Parquet parts with their digests.

Prints images/s of both in turn, their ratio round by round, and the share of the wall time that our reading, model and
writing were at work (added up over processes and threads, so that 200 % is two cores) in a run of ours alone over
--long times as many images, where starting counts for less. On a CPU all steps share the cores, and what counts is how
long a core stood idle; that share is the machine's, so nothing else must run meanwhile. Appends to results/bulk.csv.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom
import torch
from baseline_model import Baseline
from PIL import Image
from timing import append_rows, commit, processor

import meditok
from meditok import native
from meditok.bulk.engines import Engine, Recipe
from meditok.bulk.folder import StoreFolder
from meditok.bulk.workers import usable_cores
from meditok.cli.jobs import Job, Tally, workers_for
from meditok.data import ReadOptions, discover
from meditok.pipeline import Settings
from meditok.tokens.keys import Namer

BATCHES = (1, 4, 16)


def make_inputs(folder: Path, images: int) -> None:
    """Real pictures that installed packages ship, cut at different places: three PNGs for every DICOM file."""
    import skimage.data

    photo = skimage.data.retina()
    scan = Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm"
    chance = np.random.default_rng(0)
    for index in range(images):
        if index % 4 == 3:
            shutil.copy(scan, folder / f"{index:05d}.dcm")
            continue
        side = int(chance.integers(256, 513))
        y, x = chance.integers(0, 1411 - side, 2)
        Image.fromarray(photo[y : y + side, x : x + side]).save(folder / f"{index:05d}.png")


class Pictures(torch.utils.data.Dataset):
    """What a published script has: a list of paths, a picture each, resized, in [-1, 1]."""

    def __init__(self, folder: Path, size: int):
        self.paths, self.size = sorted(folder.iterdir()), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        path = self.paths[index]
        if path.suffix == ".dcm":
            data = pydicom.dcmread(path)
            values = data.pixel_array.astype(np.float32) * float(data.RescaleSlope) + float(data.RescaleIntercept)
            pixels = np.repeat(np.clip(values / 1000, -1, 1)[None], 3, axis=0)
        else:
            pixels = np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1) / 127.5 - 1
        image = torch.nn.functional.interpolate(
            torch.from_numpy(pixels)[None], size=(self.size, self.size), mode="bilinear", antialias=True
        )
        return image[0].clamp(-1, 1)


def published(folder: Path, out: Path, model: Baseline, size: int, batch: int, workers: int) -> float:
    """Seconds of the plain loop."""
    started = time.perf_counter()
    loader = torch.utils.data.DataLoader(Pictures(folder, size), batch_size=batch, num_workers=workers)
    found = [model.tokenize(images).to(torch.int16).numpy() for images in loader]
    np.save(out / "tokens.npy", np.concatenate(found))
    return time.perf_counter() - started


def ours(folder: Path, out: Path, model, size: int, workers: int) -> tuple[float, Tally]:
    """Seconds of what `meditok tokenize IN -o DIR --fit stretch` does once the model is loaded, and where they went."""
    started = time.perf_counter()
    job = Job(
        discover([folder]), ReadOptions(), Settings(fit="stretch", size=size), model, Namer(b"k"), "fail", workers
    )
    plan, tally = job.plan(8192), job.tally()
    target = StoreFolder(out, job.info, plan.digest)
    target.survey(overwrite=False)
    target.open({})
    tally.seconds = Engine().make(plan.shards, job.work, target, tally, Recipe("tiny", "fp32"), "fail")
    target.finish([target.saved(shard.index) for shard in plan.shards], [])
    return time.perf_counter() - started, tally


def idle_seconds() -> float:
    """Time that the cores of this machine have been idle, added up; nan where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return float("nan")
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, help="of ours; [default: by the machine]")
    options = parser.parse_args()
    model, cores = meditok.load("tiny", device="cpu"), usable_cores()
    plain = Baseline(model)
    workers = options.workers
    if workers is None:
        workers = workers_for(10_000, model, Settings())
    times: dict[str, list[float]] = {"meditok": []} | {f"DataLoader, batch {batch}": [] for batch in BATCHES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "in")
        folder.mkdir()
        make_inputs(folder, options.images)
        for number in range(options.rounds + 1):  # the first warms caches and the process that forks workers
            out = Path(temporary, f"out{number}")
            out.mkdir()
            seconds, _ = ours(folder, out, model, options.size, workers)
            rest = [published(folder, out, plain, options.size, batch, cores) for batch in BATCHES]
            shutil.rmtree(out)
            if number:
                for name, value in zip(times, (seconds, *rest), strict=True):
                    times[name].append(value)
        make_inputs(folder, options.images * options.long)
        idle, load = idle_seconds(), os.getloadavg()[0]
        spent = ours(folder, Path(temporary, "long"), model, options.size, workers)[1].seconds
        idle = (idle_seconds() - idle) / (spent.wall * os.cpu_count())
    decode, model_share, write = spent.decode / spent.wall, spent.model / spent.wall, spent.write / spent.wall
    rows = []
    for name, values in times.items():
        p20, p50, p80 = np.percentile(values, (20, 50, 80))
        ratio = float(np.median(np.divide(values, times["meditok"])))
        print(f"{name:<22} {options.images / p50:8.2f} images/s   ratio to ours {ratio:.2f}")
        rows.append(
            {
                "name": name,
                "model": "tiny",
                "images": options.images,
                "size": options.size,
                "images_per_s": round(options.images / p50, 2),
                "p20_s": round(p20, 3),
                "p50_s": round(p50, 3),
                "p80_s": round(p80, 3),
                "ratio_to_ours": round(ratio, 2),
                "decode_share": round(decode, 3) if name == "meditok" else "",
                "model_share": round(model_share, 3) if name == "meditok" else "",
                "write_share": round(write, 3) if name == "meditok" else "",
                "cores_idle": round(idle, 3) if name == "meditok" else "",
                "workers": workers if name == "meditok" else cores,
                "cores": cores,
                "load": round(load, 1),
                "isa": native.isa,
                "device": processor(),
                "torch": torch.__version__,
                "commit": commit(),
            }
        )
    print(
        f"ours at work: reading {decode:.0%}, model {model_share:.0%} of {cores} threads x 100 %, writing {write:.1%}; "
        f"cores idle {idle:.1%}; load {load:.1f}"
    )
    print(f"rows appended to {append_rows('bulk', rows)}")


if __name__ == "__main__":
    main()
