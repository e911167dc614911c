"""The report page of an evaluation: one HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
import torch

from .gallery import MAGNIFIED, Shown
from .table import MACRO, MICRO, TITLES, lines_of, metrics_of, shown

LOWER_IS_BETTER = ("mae_hu", "lpips", "st_lpips")
BARS = 64  # of a chart of code use


def render(record: dict, counts: dict[str, torch.Tensor], gallery: dict[str, list[Shown]]) -> str:
    """HTML of an evaluation's record; `counts` are the (G, K) uses of the codes of each model, `gallery` is as
    Gallery.worst_first gives it."""
    names = [model["name"] for model in record["models"]]
    parts = [
        *_head(record, names),
        *_reconstruction(record),
        *_codebooks(record, counts),
        *_probes(record),
        *_texts(record),
        *_gallery(gallery, names),
        *_protocol(record),
    ]
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        f"'unsafe-inline'\"><title>meditok evaluation: {escape(', '.join(names))}</title><style>{css}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _head(record: dict, names: list[str]) -> Iterator[str]:
    protocol = record["protocol"]
    splits = f" of split {', '.join(protocol['splits'])}" if protocol["splits"] else ", no split stated"
    failed = f"; {record['failed']} files failed and are not in the numbers" if record["failed"] else ""
    yield f"<header><h1>{escape(', '.join(names))}</h1>"
    yield (
        f"<p class=faint>{protocol['images']} images in {protocol['groups']} groups{escape(splits)}{failed}. "
        f"meditok {escape(protocol['versions'].get('meditok', ''))}.</p>"
    )
    yield (
        "<p class=notice>Research use, not a medical device. The pictures below are those that were evaluated: handle "
        "this page as you handle them. Files are named by keyed hashes.</p></header>"
    )


# ---- tables ------------------------------------------------------------------------------------------------


def _reconstruction(record: dict) -> Iterator[str]:
    models = record["models"]
    yield "<h2>Reconstruction</h2>"
    yield (
        "<p>At each model's resolution, without padding. Small figures are 95 % intervals over groups; faint rows have "
        f"under 10 images or 5 groups and are not in the {MACRO}.</p>"
    )
    yield '<div class="tables">'
    for metric in metrics_of(record):
        yield _table(metric, models)
    yield "</div>"
    yield f"<h3>Size</h3>{_sizes(models)}"
    natives = [{"name": model["name"]} | model["native"] for model in models]
    if all(model["native"]["overall_micro"]["psnr"] == model["overall_micro"]["psnr"] for model in models):
        yield "<h2>At native size</h2><p>Every picture had its model's size, so the numbers are those above.</p>"
        return
    yield '<h2>At native size</h2><p>The fitting undone, against the source.</p><div class="tables">'
    for metric in metrics_of({"models": natives}):
        yield _table(metric, natives)
    yield "</div>"


def _table(metric: str, models: list[dict]) -> str:
    """Modalities down, models across, the best value marked where several are compared."""
    heads = "".join(f"<th>{escape(model['name'])}</th>" for model in models)
    rows = []
    for entries in zip(*(lines_of(model) for model in models), strict=True):
        label, first = entries[0]
        if metric not in first:
            continue
        values = [entry.get(metric) for _, entry in entries]
        best = _best(metric, values) if len(models) > 1 else None
        cells = "".join(
            f"<td{' class=best' if value is not None and value == best else ''}>{shown(metric, value)}"
            f"{_interval(metric, (entry.get('interval') or {}).get(metric))}</td>"
            for value, (_, entry) in zip(values, entries, strict=True)
        )
        kind = "mean" if label in (MACRO, MICRO) else "" if first["counted"] else "out"
        defined = first["n"] - first.get("undefined", {}).get(metric, 0)
        rows.append(f"<tr class='{kind}'><td>{escape(label.rstrip(' *'))}</td><td>{defined}</td>{cells}</tr>")
    title = escape(TITLES.get(metric, metric))
    head = f"<thead><tr><th>{title}</th><th>images</th>{heads}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _best(metric: str, values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return (min if metric in LOWER_IS_BETTER else max)(known, default=None)


def _interval(metric: str, interval: list[float] | None) -> str:
    return "" if interval is None else f"<small>{shown(metric, interval[0])} – {shown(metric, interval[1])}</small>"


def _plain(heads: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _sizes(models: list[dict]) -> str:
    rows = [
        [model["name"], f"{model['bytes_mean']:.0f}", str(model.get("over_budget", "")), f"{model['image_size']} px"]
        + ([f"{model['fid']:.2f}" if "fid" in model else ""] if any("fid" in each for each in models) else [])
        for model in models
    ]
    heads = ["", "bytes a picture", "pictures over the budget", "at", "FID"]
    return _plain(heads[: len(rows[0])], rows)


# ---- codebooks ---------------------------------------------------------------------------------------------


def _codebooks(record: dict, counts: dict[str, torch.Tensor]) -> Iterator[str]:
    models = [model for model in record["models"] if "codebook" in model]
    if not models:
        return
    yield "<h2>Use of the codebooks</h2>"
    yield (
        "<p>Codes sorted from the most to the least used, in 64 bars; the height is the use over what even use would "
        "give, on a scale of square roots, and the line is even use.</p>"
    )
    for model in models:
        use = model["codebook"]
        yield f"<h3>{escape(model['name'])}</h3>"
        yield (
            f"<p class=faint>{use['tokens']} tokens a codebook; used at least once: {use['usage_min']:.1%} of the "
            f"codes of the least used codebook, {use['usage_mean']:.1%} on average; perplexity "
            f"{use['perplexity_mean']:.0f} of {use['codes']}.</p><div class=charts>"
        )
        for number, each in enumerate(counts[model["name"]]):
            caption = f"codebook {number}: {use['usage'][number]:.1%}, perplexity {use['perplexity'][number]:.0f}"
            yield f"<figure>{_chart(each)}<figcaption>{caption}</figcaption></figure>"
        yield "</div>"


def _chart(counts: torch.Tensor) -> str:
    """SVG of one codebook's use: sorted counts (K,) in BARS bars."""
    values = np.sort(counts.double().numpy())[::-1]
    even = values.mean()
    bars = [part.mean() / even if even else 0.0 for part in np.array_split(values, min(BARS, len(values)))]
    top = max(2.0, *bars)
    width, height, step = 192, 72, 192 / len(bars)
    shapes = "".join(
        f'<rect x="{i * step:.2f}" y="{height - h:.2f}" width="{step * 0.85:.2f}" height="{h:.2f}"/>'
        for i, h in enumerate(height * (bar / top) ** 0.5 for bar in bars)
    )
    line = height - height * (1 / top) ** 0.5
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="use of the codes"><g fill="#1f6f8b">{shapes}</g>'
        f'<path d="M0 {line:.2f}H{width}" stroke="#1d2329" stroke-width=".7" stroke-dasharray="3 2"/></svg>'
    )


# ---- probes and texts --------------------------------------------------------------------------------------


def _probes(record: dict) -> Iterator[str]:
    for column, result in record.get("probes", {}).items():
        yield f"<h2>Probe: {escape(column)}</h2>"
        if "withheld" in result:
            yield f"<p>Withheld: {escape(result['withheld'])}.</p>"
            continue
        yield (
            f"<p>{result['classes']} classes, {result['images']} images in {result['groups']} groups, "
            f"{result['left_out']} left out; {result['folds']} folds that no group is divided by.</p>"
        )
        rows = [_scores("most frequent class", "", result["majority"])]
        sets = [("pixels, PCA", result["pca"])]
        for name, scores in result["models"].items():
            sets += [(name, scores), (f"{name}, random weights", scores["random_encoder"])]
        rows += [_scores(name, kind, scores[kind]) for name, scores in sets for kind in ("linear", "knn")]
        yield _plain(["features", "classifier", "accuracy", "95 %", "balanced accuracy"], rows)


def _scores(name: str, kind: str, scores: dict) -> list[str]:
    return [name, kind, f"{scores['accuracy']:.3f}", _range(scores["interval"]), f"{scores['balanced_accuracy']:.3f}"]


def _range(interval: list[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} – {interval[1]:.3f}"


def _texts(record: dict) -> Iterator[str]:
    for name, result in record.get("texts", {}).items():
        yield f"<h2>Texts: {escape(name)}</h2>"
        for column, zero in result.get("zero_shot", {}).items():
            yield f"<h3>Zero-shot {escape(column)}, {zero['classes']} classes, {zero['images']} images</h3>"
            row = [f"{zero[key]:.3f}" for key in ("accuracy", "balanced_accuracy", "chance")]
            yield _plain(
                ["accuracy", "95 %", "balanced accuracy", "chance"], [[row[0], _range(zero["interval"]), *row[1:]]]
            )
        if "retrieval" in result:
            yield _retrieval(result["retrieval"])


def _retrieval(found: dict) -> str:
    rows = []
    for way in ("image_to_text", "text_to_image"):
        for key in ("r1", "r5", "r10"):
            chance = found[way]["chance"][key]
            interval = _range(found[way].get("interval", {}).get(key))
            rows.append(
                [f"{way.replace('_', ' ')} R@{key[1:]}", f"{found[way][key]:.3f}", interval, f"{chance:.3f}", ""]
            )
    inside = found["within_modality"]
    if inside["r1"] is not None:
        probe = inside.get("histogram_pca")
        rows.append(
            [
                "image to text R@1 within modalities",
                f"{inside['r1']:.3f}",
                _range(inside["interval"]),
                f"{inside['chance']:.3f}",
                "" if probe is None else f"{probe:.3f}",
            ]
        )
    title = f"<h3>Retrieval, {found['captions']} captions, {found['images']} images</h3>"
    return title + _plain(["", "recall", "95 %", "chance", "histogram + PCA"], rows)


# ---- pictures ----------------------------------------------------------------------------------------------


def _gallery(gallery: dict[str, list[Shown]], names: list[str]) -> Iterator[str]:
    if not any(gallery.values()):
        return
    yield "<h2>Worst pictures</h2>"
    yield (
        f"<p>The least PSNR of {escape(names[0])} in each modality, worst first: the original, what came back, and the "
        f"absolute difference, {MAGNIFIED} times as bright.</p>"
    )
    for modality, cases in gallery.items():
        yield f"<h3>{escape(modality)}</h3>"
        for case in cases:
            yield f'<div class="id">{escape(case.id)}</div>{_case(case, names)}'


def _case(case: Shown, names: list[str]) -> str:
    """One row for one codec; for several, what came back in a row and the differences below."""
    told = [
        f"{name}: {shown('psnr', scores['psnr'])} dB, SSIM {shown('ssim', scores['ssim'])}"
        for name, scores in zip(names, case.scores, strict=True)
    ]
    others = [_figure(*pair) for pair in zip(case.others, told, strict=True)]
    changed = [f"{name}: difference × {MAGNIFIED}" for name in names]
    differences = [_figure(*pair) for pair in zip(case.differences, changed, strict=True)]
    gap, columns = ([], 3) if len(names) == 1 else (["<div></div>"], 1 + len(names))
    figures = [_figure(case.original, "original"), *others, *gap, *differences]
    return f'<div class="case" style="--columns:{columns}">{"".join(figures)}</div>'


def _figure(pixels: np.ndarray, caption: str) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    data = base64.b64encode(file.getvalue()).decode()
    height, width = pixels.shape[:2]
    return (
        f'<figure><img src="data:image/webp;base64,{data}" width={width} height={height} alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _protocol(record: dict) -> Iterator[str]:
    yield "<h2>Protocol</h2><dl>"
    for key, value in record["protocol"].items():
        if value is not None:
            yield f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_fact(value))}</dd>"
    for model in record["models"]:
        facts = {k: v for k, v in model.items() if isinstance(v, (str, int, float)) and k != "name"}
        yield f"<dt>{escape(model['name'])}</dt><dd>{escape(_fact(facts))}</dd>"
    yield "</dl>"


def _fact(value: object) -> str:
    if isinstance(value, dict):
        told = ((k, "yes" if v is True else v) for k, v in value.items() if v is not None and v is not False)
        return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in told)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
