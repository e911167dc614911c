"""Exports: read back without meditok, by the very readers the documentation shows, and equal to what was written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import meditok
from meditok.cli import run
from meditok.errors import BadInputError, UsageError
from meditok.tokens import Description, TokenInfo, Tokens
from meditok.tokens.interchange import describe, export, smallest_dtype
from meditok.tokens.store import StoreWriter

ROOT = Path(__file__).parents[2]
READERS = dict(
    re.findall(
        r"^(Parquet|npz|safetensors|WebDataset|Hugging Face).*?```python\n(.*?)```",
        (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").partition("## Readers")[2],
        re.M | re.S,
    )
)
TARGETS = {
    "npz": "tokens.npz",
    "safetensors": "tokens.safetensors",
    "WebDataset": "tokens.tar",
    "Hugging Face": "tokens-hf",
}
# Ends a reader of the documentation: it must have done without meditok.
AFTERWARDS = """
import sys, numpy as np
assert "meditok" not in sys.modules
np.save("read.npy", tokens)
json_rows = __import__("json").dumps(rows, default=str)
open("rows.json", "w").write(json_rows)
"""


def by_the_documented_reader(name: str, folder: Path) -> tuple[np.ndarray, list[dict]]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf-home"), "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", READERS[name] + AFTERWARDS]
    subprocess.run(command, cwd=folder, check=True, env=os.environ | offline, capture_output=True, timeout=120)
    return np.load(folder / "read.npy"), json.loads((folder / "rows.json").read_text())


@pytest.mark.parametrize("name", READERS)
def test_the_documented_reader_returns_what_was_written(make_tokens, tmp_path, name):
    """The snippet of docs/formats.md, in a process that never imports meditok."""
    tokens = make_tokens(7, label="x")
    tokens.save(tmp_path / "tokens.parquet")
    if name != "Parquet":
        counts = export(tmp_path / "tokens.parquet", tmp_path / TARGETS[name], "hf" if "Hugging" in name else None)
        assert counts["rows"] == 7
    ids, rows = by_the_documented_reader(name, tmp_path)
    assert ids.dtype == np.uint16 and (ids == tokens.codes).all()
    for read, row in zip(rows, tokens.rows, strict=True):
        expected = json.loads(json.dumps(describe(row)))
        assert {key: read[key] for key in expected if key != "geometry"} == {
            key: value for key, value in expected.items() if key != "geometry"
        }
        assert {key: read["geometry"][key] for key in expected["geometry"]} == expected["geometry"]


def random_tokens(rows: int, codes: int, folder: Path) -> Path:
    info = TokenInfo("m", "a" * 64, "b" * 64, 8, codes, (16, 16))
    ids = np.random.default_rng(0).integers(0, codes, (rows, 8, 256))
    Tokens(ids, [Description(f"{i:032x}", 256, 256) for i in range(rows)], info).save(folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize("target", ["t.parquet", "t.npz", "hf"])
def test_what_is_compressed_stays_within_five_percent_of_the_bits_needed(tmp_path, target):
    """12 bits an id of 4,096, for random ids, descriptions included."""
    path = random_tokens(1024, 4096, tmp_path)
    if target != path.name:
        export(path, tmp_path / target, "hf" if target == "hf" else None)
    out = tmp_path / target
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if out.is_dir() else out.stat().st_size
    assert size <= 1.05 * 1024 * 2048 * 12 / 8


def test_the_type_is_the_smallest_unsigned_one_that_fits(tmp_path):
    assert [smallest_dtype(k).name for k in (2, 256, 257, 65536, 65537)] == [
        "uint8", "uint8", "uint16", "uint16", "uint32"
    ]  # fmt: skip
    export(random_tokens(2, 200, tmp_path), tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as file:
        assert file["tokens"].dtype == np.uint8


def test_a_store_of_parts_becomes_tars_of_so_many_rows(make_tokens, tmp_path):
    import tarfile

    tokens = make_tokens(11)
    with StoreWriter(tmp_path / "s", tokens.info, shard_size=4) as writer:
        writer.write(tokens.codes, tokens.rows)
        writer.close("x")
    assert export(tmp_path / "s", tmp_path / "tars", "webdataset", shard_size=5)["files"] == 3
    names = [tarfile.open(path).getnames() for path in sorted((tmp_path / "tars").iterdir())]
    assert [len(found) for found in names] == [10, 10, 2] and names[1][0] == "000000005.npy"


@pytest.mark.parametrize("to", ["npz", "safetensors", "webdataset", "hf"])
def test_equal_tokens_give_equal_bytes_and_broken_ones_leave_nothing(make_tokens, tmp_path, to):
    tokens = make_tokens(5)
    tokens.save(tmp_path / "t.parquet")
    for name in "ab":
        export(tmp_path / "t.parquet", tmp_path / name, to)
    files = [sorted(p for p in [tmp_path / n, *(tmp_path / n).rglob("*")] if p.is_file()) for n in "ab"]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]] != []
    raw = bytearray((tmp_path / "t.parquet").read_bytes())
    raw[40:400] = bytes(360)
    (tmp_path / "broken.parquet").write_bytes(raw)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInputError):
        export(tmp_path / "broken.parquet", tmp_path / "c", to)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_replaced_unasked_and_no_folder_ever(make_tokens, tmp_path):
    make_tokens(2).save(tmp_path / "t.parquet")
    (tmp_path / "t.npz").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    source = str(tmp_path / "t.parquet")
    for out, to, overwrite in (
        ("t.npz", None, False),
        ("full", "hf", True),
        ("full", "npz", True),
        ("t.npz", "hf", True),
    ):
        with pytest.raises(UsageError, match="something is there"):
            export(source, tmp_path / out, to, overwrite=overwrite)
    assert (tmp_path / "t.npz").read_text() == "mine"
    with pytest.raises(UsageError, match="is the input"):
        export(source, source, "npz", overwrite=True)
    with pytest.raises(UsageError, match="in which format"):
        export(source, tmp_path / "t.bin")
    assert export(source, tmp_path / "t.npz", overwrite=True)["rows"] == 2


def test_the_command_exports_and_reports(make_tokens, tmp_path, capsys):
    make_tokens(3).save(tmp_path / "t.parquet")
    assert run(["export", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "t.npz"), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"rows": 3, "files": 1, "bytes": (tmp_path / "t.npz").stat().st_size} and "t.npz" in err
    assert run(["export", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "t.npz")]) == 2
    assert run(["export", str(tmp_path / "none.parquet"), "-o", str(tmp_path / "u.npz")]) == 3
    assert not (tmp_path / "u.npz").exists()


def test_the_training_example_of_the_documentation_runs(make_tokens, tmp_path):
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").partition("## With meditok")[2]
    make_tokens(5).save(tmp_path / "tokens.parquet")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    paths = os.pathsep.join([str(Path(meditok.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": paths})
