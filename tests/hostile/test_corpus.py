"""Every bad input, through Python and through the commands: named error, exit code, one line, nothing written."""

import json

import pytest

from tests.readers.bad_inputs import BAD_INPUTS

SECONDS, GIB = 5.0, 1.0
EVERY = pytest.mark.parametrize(
    ("name", "make", "error", "code", "options"), BAD_INPUTS, ids=[e[0] for e in BAD_INPUTS]
)


def as_arguments(options):
    return [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def check_cost(result):
    assert result.cpu < SECONDS and result.peak < GIB, result


@EVERY
def test_reading_raises_the_named_error_within_bounds(forks, tmp_path, name, make, error, code, options):
    """One line with its four parts: the file given, where, what is wrong and, behind a semicolon, what to do."""
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = forks.read(path, **options)
    assert (result.code, result.err) == (0, ""), result.err
    check_cost(result)
    found = json.loads(result.out)
    assert (error.__name__, code) in [(e["error"], e["exit_code"]) for e in found["errors"]], found
    if not name.startswith("B30"):  # tars and manifests are no picture files
        assert (found["raised"]["error"], found["raised"]["exit_code"]) == (error.__name__, code)
    for told in found["errors"]:
        message = told["message"]
        assert message.startswith(str(path.parent)) and "; " in message and "\n" not in message and len(message) < 600
    assert sorted(tmp_path.rglob("*")) == before


@EVERY
def test_the_commands_fail_as_they_predict_and_write_nothing(forks, tmp_path, name, make, error, code, options):
    """tokenize, its dry run and inspect end with the same exit code, the run with one line on stderr."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = make(folder)
    before = sorted(tmp_path.rglob("*"))
    run = ["tokenize", path, "-o", tmp_path / "out.parquet", "--size", 64, *as_arguments(options)]
    ran, dry, seen = forks.command(*run), forks.command(*run, "--dry-run"), forks.command("inspect", path, *run[6:])
    assert (ran.code, dry.code, seen.code) == (code, code, code), (ran, dry, seen)
    assert (ran.out, ran.err.count("\n")) == ("", 1) and ran.err.startswith(f"meditok: error: {folder}"), ran
    assert error.__name__ in seen.out or seen.err == ran.err  # an input that cannot be listed at all ends both alike
    assert "Traceback" not in ran.err + dry.err + seen.err
    assert sorted(tmp_path.rglob("*")) == before
    for result in (ran, dry, seen):
        check_cost(result)


def test_among_good_files_a_bad_one_is_listed_and_the_counts_add_up(forks, tmp_path):
    """--on-error skip over all bad picture files at once: each is in the failures, no good one is lost."""
    folder, expected = tmp_path / "in", 0
    for name, make, _, _, options in BAD_INPUTS:
        if not options and not name.startswith("B30"):
            (folder / name).mkdir(parents=True)
            make(folder / name)
    from tests.readers.bad_pictures import noise, png

    for number in range(3):
        png(folder / f"good{number}.png", noise(20, 20))
    result = forks.command(
        "tokenize", folder, "-o", tmp_path / "out", "--size", 32, "--on-error", "skip", "--json", tmp_path / "r.json"
    )
    assert result.code == 6, result.err
    report = json.loads((tmp_path / "r.json").read_text())
    expected = sum(1 for path in folder.rglob("*") if path.is_file())
    assert report["found"] == expected == report["ok"] + report["failed"] + report["ignored"]
    assert report["ok"] == 3 == report["rows"]
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert len(lines) == report["failed"]
