"""`meditok demo`: real scans that ship with installed packages, through the bundled model and back."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from . import options as opt
from .console import console, write_json

if TYPE_CHECKING:
    from ..data import MedicalImage
    from ..models.tokenizer import Tokenizer


class Scan(NamedTuple):
    """A picture that ships with an installed package; nothing is downloaded."""

    label: str
    package: str
    inside: str  # path in the package
    options: dict = {}  # what the file does not state, as `meditok.read` takes it
    pictures: int = 1  # that the file holds
    seen_by: tuple[str, ...] = ()  # bundled models that were trained on it


SCANS = (
    Scan("CT, spine", "pydicom", "data/test_files/CT_small.dcm"),
    Scan("CT, head", "pydicom", "data/test_files/J2K_pixelrep_mismatch.dcm"),
    Scan(
        "MRI, head",
        "nibabel",
        "tests/data/example4d.nii.gz",
        {"modality": "mr", "time_index": 0, "frame": 12},
        pictures=48,
    ),
    Scan("Ultrasound", "pydicom", "data/test_files/examples_rgb_color.dcm"),
    Scan("Histology, IHC", "skimage", "data/ihc.png", {"modality": "histology"}),
    Scan("Fundus", "skimage", "data/retina.jpg", {"modality": "fundus"}, seen_by=("tiny",)),
)


@dataclass
class Shown:
    """One scan before and after, and what it cost."""

    label: str
    original: MedicalImage
    decoded: MedicalImage
    psnr: float  # dB, at native size, over the window
    ssim: float
    source_bytes: int  # of the file, shared among the pictures it holds
    token_bytes: int  # of the ids, tightly packed
    grid: tuple[int, int, int]  # rows, columns, codebooks
    seen: bool  # the model was trained on this very picture

    def line(self) -> str:
        size = f"{self.original.height}x{self.original.width}"
        return (
            f"{self.label:<15} {size:>9}  PSNR {self.psnr:5.2f} dB  SSIM {self.ssim:.3f}  {self.token_bytes} "
            f"bytes of tokens for {self.source_bytes} of file ({self.source_bytes / self.token_bytes:.0f}x fewer)"
            + (", seen in training" if self.seen else "")
        )


@click.command(
    "demo",
    help="Tokenise a few real scans that ship with installed packages, and show what comes back. Downloads "
    "nothing; writes tokens.parquet and side-by-side.png into DIR only.",
)
@click.option("-o", "--output", "out", metavar="DIR", default="meditok-demo", show_default=True)
@opt.modelling
@opt.speaking
def command(out: str, model: str, device: str, precision: str, json_out: str | None) -> int:
    from ..errors import UsageError
    from .jobs import load_model, outputs_of
    from .sheet import draw_sheet

    folder = Path(out)
    if folder.is_file():
        raise UsageError(f"{out}: a file of that name is in the way; name a folder")
    outputs_of(out, json_out)
    loaded = load_model(model, device, precision)
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for item in run_demo(loaded, folder / "tokens.parquet"):
        shown.append(item)
        if json_out != "-":
            click.echo(item.line())
    draw_sheet(shown, loaded.config.name, folder / "side-by-side.png")
    rows, columns, groups = shown[0].grid
    files = f"{folder / 'tokens.parquet'} and {folder / 'side-by-side.png'}"
    made = f"each picture is {rows}x{columns} positions x {groups} ids; wrote {files}"
    console.info(made, private=True)
    console.info("research use, not a medical device")
    write_json(
        json_out,
        [
            {
                "label": s.label,
                "modality": s.original.modality,
                "height": s.original.height,
                "width": s.original.width,
                "psnr": s.psnr,
                "ssim": s.ssim,
                "token_bytes": s.token_bytes,
                "source_bytes": s.source_bytes,
                "seen_in_training": s.seen,
            }
            for s in shown
        ],
    )
    return 0


def scans() -> Iterator[tuple[Scan, Path, MedicalImage]]:
    """The scans that are here, each with its file and picture. MissingPartError where none is."""
    from ..data import read
    from ..errors import MissingPartError

    found = 0
    for scan in SCANS:
        spec = importlib.util.find_spec(scan.package)
        path = Path(spec.submodule_search_locations[0]) / scan.inside if spec else None
        if path is None or not path.is_file():
            console.warning(f"{scan.label} is left out: the installed {scan.package} does not hold {scan.inside}")
            continue
        try:
            image = read(path, **scan.options)
        except MissingPartError as error:
            console.warning(f"{scan.label} is left out: {error}")
            continue
        found += 1
        yield scan, path, image
    if not found:
        raise MissingPartError(
            "demo: no scan found; the pictures come with pydicom, nibabel and scikit-image, pip install them"
        )


def run_demo(model: Tokenizer, tokens: Path) -> Iterator[Shown]:
    """Tokenise the scans into `tokens`, then decode that file; yields one Shown a scan."""
    from ..bulk.reading import PATCH, describe
    from ..data import fit
    from ..tokens.format import TokenReader, TokenWriter
    from ..tokens.keys import Namer
    from ..tokens.restore import restore
    from ..tokens.schema import TokenInfo

    size = model.config.image_size
    info = TokenInfo.of(model, (size // PATCH, size // PATCH), stable=True)
    namer = Namer(b"", keep_names=True)  # public pictures: no key is made on this machine
    originals = []
    with TokenWriter(tokens, info) as writer:
        for scan, path, image in scans():
            fitted = fit(image, size, "pad", multiple=PATCH)[0]
            ids = model.tokenize(fitted.pixels[None], stable=True).cpu().numpy()
            writer.write(ids, [describe(fitted, f"{path.name}#0", namer)])
            originals.append((scan, path, image))
    bits = (info.codebook_size - 1).bit_length() * info.num_codebooks * info.positions
    with TokenReader([tokens]) as reader:
        decoded = restore(reader.batches(1), info, reader.descriptions(), model, str(tokens))
        for (scan, path, image), picture in zip(originals, decoded, strict=True):
            psnr, ssim = compare(image, picture.image)
            yield Shown(
                scan.label,
                image,
                picture.image,
                psnr,
                ssim,
                path.stat().st_size // scan.pictures,
                -(-bits // 8),
                (*info.grid, info.num_codebooks),
                model.config.name in scan.seen_by,
            )


def compare(original: MedicalImage, decoded: MedicalImage) -> tuple[float, float]:
    """PSNR in dB and SSIM over the window, at native size, without rounding, as `meditok evaluate` has them."""
    from ..evaluate.metrics import psnr, ssim

    channels = 1 if original.channels == 1 else 3
    pair = [(image.pixels[:channels].double() + 1) / 2 for image in (original, decoded)]
    return psnr(*pair, 1.0), ssim(*pair, 1.0)
