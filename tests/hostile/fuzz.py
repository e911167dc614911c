"""Mutation fuzzing of every reader and of the token file, in a child process that a watchdog may kill.

`python -m tests.hostile.fuzz --kind png --seed 7 --examples 20000` runs longer than the test does. Example n of a kind
is made from (kind, seed, n) alone, so that `--first n --examples 1` repeats it.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import resource
import selectors
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path

from tests.hostile.seeds import KINDS, SUFFIX, seeds
from tests.readers.memory import peak_gib

MEMORY = 2**31  # address space beyond what the imports took, of which allocators reserve more than they use
RESIDENT = 1.0  # GiB of memory a process may have held at its peak
SECONDS = 5.0  # of processor time, an example
STARTING = 60.0  # on the clock, until the first one, and for one that waits
_NUMBERS = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 2,
            2**32 - 1)  # fmt: skip
_WORDS = (b"nan", b"inf", b"-1", b"1e999", b"null", b"[", b"{", b'"', b",", b"\0", b"..", b"/", b"\xff\xfe", b"True",
          b"9999999999999999999999")  # fmt: skip


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to six changes of the kinds that break parsers: bits, lengths, cuts, repeats, splices, numbers as text."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        # headers are where the lengths are: half of the changes fall into the first 600 bytes
        at = rng.randrange(min(len(out), 600) if rng.random() < 0.5 else len(out)) if out else 0
        match rng.randrange(9):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at] = rng.choice((0, 1, 127, 128, 254, 255, rng.randrange(256)))
            case 2:
                del out[rng.randrange(len(out) + 1) :]
            case 3:
                size = rng.choice((1, 2, 4, 8, 64))
                out[at : at + size] = b"" if rng.random() < 0.5 else rng.randbytes(size)
            case 4 | 5:
                form = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
                size = struct.calcsize(form)
                value = (rng.choice(_NUMBERS) + rng.choice((0, 0, 1, -1))) % 256**size
                out[at : at + size] = struct.pack(form, value)
            case 6:
                size = rng.choice((4, 16, 128))
                out[at:at] = out[at : at + size] * rng.choice((1, 2, 40))
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                out[at : at + 64] = other[start : start + rng.choice((8, 64, 512))]
            case 8:
                out[at : at + rng.choice((0, 1, 4))] = rng.choice(_WORDS)
    return bytes(out)


def example(kind: str, pool: list[bytes], seed: int, number: int) -> bytes:
    """Example `number`: a mutated seed, with the checksums that would stop a parser early made right again."""
    rng = random.Random(f"{kind}/{seed}/{number}")
    data = rng.choice(pool)
    if kind == "nifti-gzip" and rng.random() < 0.7:
        return gzip.compress(mutated(gzip.decompress(data), pool, rng), 1, mtime=0)
    data = mutated(data, pool, rng)
    if kind == "png" and rng.random() < 0.7:
        data = _png_checked(data)
    if kind == "tar" and rng.random() < 0.7:
        data = _tar_checked(data)
    return data


def _png_checked(data: bytes) -> bytes:
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        length = struct.unpack_from(">I", out, at)[0]
        if at + 12 + length > len(out):
            break
        struct.pack_into(">I", out, at + 8 + length, zlib.crc32(out[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(out)


def _tar_checked(data: bytes) -> bytes:
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            block = out[at : at + 148] + b" " * 8 + out[at + 156 : at + 512]
            out[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(out)


def run_example(kind: str, data: bytes, folder: Path) -> None:
    """Give a file to everything that reads its kind. Whatever is not a MeditokError comes out."""
    from meditok.data import ReadOptions, discover
    from meditok.errors import MeditokError

    path = folder / f"x{SUFFIX[kind]}"
    if kind == "store":
        path = folder / "seed-store" / "store.json"
    path.write_bytes(data)
    try:
        if kind in ("tokens", "store"):
            _restored(path.parent if kind == "store" else path)
            return
        options = ReadOptions(modality="mr", time_index=0, assume_affine=True) if kind.startswith("nifti") else None
        found = discover([path], options)
        problems = [error for _, error in found.failed]
        for source in found.sources:
            problems += [row.error for row in source.rows() if row.error is not None]
        for problem in problems:
            _check_message(problem)
    except MeditokError as error:
        _check_message(error)


def _check_message(error) -> None:
    assert "\n" not in str(error) and len(str(error)) < 4000, f"message: {str(error)[:300]!r}"


def _restored(path: Path) -> None:
    from meditok.tokens.layout import plan_layout
    from meditok.tokens.store import open_tokens

    with open_tokens(path) as reader:
        reader.check()
        plan_layout(reader.descriptions())
        for _ in reader.batches():
            pass


def child(kinds: list[str], seed: int, first: int, examples: int, folder: Path, every: bool) -> int:
    """Run examples, telling kind and number on stdout before each; the first defect ends it, unless `every`."""
    import meditok.data  # noqa: F401 - before memory is limited
    import meditok.tokens  # noqa: F401

    pools, places = {}, {}
    for kind in kinds:
        places[kind] = folder / kind
        places[kind].mkdir()
        pools[kind] = seeds(kind, places[kind])
        if kind in ("csv", "parquet"):
            (places[kind] / "picture.png").write_bytes(seeds("png", folder)[0])
        for data in pools[kind]:  # and what the readers import
            run_example(kind, data, places[kind])
    limit_memory()
    told = set()
    for kind in kinds:
        for number in range(first, first + examples):
            os.write(1, f"{kind} {number}\n".encode())
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run_example(kind, example(kind, pools[kind], seed, number), places[kind])
                assert peak_gib() < RESIDENT, "too much memory"
            except BaseException as error:
                spot = str(traceback.extract_tb(error.__traceback__)[-1]) + repr(error)[:60]
                if spot not in told:
                    traceback.print_exc()
                    print(f"({kind} example {number})", file=sys.stderr)
                told.add(spot)
                if not every:
                    return 1
    return 1 if told else 0


def limit_memory() -> None:
    """Cap the address space of this process at MEMORY beyond what it holds now."""
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))


def watch(kinds: list[str], seed: int, first: int, examples: int, *, every: bool = False) -> str:
    """Run a child and watch it; "" or what went wrong, with the command that repeats it."""
    with tempfile.TemporaryDirectory(prefix="meditok-fuzz-") as folder, tempfile.TemporaryFile() as errors:
        arguments = [part for kind in kinds for part in ("--kind", kind)]
        arguments += ["--seed", str(seed), "--first", str(first), "--examples", str(examples), "--child", folder]
        command = [sys.executable, "-m", "tests.hostile.fuzz", *arguments, *(["--every"] if every else [])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0)
        last, hung, spent, since = b"none yet", False, STARTING, time.monotonic()
        with process.stdout, selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not hung:
                if not selector.select(1.0):
                    # processor time, for a machine busy with other things is no defect of the reader
                    hung = cpu_seconds(process.pid) - spent > SECONDS or time.monotonic() - since > STARTING
                    continue
                told = os.read(process.stdout.fileno(), 65536)
                if not told:
                    break
                last, spent, since = told.splitlines()[-1], cpu_seconds(process.pid), time.monotonic()
        if hung:
            process.kill()
        code = process.wait()
        if code == 0:
            return ""
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")[-20000 if every else -3000 :]
    what = f"took more than {SECONDS:g} s" if hung else f"ended with {code}"
    kind, _, number = last.decode().partition(" ")
    again = f"python -m tests.hostile.fuzz --kind {kind} --seed {seed} --first {number} --examples 1"
    return f"{kind} example {number} {what}; again: {again}\n{said}"


def cpu_seconds(pid: int) -> float:
    """Processor time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, action="append", help="may be given several times; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--every", action="store_true", help="go on after a defect and show each kind of it once")
    parser.add_argument("--save", type=Path, help="write the first example here instead of running any")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    if options.child:
        return child(kinds, options.seed, options.first, options.examples, options.child, options.every)
    if options.save:
        with tempfile.TemporaryDirectory() as folder:
            pool = seeds(kinds[0], Path(folder))
        options.save.write_bytes(example(kinds[0], pool, options.seed, options.first))
        return 0
    started = time.monotonic()
    problem = watch(kinds, options.seed, options.first, options.examples, every=options.every)
    print(problem or f"{options.examples} examples of {', '.join(kinds)} in {time.monotonic() - started:.1f} s")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
