"""Runs in processes of their own. One interpreter imports everything once and forks the processes of each run."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import meditok

ROOT = str(Path(meditok.__file__).parents[1])


class Job(NamedTuple):
    """`run(out, **options)` of toy.py or stages.py, in gloo processes."""

    out: Path
    options: dict
    processes: int = 1


def start(script: str, jobs: list[Job], limit: float = 240, **variables: str) -> tuple[list[list[int]], str]:
    """Exit statuses of the processes of each job, one job after the other, and what all wrote to stderr.

    variables: of the environment.
    """
    listed = json.dumps([(str(job.out), job.options, job.processes) for job in jobs])
    command = [sys.executable, __file__, script, listed]
    result = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment() | variables)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def under_torchrun(script: str, processes: int, out: Path, limit: float, **options) -> subprocess.CompletedProcess:
    """One run in processes that torchrun starts and watches."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, __file__, script, json.dumps([(str(out), options, processes)])]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "MEDITOK_DIST_TIMEOUT": "30"}


def main(script: str, jobs: str) -> None:
    run = importlib.import_module(script).run
    if "RANK" in os.environ:  # torchrun has started this process as one of several
        for out, options, _ in json.loads(jobs):
            run(Path(out), **options)
        return
    for name in ("torch._dynamo", "tokenizers", "PIL.Image"):  # what every run comes to import
        importlib.import_module(name)
    statuses = []
    for out, options, processes in json.loads(jobs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [_forked(run, Path(out), options, rank, processes, port) for rank in range(processes)]
        statuses.append([os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks])
    print(json.dumps(statuses))


def _forked(run, out: Path, options: dict, rank: int, size: int, port: int) -> int:
    """Number of the process that runs as `rank` of `size`."""
    process = os.fork()
    if process:
        return process
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)} | address
    status = 0
    try:
        run(out, **options)
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        status = 1
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
