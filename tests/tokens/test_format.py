"""The Parquet token file: schema, header, atomic writing, and what is refused on reading."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meditok.errors import (
    BadInputError,
    CodebookMismatchError,
    MeditokError,
    TokenRangeError,
    TokenShapeError,
    UsageError,
)
from meditok.tokens import TokenInfo, Tokens
from meditok.tokens.format import TokenReader, TokenWriter
from meditok.tokens.schema import PRIVACY


def rewrite(path, change=lambda table: table, header=lambda pairs: pairs):
    """Write a token file again with its table or its header changed, as a careless tool would."""
    table = pq.read_table(path)
    metadata = header({k.decode(): v.decode() for k, v in table.schema.metadata.items()})
    pq.write_table(change(table).replace_schema_metadata(metadata), path)


def with_tokens(column):
    return lambda table: table.set_column(table.schema.get_field_index("tokens"), "tokens", column(table))


def test_the_columns_have_the_promised_names_and_types(make_tokens, tmp_path):
    make_tokens(label=None).save(tmp_path / "t.parquet")
    schema = pq.read_schema(tmp_path / "t.parquet")
    found = {f.name: str(f.type) for f in schema}
    assert list(found) == [
        "id",
        "tokens",
        "height",
        "width",
        "modality",
        "body_part",
        "window",
        "unit",
        "low",
        "high",
        "channels",
        "source",
        "volume",
        "slice",
        "frame",
        "position",
        "tile",
        "geometry",
        "steps",
        "label",
    ]
    assert found["tokens"] == "fixed_size_list<element: uint16 not null>[128]"
    assert not schema.field("tokens").nullable
    assert [found[n] for n in ("height", "low", "channels", "slice", "position")] == [
        "int32",
        "double",
        "int8",
        "int32",
        "double",
    ]
    assert found["tile"] == "struct<y: int32, x: int32, h: int32, w: int32>"
    assert found["geometry"] == (
        "struct<original_shape: list<element: int64>, axis: int8, plane: string, fit: string, scale_y: "
        "double, scale_x: double, pad: list<element: int32>, spacing: list<element: double>, affine: "
        "list<element: double>, space: string>"
    )
    assert found["steps"] == "list<element: string>"


def test_ids_are_dictionary_encoded_zstd_of_about_twelve_bits(make_tokens, tmp_path):
    info = TokenInfo("tiny", "a", "b", 8, 4096, (16, 16))
    make_tokens(512, info).save(tmp_path / "t.parquet")
    column = next(
        c
        for c in (pq.read_metadata(tmp_path / "t.parquet").row_group(0).column(i) for i in range(5))
        if c.path_in_schema.startswith("tokens")
    )
    assert column.compression == "ZSTD"
    assert "RLE_DICTIONARY" in column.encodings
    assert column.total_compressed_size < 1.05 * 512 * 2048 * 12 / 8


def test_more_than_65536_codes_are_stored_as_uint32(make_tokens, tmp_path):
    info = dataclasses.replace(TokenInfo("m", "a", "b", 1, 70000, (2, 2)))
    tokens = make_tokens(3, info)
    tokens.save(tmp_path / "t.parquet")
    assert pq.read_schema(tmp_path / "t.parquet").field("tokens").type.value_type == pa.uint32()
    assert (Tokens.load(tmp_path / "t.parquet").codes == tokens.codes).all()


def test_a_file_comes_back_as_it_was(make_tokens, tmp_path):
    tokens = make_tokens(7, group="a")
    tokens.save(tmp_path / "t.parquet")
    back = Tokens.load(tmp_path / "t.parquet")
    assert back.info == tokens.info
    assert back.rows == tokens.rows
    assert (back.codes == tokens.codes).all() and back.ids.dtype.is_signed


def test_the_header_tells_what_is_needed_and_nothing_about_the_machine(make_tokens, tmp_path):
    make_tokens().save(tmp_path / "t.parquet")
    header = {k.decode(): v.decode() for k, v in pq.read_schema(tmp_path / "t.parquet").metadata.items()}
    expected = {
        "meditok.format": "1",
        "model": "tiny",
        "model_hash": "a" * 64,
        "codebook_hash": "b" * 64,
        "G": "8",
        "K": "4096",
        "axis_order": "G,N",
        "id_base": "0",
        "precision": "fp32",
        "device_class": "cpu",
        "stable": "true",
        "licence": "CC-BY-4.0",
        "intended_use": "research use, not a medical device",
        "privacy": PRIVACY,
    }
    assert json.loads(header.pop("grid")) == [4, 4]
    assert header == expected


def test_the_bytes_do_not_depend_on_how_rows_arrive(make_tokens, tmp_path):
    tokens = make_tokens(1200)
    for name, step in (("a", 1200), ("b", 7)):
        with TokenWriter(tmp_path / name, tokens.info) as writer:
            for start in range(0, 1200, step):
                writer.write(tokens.codes[start : start + step], tokens.rows[start : start + step])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_interrupted_writer_leaves_nothing(make_tokens, tmp_path):
    tokens = make_tokens(600)
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path / "t.parquet", tokens.info) as writer:
        writer.write(tokens.codes, tokens.rows)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_file_that_was_there(make_tokens, tmp_path):
    make_tokens(2).save(tmp_path / "t.parquet")
    before = (tmp_path / "t.parquet").read_bytes()
    with pytest.raises(TokenRangeError), TokenWriter(tmp_path / "t.parquet", make_tokens().info) as writer:
        writer.write(np.full((1, 8, 16), 4096), make_tokens(1).rows)
    assert (tmp_path / "t.parquet").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("column", "error", "said"),
    [
        (lambda t: pa.array([[-1] * 128] * len(t), pa.list_(pa.int64())), TokenRangeError, "-1"),
        (lambda t: pa.array([[4096] * 128] * len(t), pa.list_(pa.int64())), TokenRangeError, "4096"),
        (lambda t: pa.array([[2**31] * 128] * len(t), pa.list_(pa.int64())), TokenRangeError, "2147483648"),
        (lambda t: pa.array([[0.5] * 128] * len(t), pa.list_(pa.float32())), TokenRangeError, "float"),
        (lambda t: pa.array([[True] * 128] * len(t), pa.list_(pa.bool_())), TokenRangeError, "bool"),
        (lambda t: pa.array([[None] * 128] * len(t), pa.list_(pa.int32())), TokenRangeError, "null"),
        (lambda t: pa.array([[0] * 817] * len(t), pa.list_(pa.int32())), TokenShapeError, "817"),
        (lambda t: pa.array([[0] * 112] * len(t), pa.list_(pa.int32())), TokenShapeError, "112"),
        (lambda t: pa.array([None] * len(t), pa.list_(pa.int32())), TokenShapeError, "rows of 0"),
        (lambda t: pa.array([7] * len(t)), TokenShapeError, "int64"),
    ],
    ids=["-1", "K", "2^31", "float", "bool", "null", "817", "7 of 8 codebooks", "null row", "scalar"],
)
def test_edited_ids_are_refused_by_name(make_tokens, tmp_path, column, error, said):
    make_tokens().save(tmp_path / "t.parquet")
    rewrite(tmp_path / "t.parquet", with_tokens(column))
    with pytest.raises(error, match=said):
        Tokens.load(tmp_path / "t.parquet")


def test_a_range_error_names_smallest_largest_and_k(make_tokens):
    tokens = make_tokens()
    ids = tokens.ids.clone()
    ids[2, 3, 5] = 5000
    with pytest.raises(TokenRangeError, match=r"to 5000, first bad one in row 2, codebook 3, position 5.*K = 4096"):
        Tokens(ids, tokens.rows, tokens.info)


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (lambda h: {k: v for k, v in h.items() if k != "meditok.format"}, BadInputError),
        (lambda h: h | {"meditok.format": "2"}, CodebookMismatchError),
        (lambda h: h | {"axis_order": "N,G"}, BadInputError),
        (lambda h: h | {"id_base": "1"}, BadInputError),
        (lambda h: h | {"grid": "sixteen"}, BadInputError),
        (lambda h: h | {"K": "0"}, BadInputError),
        (lambda h: {k: v for k, v in h.items() if k != "codebook_hash"}, BadInputError),
    ],
    ids=["not ours", "format 2", "axis order", "id base", "grid", "K 0", "no hash"],
)
def test_a_header_that_does_not_fit_is_refused(make_tokens, tmp_path, header, error):
    make_tokens().save(tmp_path / "t.parquet")
    rewrite(tmp_path / "t.parquet", header=header)
    with pytest.raises(error, match="t.parquet"):
        Tokens.load(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b"hello" * 99,
        lambda b: b[:60] + bytes(200) + b[260:],
    ],
)
def test_a_damaged_file_is_a_bad_input(make_tokens, tmp_path, damage):
    make_tokens(600).save(tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(damage(data))
    with pytest.raises(MeditokError, match="t.parquet"):
        Tokens.load(tmp_path / "t.parquet")


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(BadInputError, match="no such token file"):
        TokenReader([tmp_path / "none.parquet"])


def test_a_manifest_column_may_not_take_the_name_of_ours(make_tokens, tmp_path):
    with pytest.raises(UsageError, match="modality"):
        make_tokens(modality="x").save(tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("geometry", pa.array(["here"] * 5), "geometry"),
        ("low", pa.array([float("nan")] * 5), "low nan"),
        ("channels", pa.array([4] * 5, pa.int8()), "4 channels"),
        ("slice", pa.array([99] * 5, pa.int32()), "slice 99"),
        ("tile", pa.array([{"y": 0, "x": 0, "h": 9000, "w": 1}] * 5), "tile"),
        ("id", pa.array([None] * 5, pa.string()), "without id"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_row_that_describes_no_picture_is_refused_by_name(make_tokens, tmp_path, column, value, said):
    make_tokens().save(tmp_path / "t.parquet")
    rewrite(tmp_path / "t.parquet", lambda t: t.set_column(t.schema.get_field_index(column), column, value))
    with pytest.raises(BadInputError, match=said):
        Tokens.load(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "change",
    [
        {"original_shape": (40,)},
        {"original_shape": (0, 4)},
        {"original_shape": (2**20, 2**20)},
        {"axis": 5},
        {"fit": "squash"},
        {"plane": "diagonal"},
        {"pad": (0, 0, 0)},
        {"affine": (1.0,) * 15},
        {"axis": 2, "plane": "axial", "original_shape": (4, 4, 4)},
        {"affine": (float("inf"),) * 16},
    ],
)
def test_a_geometry_that_cannot_be_is_refused(make_tokens, tmp_path, change):
    tokens = make_tokens(1)
    row = dataclasses.replace(tokens.rows[0], geometry=dataclasses.replace(tokens.rows[0].geometry, **change))
    Tokens(tokens.ids, [row], tokens.info).save(tmp_path / "t.parquet")
    with pytest.raises(MeditokError, match="t.parquet: row"):
        Tokens.load(tmp_path / "t.parquet")


def test_columns_written_back_by_other_tools_are_read(make_tokens, tmp_path):
    tokens = make_tokens()
    tokens.save(tmp_path / "t.parquet")

    def as_others_do(table):
        strings = table.set_column(0, "id", table.column("id").cast(pa.large_string()))
        dictionary = strings.column("modality").dictionary_encode()
        return strings.set_column(strings.schema.get_field_index("modality"), "modality", dictionary)

    rewrite(tmp_path / "t.parquet", as_others_do)
    assert Tokens.load(tmp_path / "t.parquet").rows == tokens.rows
