"""The token file's columns and header, and their way to and from Python (format 1)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BadInputError, CodebookMismatchError, TokenRangeError, TokenShapeError, UnsafeFileError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from ..data import Geometry

FORMAT = 1
AXIS_ORDER = "G,N"  # a row's ids: codebook 0's N positions in raster order, then codebook 1's, ...
PRIVACY = "tokens are pseudonymised at best: whoever has the model can reconstruct the image"
SPACE = "RAS+mm"
MAX_IDS = 2**22  # a row: 16 codebooks for 8192 x 8192 pixels


def id_dtype(codebook_size: int) -> type:
    """NumPy type of stored ids: the smallest of the two the format knows."""
    return np.uint16 if codebook_size <= 65536 else np.uint32


@dataclass(frozen=True)
class TokenInfo:
    """A token file's header: what made the ids, and what is needed to read them."""

    model: str  # name, never a path
    model_hash: str  # hex digits
    codebook_hash: str  # hex digits
    num_codebooks: int  # G
    codebook_size: int  # K
    grid: tuple[int, int]  # positions (rows, columns); N = rows * columns
    precision: str = "fp32"
    device_class: str = "cpu"
    stable: bool = True  # ids do not depend on the batch they were computed in
    licence: str = "unstated"
    intended_use: str = "research use, not a medical device"
    settings: str = ""  # keyed digest of inputs and options, "" if not made from files

    @property
    def positions(self) -> int:
        """N, positions a picture."""
        return self.grid[0] * self.grid[1]

    @classmethod
    def of(cls, model, grid: tuple[int, int], *, stable: bool, settings: str = "") -> TokenInfo:
        """The header of tokens that `model` (a Tokenizer) makes on `grid`."""
        config = model.config
        return cls(
            config.name,
            model.hash,
            model.codebook_hash,
            config.num_codebooks,
            config.codebook_size,
            tuple(grid),
            model.precision,
            model.device.type,
            stable,
            config.licence,
            config.intended_use,
            settings,
        )

    def to_metadata(self) -> dict[str, str]:
        """Parquet key-value pairs; numbers, truth values and the grid are JSON."""
        pairs = {
            "meditok.format": str(FORMAT),
            "model": self.model,
            "model_hash": self.model_hash,
            "codebook_hash": self.codebook_hash,
            "G": str(self.num_codebooks),
            "K": str(self.codebook_size),
            "grid": json.dumps(list(self.grid)),
            "axis_order": AXIS_ORDER,
            "id_base": "0",
            "precision": self.precision,
            "device_class": self.device_class,
            "stable": json.dumps(self.stable),
            "licence": self.licence,
            "intended_use": self.intended_use,
            "privacy": PRIVACY,
        }
        return pairs | ({"settings": self.settings} if self.settings else {})

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None, where: str) -> TokenInfo:
        """Inverse of to_metadata.

        BadInputError: not a token file, or a broken header; CodebookMismatchError: another format version.
        """
        pairs = {
            key.decode("utf-8", "replace"): value.decode("utf-8", "replace") for key, value in (metadata or {}).items()
        }
        version = pairs.get("meditok.format")
        if version is None:
            raise BadInputError(
                f"{where}: no meditok token file (its header has no meditok.format); give a file written by "
                "meditok tokenize"
            )
        if version != str(FORMAT):
            raise CodebookMismatchError(
                f"{where}: token format {version}, codebook {pairs.get('codebook_hash', '?')}; this meditok "
                f"reads format {FORMAT} only; use the version that wrote it"
            )
        try:
            if pairs["axis_order"] != AXIS_ORDER or pairs["id_base"] != "0":
                raise BadInputError(
                    f"{where}: axis_order {pairs['axis_order']}, id_base {pairs['id_base']}, not "
                    f"{AXIS_ORDER} and 0; write the file again with meditok tokenize"
                )
            rows, columns = json.loads(pairs["grid"])
            info = cls(
                pairs["model"],
                pairs["model_hash"],
                pairs["codebook_hash"],
                int(pairs["G"]),
                int(pairs["K"]),
                (int(rows), int(columns)),
                pairs["precision"],
                pairs["device_class"],
                bool(json.loads(pairs["stable"])),
                pairs["licence"],
                pairs["intended_use"],
                pairs.get("settings", ""),
            )
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, BadInputError):
                raise
            raise BadInputError(f"{where}: broken token file header ({error}); write it anew") from None
        if min(*info.grid, info.num_codebooks, info.codebook_size) < 1:
            raise BadInputError(
                f"{where}: broken token file header (G {info.num_codebooks}, K {info.codebook_size}, grid "
                f"{info.grid}); write the file again"
            )
        if info.num_codebooks * info.positions > MAX_IDS:
            raise UnsafeFileError(
                f"{where}: G {info.num_codebooks} and grid {info.grid} claim more than {MAX_IDS} ids a row; it was not "
                "read; write the file again with meditok tokenize"
            )
        return info

    def check_model(self, model, where: str) -> None:
        """CodebookMismatchError, naming both codebooks, unless `model` (a Tokenizer) can decode these ids."""
        config = model.config
        sizes = config.num_codebooks, config.codebook_size
        if self.codebook_hash == model.codebook_hash and (self.num_codebooks, self.codebook_size) == sizes:
            return
        raise CodebookMismatchError(
            f"{where}: made by model {self.model} with codebook {self.codebook_hash} (G "
            f"{self.num_codebooks}, K {self.codebook_size}), but model {config.name} has codebook "
            f"{model.codebook_hash} (G {config.num_codebooks}, K {config.codebook_size}); decode with the "
            "model that made the tokens (--model)"
        )


@dataclass(frozen=True)
class Description:
    """What a token file says of one row; units and meanings as in MedicalImage."""

    id: str
    height: int  # pixels of what was tokenised
    width: int
    modality: str = "other"
    body_part: str = ""
    window: str = ""
    unit: str = ""
    low: float = 0.0  # value, in `unit`, that -1 stands for
    high: float = 255.0  # value, in `unit`, that +1 stands for
    channels: int = 3
    source: str = ""  # keyed hash
    volume: str = ""  # keyed hash; "" for a picture that belongs to no volume
    slice: int | None = None  # index along geometry.axis
    frame: int = 0
    position: float | None = None  # mm along the slice normal
    tile: tuple[int, int, int, int] | None = None  # y, x, h, w in native pixels
    geometry: Geometry | None = None
    steps: tuple[str, ...] = ()
    extra: dict[str, str | None] = field(default_factory=dict)  # copied manifest columns


def arrow_schema(info: TokenInfo, extra: tuple[str, ...] = ()) -> pa.Schema:
    """The Parquet schema of a token file, header included; `extra` names copied manifest columns."""
    import pyarrow as pa

    ids = pa.uint16() if id_dtype(info.codebook_size) is np.uint16 else pa.uint32()
    tokens = pa.list_(pa.field("element", ids, nullable=False), info.num_codebooks * info.positions)
    geometry = pa.struct(
        [
            ("original_shape", pa.list_(pa.int64())),
            ("axis", pa.int8()),
            ("plane", pa.string()),
            ("fit", pa.string()),
            ("scale_y", pa.float64()),
            ("scale_x", pa.float64()),
            ("pad", pa.list_(pa.int32())),
            ("spacing", pa.list_(pa.float64())),
            ("affine", pa.list_(pa.float64())),
            ("space", pa.string()),
        ]
    )
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("tokens", tokens, nullable=False),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("modality", pa.string()),
        ("body_part", pa.string()),
        ("window", pa.string()),
        ("unit", pa.string()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("channels", pa.int8()),
        ("source", pa.string()),
        ("volume", pa.string()),
        ("slice", pa.int32()),
        ("frame", pa.int32()),
        ("position", pa.float64()),
        ("tile", pa.struct([(name, pa.int32()) for name in "yxhw"])),
        ("geometry", geometry),
        ("steps", pa.list_(pa.string())),
    ]
    check_extra(extra)
    return pa.schema(fields + [(name, pa.string()) for name in extra], metadata=info.to_metadata())


def to_batch(ids: np.ndarray, rows: list[Description], schema: pa.Schema) -> pa.RecordBatch:
    """Ids (R, G, N) and their descriptions as one Arrow record batch of `schema`."""
    import pyarrow as pa

    tokens = schema.field("tokens").type
    flat = pa.array(np.ascontiguousarray(ids).reshape(-1), tokens.value_type)
    columns = {"tokens": pa.FixedSizeListArray.from_arrays(flat, type=tokens)}
    for name in schema.names[2:]:
        columns[name] = pa.array([_cell(row, name) for row in rows], schema.field(name).type)
    columns["id"] = pa.array([row.id for row in rows], pa.string())
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _cell(row: Description, name: str):
    if name == "geometry":
        return None if row.geometry is None else row.geometry.to_dict()
    if name == "tile":
        return None if row.tile is None else dict(zip("yxhw", row.tile, strict=True))
    value = getattr(row, name) if name in _FIELDS else row.extra.get(name)
    return None if value == "" else value


_FIELDS = {f.name for f in dataclasses.fields(Description)} - {"extra"}


def check_extra(names: Sequence[str]) -> None:
    """UsageError for a copied column that has the name of another column of the token file."""
    taken = _FIELDS | {"tokens"}
    for name in names:
        if name in taken:
            raise UsageError(
                f"manifest column {name!r}: the token file has a column of that name; rename it or leave it "
                "out of --columns"
            )
        taken.add(name)


def from_batch(batch: pa.RecordBatch, where: str) -> list[Description]:
    """Descriptions of a record batch; its `tokens` column, if any, is left alone.

    BadInputError: a column of another type than the format's, or values that describe no picture.
    """
    from .checks import check_row, known_types

    types = known_types()
    names = [name for name in batch.schema.names if name != "tokens"]
    columns = {}
    for name in names:
        column = batch.column(name)
        if name in types and column.type != types[name]:
            column = _cast(column, types[name], name, where)
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError:
            raise BadInputError(f"{where}: column {name} holds text that is not UTF-8; write it anew") from None
    rows = []
    for index in range(batch.num_rows):
        cells = {name: values[index] for name, values in columns.items()}
        rows.append(check_row(cells, _FIELDS, where))
    return rows


def _cast(column: pa.Array, wanted: pa.DataType, name: str, where: str) -> pa.Array:
    import pyarrow as pa

    try:
        return column.cast(wanted)
    except pa.ArrowException:
        raise BadInputError(f"{where}: column {name} is {column.type} and not {wanted}; write it anew") from None


def ids_of(column: pa.Array, info: TokenInfo, where: str) -> np.ndarray:
    """The `tokens` column as (R, G, N) in the stored type, each id checked.

    TokenShapeError: not G * N ids a row; TokenRangeError: not integers, or outside 0..K-1.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    groups, positions, codes = info.num_codebooks, info.positions, info.codebook_size
    if not (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        raise TokenShapeError(f"{where}: tokens are {column.type}, expected lists of {groups * positions} ids")
    if not pa.types.is_integer(column.type.value_type):
        raise TokenRangeError(
            f"{where}: tokens of type {column.type.value_type}; ids are integers from 0 to {codes - 1} (K = {codes})"
        )
    lengths = {length or 0 for length in pc.unique(pc.list_value_length(column)).to_pylist()}
    if not lengths <= {groups * positions}:
        raise TokenShapeError(
            f"{where}: rows of {', '.join(map(str, sorted(lengths)[:5]))} ids; grid {info.grid[0]} x "
            f"{info.grid[1]} with {groups} codebooks needs {groups * positions}"
        )
    flat = column.flatten()
    if flat.null_count:
        raise TokenRangeError(
            f"{where}: {flat.null_count} tokens are null; ids run from 0 to {codes - 1} (K = {codes})"
        )
    values = flat.to_numpy(zero_copy_only=False).reshape(len(column), groups, positions)
    check_range(values, codes, where)
    return values.astype(id_dtype(codes), copy=False)


def check_range(ids: np.ndarray, codebook_size: int, where: str) -> None:
    """TokenRangeError, naming smallest, largest, K and the first place, unless all (R, G, N) ids lie in
    0..K-1.
    """
    if not ids.size or (ids.min() >= 0 and ids.max() < codebook_size):
        return
    row, group, position = (int(i) for i in np.argwhere((ids < 0) | (ids >= codebook_size))[0])
    raise TokenRangeError(
        f"{where}: ids from {ids.min()} to {ids.max()}, first bad one in row {row}, codebook {group}, "
        f"position {position}; ids run from 0 to {codebook_size - 1} (K = {codebook_size})"
    )
