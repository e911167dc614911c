"""The page that tells how a run went: one HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..atomic import write_text
from ..models.config import INTENDED_USE
from ..models.teachers import Card
from .config import TrainConfig
from .loop import LOG

PAGE = "report.html"
POINTS = 400  # of a curve; longer logs are thinned evenly
WIDTH, HEIGHT = 320, 120
SHEETS = 4  # shown, evenly over the run, the last among them
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#1d2329}"
    "h1,h2{font-weight:600}figure{display:inline-block;margin:0 1rem 1rem 0}figcaption,.faint{color:#5b6670;"
    "font-size:13px}img{max-width:100%}table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;"
    "text-align:left;vertical-align:top}"
)


def write_report(
    out: Path, config: TrainConfig, *, modalities: dict[str, int], cards: Sequence[Card], setting: dict
) -> Path:
    """Write DIR/report.html from log.csv and the sheets of a finished run.

    modalities: images a modality; cards: the frozen networks that took part; setting: machine and versions.
    """
    with open(out / LOG, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src "
        f"'unsafe-inline'\"><title>meditok training</title><style>{STYLE}</style>",
        f"<h1>{escape(config.preset)}, aligned with {'texts' if config.target == 'text' else 'images'}</h1>",
        f"<p>{config.steps} steps of {config.batch} images of {config.size} px; {escape(INTENDED_USE)}. The pictures "
        "below are training images: handle this page as you handle them.</p>",
        "<h2>Curves</h2><p class=faint>Each against the step; left the first value, right the last.</p>",
        *(_curve(name, rows) for name in (rows[-1] if rows else {}) if name != "step"),
        "<h2>Reconstructions</h2><p class=faint>Originals above, what came back below.</p>",
        *(_sheet(path) for path in _some(sorted(out.glob("sheet-*.png")), SHEETS)),
        "<h2>Data</h2>",
        _table([(name, str(count)) for name, count in sorted(modalities.items())], ("modality", "images")),
        "<h2>Networks that took part, frozen</h2>",
        _table(
            [(card.name, card.licence, card.trained_on, card.source) for card in cards],
            ("network", "licence", "trained on", "from"),
        ),
        "<h2>Settings</h2>",
        _table([(key, json.dumps(value)) for key, value in (config.record() | setting).items()], ("", "")),
        "</html>\n",
    ]
    path = out / PAGE
    write_text(path, "".join(parts))
    return path


def _curve(name: str, rows: list[dict]) -> str:
    """A column of the log as a figure; blank fields (of another phase or version) are left out."""
    points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
    if not points:
        return ""
    points = _some(points, POINTS)
    (x0, first), (x1, last) = points[0], points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    line = " ".join(
        f"{WIDTH * (x - x0) / max(1, x1 - x0):.1f},{4 + (HEIGHT - 8) * (1 - (y - low) / (high - low or 1)):.1f}"
        for x, y in points
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width={WIDTH} height={HEIGHT} role=img '
        f'aria-label="{escape(name)}"><polyline points="{line}" fill=none stroke="#1f6f8b" stroke-width=1.5 /></svg>'
        f"<figcaption><b>{escape(name)}</b> {first:.4g} → {last:.4g}</figcaption></figure>"
    )


def _sheet(path: Path) -> str:
    data, step = base64.b64encode(path.read_bytes()).decode(), int(path.stem.rpartition("-")[2])
    return f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>step {step}</figcaption></figure>'


def _some(values: list, count: int) -> list:
    """At most `count` of the values, spread evenly, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _table(rows: Sequence[tuple[str, ...]], heads: tuple[str, ...]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"
