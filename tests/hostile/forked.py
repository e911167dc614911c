"""Commands run in forked children of one warm process: the real exit path, at the price of a fork and not of an import.

`Forks().command("tokenize", ...)` gives a Result; `Forks().read(path)` reads a file through the Python API. Every child
has MEMORY bytes of address space beyond what the warm process holds, and its peak memory and processor time are told.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass

from tests.hostile.fuzz import limit_memory


@dataclass
class Result:
    """How a child ended. `peak` is resident memory in GiB, `cpu` processor seconds."""

    code: int
    out: str
    err: str
    cpu: float
    peak: float


class Forks:
    """The warm process, started once; use as a context manager."""

    def __init__(self, **environment: str):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-m", "tests.hostile.forked"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def command(self, *arguments) -> Result:
        """Run `meditok ARGUMENTS`."""
        return self._ask({"argv": [str(a) for a in arguments]})

    def read(self, path, **options) -> Result:
        """Read every picture of a file or of what it lists. out: JSON of the error's class, exit code and message."""
        return self._ask({"read": str(path), "options": options})

    def _ask(self, request: dict) -> Result:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Result(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _serve() -> None:
    warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                _child(request, out, err)
            _, status, used = os.wait4(child, 0)
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read().decode("utf-8", "replace"))
        code, cpu = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        print(json.dumps(Result(code, *texts, cpu, used.ru_maxrss / 2**20).__dict__), flush=True)


def _child(request: dict, out, err) -> None:
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        limit_memory()
        with contextlib.suppress(SystemExit):
            if "argv" in request:
                from meditok.cli import main

                sys.argv = ["meditok", *request["argv"]]
                try:
                    main()
                except SystemExit as exit:
                    code = exit.code
            else:
                _read(request["read"], request["options"])
                code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _read(path: str, options: dict) -> None:
    from meditok.data import ReadOptions, discover, frames
    from meditok.errors import MeditokError

    def told(error) -> dict:
        return {"error": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}

    found: dict = {"errors": []}
    try:
        discovery = discover([path], ReadOptions(**options))
        found["errors"] = [told(error) for _, error in discovery.failed]
        for source in discovery.sources:
            found["errors"] += [told(row.error) for row in source.rows() if row.error is not None]
    except MeditokError as error:
        found["errors"] = [told(error)]
    try:
        found["frames"] = sum(1 for _ in frames(path, **options))
    except MeditokError as error:
        found["raised"] = told(error)
    print(json.dumps(found))


def warm_up() -> None:
    """Import everything a command may need and load the model, so that children share it."""
    import nibabel  # noqa: F401
    import PIL.BmpImagePlugin
    import PIL.JpegImagePlugin
    import PIL.PngImagePlugin
    import PIL.TiffImagePlugin  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import pydicom.pixels  # noqa: F401
    import rich.table  # noqa: F401

    import meditok.cli.detokenize
    import meditok.cli.inspect
    import meditok.cli.jobs
    import meditok.cli.tokenize
    import meditok.data
    import meditok.data.readers.dicom
    import meditok.data.readers.nifti
    import meditok.data.readers.pillow
    import meditok.models.files
    import meditok.pipeline
    import meditok.tokens.format
    import meditok.tokens.store  # noqa: F401

    model = meditok.load("tiny", device="cpu")
    meditok.cli.jobs.load_model = lambda *_: model  # the bundled model, loaded once for all children


if __name__ == "__main__":
    _serve()
