"""The demo's picture: originals above, what came back below, labelled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .._lazy import require
from ..atomic import atomic_path

if TYPE_CHECKING:
    from .demo import Shown

CELL, GAP, MARGIN = 288, 16, 28  # pixels
HEADER, FOOTER = 92, 84
ROW_LABEL = 34  # width of the column that names the two rows
BACKGROUND, INK, FAINT, LINE = (250, 250, 248), (32, 36, 40), (110, 116, 122), (214, 216, 218)


def draw_sheet(shown: list[Shown], model: str, path: Path) -> None:
    """Write the side-by-side picture of the demo as PNG."""
    require("PIL.Image", purpose="drawing the demo's picture")
    from PIL import Image, ImageDraw

    width = 2 * MARGIN + ROW_LABEL + len(shown) * (CELL + GAP) - GAP
    height = MARGIN + HEADER + 2 * CELL + GAP + FOOTER + MARGIN // 2
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), f"meditok demo: model {model}", INK, _font(26))
    note = (
        f"Above: the scan in its window. Below: decoded from {' x '.join(map(str, shown[0].grid))} token ids "
        f"({shown[0].token_bytes} bytes). Research use, not a medical device."
    )
    draw.text((MARGIN, MARGIN + 30), note, FAINT, _font(15))
    top = MARGIN + HEADER
    for row, label in enumerate(("original", "from tokens")):
        y = top + row * (CELL + GAP)
        _vertical(sheet, label, MARGIN - 6, y)
    for column, item in enumerate(shown):
        x = MARGIN + ROW_LABEL + column * (CELL + GAP)
        draw.text((x, top - 26), item.label, INK, _font(17))
        size = f"{item.original.height} x {item.original.width}"
        draw.text((x + CELL, top - 24), size, FAINT, _font(14), anchor="ra")
        for row, image in enumerate((item.original, item.decoded)):
            y = top + row * (CELL + GAP)
            picture = _thumbnail(image)
            draw.rectangle((x - 1, y - 1, x + CELL, y + CELL), fill=(0, 0, 0), outline=LINE)
            sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
        y = top + 2 * CELL + GAP + 10
        draw.text((x, y), f"PSNR {item.psnr:.1f} dB   SSIM {item.ssim:.3f}", INK, _font(16))
        draw.text(
            (x, y + 24),
            f"{_kilo(item.source_bytes)} file, {_kilo(item.token_bytes)} of tokens"
            + (", seen in training" if item.seen else ""),
            FAINT,
            _font(14),
        )
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _thumbnail(image):
    """A picture scaled to fit a cell, aspect kept."""
    from PIL import Image

    from ..data.windows import to_display8

    picture = Image.fromarray(to_display8(image.pixels).permute(1, 2, 0).contiguous().numpy())
    scale = CELL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _vertical(sheet, text: str, x: int, y: int) -> None:
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (CELL, 24), BACKGROUND)
    ImageDraw.Draw(strip).text((CELL // 2, 12), text, FAINT, _font(15), anchor="mm")
    sheet.paste(strip.rotate(90, expand=True), (x, y))


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _kilo(count: int) -> str:
    return f"{count / 1000:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"
