"""`meditok tokenize`: rows, names, re-runs, failures, counts."""

import hashlib
import hmac
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from meditok.tokens import Tokens


def test_every_picture_becomes_one_row_that_describes_it(cli, pictures, tmp_path):
    code, out, err = cli("tokenize", pictures, "-o", tmp_path / "t.parquet", "--keep-names")
    assert code == 0 and out == ""
    rows = {row.id: row for row in Tokens.load(tmp_path / "t.parquet").rows}
    assert set(rows) == {"deep.png", "photo.jpg", "sub/photo.png"}
    deep = rows["deep.png"]
    assert (deep.height, deep.width, deep.channels, deep.low, deep.high) == (64, 64, 1, 0, 65535)
    assert deep.geometry.original_shape == (50, 80) and deep.geometry.fit == "pad"
    assert rows["sub/photo.png"].channels == 3 and rows["photo.jpg"].steps
    assert "found 4 files: 3 ok, 0 failed, 1 ignored; 3 pictures" in err


def test_equal_base_names_in_two_folders_are_two_rows_named_by_the_promised_hash(cli, make, tmp_path):
    for site, seed in (("a", 1), ("b", 2)):
        (tmp_path / "in" / site).mkdir(parents=True)
        Image.fromarray(make.noise((32, 32), seed=seed)).save(tmp_path / "in" / site / "IM0001.png")
    assert cli("tokenize", tmp_path / "in", "-o", tmp_path / "t.parquet")[0] == 0
    expected = [
        hmac.new(b"a key for tests", f"{site}/IM0001.png#0".encode(), hashlib.sha256).hexdigest()[:32] for site in "ab"
    ]
    assert [row.id for row in Tokens.load(tmp_path / "t.parquet").rows] == expected


def test_equal_relative_paths_of_two_inputs_are_a_usage_error(cli, make, tmp_path):
    for site in "ab":
        (tmp_path / site).mkdir()
        Image.fromarray(make.noise((32, 32))).save(tmp_path / site / "x.png")
    code, _, err = cli("tokenize", tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", "-o", tmp_path / "t.parquet")
    assert code == 2 and "x.png" in err and err.count("\n") == 1
    assert not (tmp_path / "t.parquet").exists()


def test_batch_size_and_company_change_no_byte(cli, pictures, tmp_path):
    for size in (1, 2, 16):
        assert cli("tokenize", pictures, "-o", tmp_path / f"{size}.parquet", "--batch-size", size)[0] == 0
    data = [(tmp_path / f"{size}.parquet").read_bytes() for size in (1, 2, 16)]
    assert data[0] == data[1] == data[2]
    assert cli("tokenize", pictures / "sub", "-o", tmp_path / "alone.parquet")[0] == 0
    alone, all_rows = Tokens.load(tmp_path / "alone.parquet"), Tokens.load(tmp_path / "1.parquet")
    assert torch.equal(alone.ids[0], all_rows.ids[2])


@pytest.mark.parametrize("name", ["t.parquet", "store"])
def test_the_same_work_is_not_done_twice_and_other_work_needs_overwrite(cli, pictures, tmp_path, name):
    out = tmp_path / name
    assert cli("tokenize", pictures, "-o", out)[0] == 0
    files = [out] if out.is_file() else sorted(out.iterdir())
    stamps = [path.stat().st_mtime_ns for path in files]
    code, _, err = cli("tokenize", pictures, "-o", out, "--batch-size", 3)
    assert code == 0 and "nothing to do" in err
    assert [path.stat().st_mtime_ns for path in files] == stamps
    for change in (["--fit", "stretch"], ["--keep-names"], ["--window", "0:1000"]):
        code, _, err = cli("tokenize", pictures, "-o", out, *change)
        assert code == 2 and "--overwrite" in err
    (pictures / "notes.txt").unlink()
    Image.new("L", (40, 40)).save(pictures / "photo.jpg")
    assert cli("tokenize", pictures, "-o", out)[0] == 2
    assert cli("tokenize", pictures, "-o", out, "--overwrite")[0] == 0
    assert cli("tokenize", pictures, "-o", out)[0] == 0


@pytest.mark.parametrize("name", ["t.parquet", "store"])
def test_a_second_run_reports_the_counts_of_the_first(cli, make, pictures, tmp_path, name):
    make.ct_series(pictures / "ct", make.noise((32, 32, 3), 500, dtype=np.int16))
    (pictures / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    arguments = ["tokenize", pictures, "-o", tmp_path / name, "--on-error", "skip", "--json", "-"]
    (first, before, _), (second, after, _) = cli(*arguments), cli(*arguments)
    before, after = json.loads(before), json.loads(after)
    assert first == second == 6 and after["nothing_to_do"]
    assert all(after[key] == before[key] for key in ("found", "ok", "failed", "ignored", "rows", "model_hash"))


def test_a_folder_output_holds_parts_an_index_and_failures(cli, pictures, tmp_path):
    code, _, _ = cli("tokenize", pictures, "-o", tmp_path / "store", "--shard-size", 2)
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == [
        "failures.jsonl",
        "part-00000.parquet",
        "part-00001.parquet",
        "store.json",
    ]
    index = json.loads((tmp_path / "store" / "store.json").read_text())
    assert index["complete"] and index["rows"] == 3 and [p["rows"] for p in index["parts"]] == [2, 1]
    assert len(Tokens.load(tmp_path / "store")) == 3


def test_the_first_failure_stops_the_run_and_leaves_no_file(cli, pictures, tmp_path):
    data = (pictures / "deep.png").read_bytes()
    (pictures / "deep.png").write_bytes(data[: len(data) // 2])
    code, out, err = cli("tokenize", pictures, "-o", tmp_path / "out" / "t.parquet")
    assert code == 3 and out == "" and err.startswith("meditok: error:") and "deep.png" in err
    assert err.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())
    code, _, _ = cli("tokenize", pictures, "-o", tmp_path / "store")
    assert code == 3 and not list((tmp_path / "store").glob("*part*"))


@pytest.mark.parametrize("name", ["t.parquet", "store"])
def test_skipping_lists_what_failed_and_counts_add_up(cli, pictures, tmp_path, name):
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    out = tmp_path / "out" / name
    code, stdout, err = cli("tokenize", pictures, "-o", out, "--on-error", "skip", "--json", "-")
    report = json.loads(stdout)
    assert code == 6 and "broken.png" in err
    assert report["found"] == 5 == report["ok"] + report["failed"] + report["ignored"]
    assert (report["failed"], report["rows"], len(report["failures"])) == (1, 3, 1)
    listed = out.with_suffix(".failures.jsonl") if name.endswith(".parquet") else out / "failures.jsonl"
    line = json.loads(listed.read_text())
    assert line["error"] == "CorruptImageError" and "broken" not in listed.read_text()
    assert len(Tokens.load(out)) == 3


def test_a_failing_slice_withholds_every_row_of_its_file(cli, make, tmp_path):
    import numpy as np

    volume = make.noise((24, 24, 6)).astype(np.float32)
    volume[3, 3, 4] = np.nan
    make.nifti(tmp_path / "in" / "bad.nii.gz", volume, np.eye(4))
    Image.fromarray(make.noise((32, 32))).save(tmp_path / "in" / "good.png")
    code, _, _ = cli(
        "tokenize",
        tmp_path / "in",
        "-o",
        tmp_path / "t.parquet",
        "--on-error",
        "skip",
        "--keep-names",
        "--modality",
        "mr",
    )
    assert code == 6
    assert [row.id for row in Tokens.load(tmp_path / "t.parquet").rows] == ["good.png"]


def test_all_failed_and_nothing_found_are_bad_input(cli, tmp_path):
    (tmp_path / "in").mkdir()
    assert cli("tokenize", tmp_path / "in", "-o", tmp_path / "t.parquet")[0] == 3
    (tmp_path / "in" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for mode in ("fail", "skip"):
        assert cli("tokenize", tmp_path / "in", "-o", tmp_path / "t.parquet", "--on-error", mode)[0] == 3
        assert not (tmp_path / "t.parquet").exists()
    assert cli("tokenize", tmp_path / "nowhere", "-o", tmp_path / "t.parquet")[0] == 3


def test_a_frame_that_is_not_there_is_an_error_and_not_an_empty_file(cli, pictures, tmp_path):
    code, _, err = cli("tokenize", pictures / "deep.png", "-o", tmp_path / "t.parquet", "--frame", 7)
    assert code in (2, 3) and "frame" in err and not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokenize", "IN", "-o", "IN"],
        ["tokenize", "IN/deep.png", "-o", "IN"],
        ["tokenize", "IN", "-o", "."],
        ["reconstruct", "IN", "-o", "IN"],
        ["reconstruct", "IN/deep.png", "-o", "IN"],
        ["tokenize", "list.parquet", "-o", "list.parquet", "--overwrite"],
    ],
)
def test_an_output_that_is_an_input_is_refused_always(cli, pictures, tmp_path, monkeypatch, arguments):
    import pyarrow as pa

    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"path": ["in/deep.png"]}), tmp_path / "list.parquet")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, _, err = cli(*[a.replace("IN", str(pictures)) for a in arguments])
    assert code == 2 and "is an input" in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_output_may_lie_beside_the_inputs_and_is_not_counted_on_a_second_run(cli, pictures):
    for _ in range(2):
        code, _, err = cli("tokenize", pictures, "-o", pictures / "tokens")
        assert code == 0
    assert "nothing to do" in err


def test_parquet_on_stdout_is_nothing_but_data(cli, pictures, model_dir, process):
    done = process("tokenize", pictures / "photo.jpg", "-o", "-", "--model", model_dir, "--size", 64)
    assert done.returncode == 0
    assert pq.read_table(io.BytesIO(done.stdout)).num_rows == 1
    assert b"\r" not in done.stderr


def test_manifest_columns_are_copied_only_when_asked_for(cli, pictures, tmp_path):
    (tmp_path / "list.csv").write_text("path,label,caption\nin/deep.png,normal,a chest\nin/photo.jpg,,\n")
    cli("tokenize", tmp_path / "list.csv", "-o", tmp_path / "none.parquet")
    assert "label" not in pq.read_schema(tmp_path / "none.parquet").names
    code, _, _ = cli("tokenize", tmp_path / "list.csv", "-o", tmp_path / "t.parquet", "--columns", "label,caption")
    assert code == 0
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.column("label").to_pylist() == ["normal", None]
    assert table.column("caption").to_pylist() == ["a chest", None]
    code, _, err = cli("tokenize", tmp_path / "list.csv", "-o", tmp_path / "u.parquet", "--columns", "labl")
    assert code == 2 and "labl" in err and "caption, label, path" in err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_column_whose_name_is_taken_is_a_usage_error_in_a_dry_run_too(cli, pictures, tmp_path, more):
    (tmp_path / "list.csv").write_text("path,modality\nin/photo.jpg,us\n")
    out = tmp_path / "t.parquet"
    for columns in ("modality", "path,path"):
        code, _, err = cli("tokenize", tmp_path / "list.csv", "-o", out, "--columns", columns, *more)
        assert (code, err.count("\n")) == (2, 1) and "has a column of that name" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--size", "100"], 2),
        (["--fit", "squash"], 2),
        (["--window", "soft"], 2),
        (["--modality", "brain"], 2),
        (["--window", "lung"], 2),
        (["--batch-size", "0"], 2),
        (["--preset", "published", "--fit", "crop"], 2),
        (["--unknown"], 2),
        (["--precision", "fp8"], 4),
        (["--model", "no-such-model"], 4),
        (["--device", "cuda:99"], 4),
        (["--modality", "ct"], 3),
    ],
)
def test_options_that_cannot_work_have_their_exit_code_and_one_line(cli, pictures, tmp_path, arguments, code):
    got, out, err = cli("tokenize", pictures, "-o", tmp_path / "t.parquet", *arguments)
    assert (got, out) == (code, "")
    assert err.startswith("meditok: error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "t.parquet").exists()


def test_an_unsafe_archive_is_exit_5(cli, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("../escape.png")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"data"))
    code, _, err = cli("tokenize", tmp_path / "a.tar", "-o", tmp_path / "t.parquet")
    assert code == 5 and "escape" in err
    assert not (tmp_path.parent / "escape.png").exists()


def test_an_interrupt_leaves_nothing_that_looks_finished(cli, pictures, tmp_path, patch_model, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(patch_model, "tokenize", interrupted, raising=False)
    code, _, err = cli("tokenize", pictures, "-o", tmp_path / "out" / "t.parquet")
    assert code == 130 and err.strip().count("\n") == 0
    assert not list((tmp_path / "out").iterdir())


def test_a_defect_is_one_line_and_exit_1_and_debug_shows_where_without_values(
    cli, pictures, tmp_path, patch_model, monkeypatch
):
    def broken(*_, **__):
        raise RuntimeError("secret value")

    monkeypatch.setattr(patch_model, "tokenize", broken, raising=False)
    code, _, err = cli("tokenize", pictures, "-o", tmp_path / "t.parquet")
    assert code == 1 and err.count("\n") == 1 and "secret" not in err and "RuntimeError" in err
    code, _, err = cli("tokenize", pictures, "-o", tmp_path / "t.parquet", "--debug")
    assert (
        code == 1
        and "encoding.py" in err
        and "secret value" not in err.replace('raise RuntimeError("secret value")', "")
    )


def test_a_killed_run_never_looks_finished_and_the_same_command_finishes_it(cli, make, model_dir, tmp_path):
    import os
    import signal
    import subprocess
    import sys
    import time
    from pathlib import Path

    import meditok
    from meditok.errors import BadInputError
    from meditok.tokens.store import open_tokens

    for index in range(40):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(make.noise((64, 64), seed=index)).save(tmp_path / "in" / f"{index:02d}.png")
    arguments = ["tokenize", tmp_path / "in", "--size", "64", "--model", model_dir, "--shard-size", "3", "-o"]
    root = str(Path(meditok.__file__).parents[1])
    command = [sys.executable, "-m", "meditok", *map(str, arguments), str(tmp_path / "killed")]
    running = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "part-00000.parquet").exists() and running.poll() is None:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    if running.returncode == -signal.SIGKILL:
        with pytest.raises(BadInputError, match="unfinished"):
            open_tokens(tmp_path / "killed")
    for out in ("killed", "whole"):
        assert cli(*arguments, tmp_path / out)[0] == 0
    killed, whole = ({p.name: p.read_bytes() for p in (tmp_path / o).iterdir()} for o in ("killed", "whole"))
    assert killed == whole and len(whole) == 16


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_dry_run_predicts_what_fitting_refuses(cli, tmp_path, patch_model, more):
    (tmp_path / "in").mkdir()
    Image.new("L", (20_000, 1)).save(tmp_path / "in" / "thin.png")
    Image.new("L", (20, 20)).save(tmp_path / "in" / "good.png")
    arguments = ["tokenize", tmp_path / "in", "-o", tmp_path / "s", "--size", 64, "--fit", "crop", *more]
    code, _, err = cli(*arguments)
    assert code == 3 and "thin.png" in err and "too thin" in err
    assert cli(*arguments, "--on-error", "skip")[0] == 6


def test_tiles_and_slices_are_counted_before_they_are_made(cli, make, tmp_path, patch_model):
    """Parts are cut by the pictures that headers promise: 6 tiles each, and whole volumes."""
    (tmp_path / "in").mkdir()
    for index in range(3):
        Image.fromarray(make.noise((60, 90))).save(tmp_path / "in" / f"{index}.png")
    make.nifti(tmp_path / "in" / "v.nii.gz", make.noise((20, 20, 7)).astype(np.int16), np.diag([1, 1, 3, 1]))
    arguments = ["--size", 32, "--fit", "tile", "--shard-size", 12, "--modality", "mr"]
    assert cli("tokenize", tmp_path / "in", "-o", tmp_path / "s", *arguments)[0] == 0
    index = json.loads((tmp_path / "s" / "store.json").read_text())
    assert [part["rows"] for part in index["parts"]] == [12, 6, 7] or [p["rows"] for p in index["parts"]] == [12, 13]
