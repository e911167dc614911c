"""B24 to B29: masks, tensors, token ids, codebooks and checkpoints that do not fit, through Python and the commands."""

import argparse
import os
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import meditok
from meditok import errors as e
from meditok.ops import vq_assign, vq_quantize
from meditok.tokens import Description, TokenInfo, Tokens
from tests.readers.bad_inputs import BAD_INPUTS


@pytest.fixture(scope="module")
def model():
    return meditok.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def token_file(model, tmp_path_factory):
    """Three rows of the bundled model on a 2 x 2 grid."""
    info = TokenInfo.of(model, (2, 2), stable=True)
    ids = torch.randint(0, info.codebook_size, (3, info.num_codebooks, 4), generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("tokens") / "t.parquet"
    Tokens(ids, [Description(f"{i:032x}", 32, 32) for i in range(3)], info).save(path)
    return path


# -- B24 masks, B25 and B26 tensors -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(7, dtype=torch.bool), e.ShapeError),
        (torch.ones(8, 1, dtype=torch.bool), e.ShapeError),
        (torch.ones(8), (e.ShapeError, e.DtypeError)),
    ],
    ids=["length", "rank", "type"],
)
def test_b24_a_mask_that_does_not_fit_is_refused(mask, error):
    with pytest.raises(error):
        vq_quantize(torch.randn(8, 2, 4), torch.randn(2, 5, 4), mask=mask)


def test_b24_an_all_false_mask_has_a_defined_result():
    z, ids, loss, counts = vq_quantize(
        torch.randn(8, 2, 4), torch.randn(2, 5, 4), mask=torch.zeros(8, dtype=torch.bool)
    )
    assert (ids == -1).all() and float(loss) == 0 and int(counts.sum()) == 0 and not z.any()


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(1, 2, 32, 32), e.ShapeError),
        (torch.zeros(1, 1, 32, 32), e.ShapeError),
        (torch.zeros(3, 32, 32), e.ShapeError),
        (torch.zeros(1, 3, 33, 32), e.ShapeError),
        (torch.zeros(1, 3, 0, 32), e.ShapeError),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int32), e.DtypeError),
        (torch.zeros(1, 3, 32, 32, dtype=torch.complex64), e.DtypeError),
        (torch.linspace(0, 255, 3072).reshape(1, 3, 32, 32), e.DtypeError),
        (torch.full((1, 3, 32, 32), float("nan")), e.NonFiniteError),
        ("picture", e.DtypeError),
    ],
    ids=["two channels", "one channel", "rank", "side", "no rows", "ints", "complex", "0..255", "nan", "text"],
)
def test_b25_images_of_a_wrong_type_or_range_are_refused(model, images, error):
    with pytest.raises(error) as caught:
        model.tokenize(images)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3


def test_b25_what_converts_exactly_is_converted_and_0_to_1_is_warned_about(model):
    levels = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scaled = levels.float() / 127.5 - 1
    assert torch.equal(model.tokenize(levels), model.tokenize(scaled))
    assert torch.equal(model.tokenize(scaled.double()), model.tokenize(scaled))
    with pytest.warns(UserWarning, match=r"0\.\.1"):
        model.tokenize(levels.float() / 255)


def test_b26_strides_offsets_and_empty_batches_give_the_right_answer(model):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = model.tokenize(images, stable=True)
    shifted = torch.empty(images.numel() + 1)[1:].view(images.shape).copy_(images)
    for given in (
        images.to(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        shifted,
    ):
        assert torch.equal(model.tokenize(given, stable=True), expected)
    assert torch.equal(model.tokenize(images[:1].expand(4, -1, -1, -1), stable=True)[3], expected[0])
    assert model.tokenize(images[:0]).shape == (0, *expected.shape[1:])
    assert model.detokenize(expected[:0]).shape == (0, 3, 32, 32)
    assert torch.equal(model.tokenize(images[:1], stable=True), expected[:1])


def test_b26_tensors_on_two_devices_are_refused():
    with pytest.raises(e.MeditokError):
        vq_assign(torch.zeros(4, 2, 3), torch.zeros(2, 5, 3, device="meta"))


# -- B27 ids ------------------------------------------------------------------------------------------------
def ids(value, shape=(1, 8, 4), dtype=torch.int64):
    return torch.full(shape, value, dtype=dtype)


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (ids(-1), e.TokenRangeError),
        (ids(10**6), e.TokenRangeError),
        (ids(2**31), e.TokenRangeError),
        (ids(0.5, dtype=torch.float32), e.TokenRangeError),
        (ids(True, dtype=torch.bool), e.TokenRangeError),
        (ids(0, (1, 8, 817)), e.TokenShapeError),
        (ids(0, (1, 7, 4)), e.TokenShapeError),
        (ids(0, (8, 4)), e.TokenShapeError),
        ([1, 2], e.TokenShapeError),
    ],
    ids=["-1", "K", "2^31", "float", "bool", "817", "7 of 8", "rank", "list"],
)
def test_b27_ids_that_no_codebook_has_are_refused_and_the_model_still_works(model, tokens, error):
    with pytest.raises(error) as caught:
        model.detokenize(tokens)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert model.detokenize(ids(0)).shape == (1, 3, 32, 32)


def edited(path: Path, out: Path, column=None, header=None) -> Path:
    """A copy of a token file with other tokens or another header."""
    table = pq.read_table(path)
    metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    if column is not None:
        table = table.set_column(1, "tokens", column(table))
    pq.write_table(table.replace_schema_metadata(metadata | (header or {})), out)
    return out


def lists(value, length, kind):
    return lambda table: pa.array([[value] * length] * len(table), pa.list_(kind))


EDITS = {
    "-1": ({"column": lists(-1, 32, pa.int64())}, 3),
    "K": ({"column": lists(10**6, 32, pa.int64())}, 3),
    "2^31": ({"column": lists(2**31, 32, pa.int64())}, 3),
    "float": ({"column": lists(0.5, 32, pa.float32())}, 3),
    "bool": ({"column": lists(True, 32, pa.bool_())}, 3),
    "817": ({"column": lists(0, 817, pa.int32())}, 3),
    "817 fixed": ({"column": lambda t: pa.array([[0] * 817] * len(t), pa.list_(pa.int32(), 817))}, 3),
    "7 of 8": ({"column": lists(0, 28, pa.int32())}, 3),
    "other codebook": ({"header": {"codebook_hash": "c" * 64}}, 3),
    "other K": ({"header": {"K": "8192"}}, 3),
    "other G": ({"header": {"G": "4", "grid": "[2, 4]"}}, 3),
    "other format": ({"header": {"meditok.format": "9"}}, 3),
    "endless grid": ({"header": {"grid": "[100000, 100000]"}}, 5),
}


@pytest.mark.parametrize("edit", EDITS)
def test_b27_b28_detokenize_refuses_an_edited_token_file_and_writes_nothing(forks, token_file, tmp_path, edit):
    """The dry run and an export foretell it where they can; the run says it in one line."""
    changes, code = EDITS[edit]
    path = edited(token_file, tmp_path / "edited.parquet", **changes)
    for more in ([], ["--dry-run"]):
        result = forks.command("detokenize", path, "-o", tmp_path / "out", *more)
        assert (result.code, result.err.count("\n")) == (code, 1), result
        assert result.err.startswith(f"meditok: error: {path}") and result.peak < 1 and result.cpu < 5
        assert not (tmp_path / "out").exists()
    if edit == "other codebook":
        assert "c" * 64 in result.err and meditok.load("tiny", device="cpu").codebook_hash in result.err


def test_b28_a_model_of_other_codes_refuses_the_tokens_and_names_both_hashes(forks, model, token_file, tmp_path):
    other = meditok.build("tiny", seed=5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(e.CodebookMismatchError) as caught:
        meditok.detokenize(token_file, other)
    assert model.codebook_hash in str(caught.value) and other.codebook_hash in str(caught.value)


def test_b28_a_codebook_with_a_nan_row_never_gives_that_code():
    codebook = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    codebook[0, 3] = float("nan")
    found = vq_assign(torch.randn(200, 1, 4, generator=torch.Generator().manual_seed(1)), codebook)
    assert not (found == 3).any() and (found >= 0).all()


# -- B29 checkpoints ----------------------------------------------------------------------------------------
class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def claimed(path: Path, header: int) -> Path:
    path.write_bytes(struct.pack("<Q", header) + b"{}" + bytes(64))
    return path


def saved(path: Path, value) -> Path:
    torch.save(value, path)
    return path


def truncated(path: Path) -> Path:
    path.write_bytes(
        Path(meditok.__file__).with_name("weights").joinpath("tiny/model.safetensors").read_bytes()[:200000]
    )
    return path


MODELS = {
    "code.pth": (lambda p: saved(p, Touch(p.with_name("touched"))), 5),
    "claims.safetensors": (lambda p: claimed(p, 2**40), 5),
    "cut.safetensors": (truncated, 3),
    "empty.safetensors": (lambda p: p.touch() or p, 5),
    "text.safetensors": (lambda p: p.write_text("{" * 500) and p, 5),
}


@pytest.mark.parametrize("name", MODELS)
def test_b29_a_model_file_that_is_none_is_refused_before_anything_runs(tmp_path, name):
    make, code = MODELS[name]
    path = make(tmp_path / name)
    with pytest.raises(e.MeditokError) as caught:
        meditok.load(str(path))
    assert caught.value.exit_code == code and "\n" not in str(caught.value), caught.value
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (lambda p: Touch(p.with_name("touched")), 5),
        (lambda p: {"args": argparse.Namespace(a=1)}, 5),
        (lambda p: [1], 3),
    ],
    ids=["code", "argparse", "list"],
)
def test_b29_convert_lets_only_tensors_through(forks, tmp_path, content, code):
    path = saved(tmp_path / "x.pth", content(tmp_path / "x.pth"))
    for broken in (False, True):
        if broken:
            path.write_bytes(path.read_bytes()[:-40])
        result = forks.command("convert", path, tmp_path / "out.safetensors")
        assert result.code == (5 if broken else code) and result.err.count("\n") == 1, result
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pth"] and result.cpu < 5 and result.peak < 1


# -- exit codes of a real process ---------------------------------------------------------------------------
REPRESENTATIVE = {"B1-png": 3, "B10-mpeg": 4, "B11": 5}


@pytest.mark.parametrize("case", [*REPRESENTATIVE, "usage", "skip", "good"])
def test_a_fresh_process_ends_with_the_exit_code(tmp_path, case):
    """0, 2, 3, 4, 5 and 6 through `python -m meditok`, with nothing shared with this process."""
    from tests.readers.bad_pictures import noise, png

    folder = tmp_path / "in"
    folder.mkdir()
    arguments, expected = [], REPRESENTATIVE.get(case, {"usage": 2, "skip": 6, "good": 0}.get(case))
    if case in REPRESENTATIVE:
        next(entry[1] for entry in BAD_INPUTS if entry[0] == case)(folder)
    else:
        png(folder / "a.png", noise(16, 16))
    if case == "usage":
        arguments = ["--size", "17"]
    if case == "skip":
        (folder / "b.png").write_bytes(b"")
        arguments = ["--on-error", "skip"]
    paths = os.pathsep.join([str(Path(meditok.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "meditok", "tokenize", str(folder), "-o", str(tmp_path / "t.parquet"), *arguments]
    done = subprocess.run(
        command, capture_output=True, env=os.environ | {"PYTHONPATH": paths, "MEDITOK_KEY_FILE": str(tmp_path / "key")}
    )
    assert done.returncode == expected, done.stderr
    assert (tmp_path / "t.parquet").exists() == (case in ("good", "skip")) and b"Traceback" not in done.stderr
