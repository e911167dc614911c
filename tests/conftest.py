"""Threads, seeds and the rule for skipped tests that hold for the whole suite."""

from __future__ import annotations

import os
import signal
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"
_skipped: list[tuple[str, str]] = []


@pytest.fixture(autouse=True, scope="session")
def _elsewhere(tmp_path_factory):
    """Tests run in a folder of their own, and so do the processes that they start.

    Python searches the folder it is started in first, and in the clone that holds sources without a compiled core.
    The link lets `python -m tests.NAME` find the modules of the tests.
    """
    folder, before = tmp_path_factory.mktemp("elsewhere"), Path.cwd()
    (folder / "tests").symlink_to(Path(__file__).parent)
    os.chdir(folder)
    yield
    os.chdir(before)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Commands that the tests start can be interrupted, also where the suite runs in the background of a shell.

    Such a shell has its children ignore SIGINT, and a process inherits what is ignored but not what is handled.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append((report.nodeid, reason.removeprefix("Skipped: ")))


def unexpected_skips() -> list[tuple[str, str]]:
    """Skips whose reason no pattern of allowed_skips.txt covers."""
    lines = ALLOWED_SKIPS.read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [(test, reason) for test, reason in _skipped if not any(fnmatchcase(reason, p) for p in patterns)]


def pytest_sessionfinish(session, exitstatus):
    """Under CI a skip nobody listed is a failure: a test that silently stopped running proves nothing."""
    if os.environ.get("CI") and exitstatus == pytest.ExitCode.OK and unexpected_skips():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if unexpected := unexpected_skips():
        terminalreporter.section("skips that tests/allowed_skips.txt does not list")
        for test, reason in unexpected:
            terminalreporter.write_line(f"{test}: {reason}")
