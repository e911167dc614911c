"""The record of an evaluation as text: one table of all codecs, a line a modality."""

from __future__ import annotations

from collections.abc import Iterator

DIGITS = {"psnr": 2, "mae_hu": 1}  # decimals; three otherwise
TITLES = {
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "mae_hu": "MAE HU",
    "st_lpips": "ST-LPIPS",
    "lpips": "LPIPS",
}
MACRO, MICRO = "mean of modalities", "mean of images"


def metrics_of(record: dict) -> list[str]:
    """Names of the metrics that any codec has, in the order of TITLES, then others as they come."""
    found = dict.fromkeys(key for model in record["models"] for key in model["overall_micro"]["interval"])
    return sorted(found, key=lambda key: list(TITLES).index(key) if key in TITLES else len(TITLES))


def shown(metric: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.{DIGITS.get(metric, 3)}f}"


def lines_of(model: dict) -> list[tuple[str, dict]]:
    """(label, entry) of every line of a codec: modalities, then both means. * marks what the macro mean leaves out."""
    lines = [(name + ("" if entry["counted"] else " *"), entry) for name, entry in model["modalities"].items()]
    return [*lines, (MACRO, model["overall"]), (MICRO, model["overall_micro"])]


def table(record: dict) -> str:
    """Plain text in columns: codec, modality, images, groups, one column a metric."""
    metrics = metrics_of(record)
    rows = [["", "", "images", "groups", *(TITLES.get(metric, metric) for metric in metrics)]]
    for model in record["models"]:
        for number, (label, entry) in enumerate(lines_of(model)):
            values = [shown(metric, entry.get(metric)) for metric in metrics]
            name = model["name"] if number == 0 else ""
            rows.append([name, label, str(entry["n"]), str(entry.get("groups", "")), *values])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    notes = [_size(model) for model in record["models"]]
    if any(not entry["counted"] for model in record["models"] for entry in model["modalities"].values()):
        notes.append("* left out of the mean of modalities: fewer than 10 images or 5 groups")
    return "\n".join(line.rstrip() for line in [*aligned, *notes, *_probes(record), *_texts(record)])


def _size(model: dict) -> str:
    text = f"{model['name']}: {model['bytes_mean']:.0f} bytes a picture"
    if model.get("over_budget"):
        text += f", {model['over_budget']} of them over the budget of {model['budget_bytes']}"
    if "fid" in model:
        text += f"; FID {model['fid']:.2f}"
    if "codebook" in model:
        use = model["codebook"]
        text += (
            f"; codes used by {use['tokens']} tokens a codebook: least {use['usage_min']:.1%}, mean "
            f"{use['usage_mean']:.1%}, perplexity {use['perplexity_mean']:.0f} of {use['codes']}"
        )
    return text


def _probes(record: dict) -> Iterator[str]:
    for column, result in record.get("probes", {}).items():
        if "withheld" in result:
            yield f"probe {column}: withheld, {result['withheld']}"
            continue
        told = [f"most frequent class {result['majority']['accuracy']:.3f}", f"pixels {_both(result['pca'])}"]
        for name, scores in result["models"].items():
            told += [f"{name} {_both(scores)}", f"{name} with random weights {_both(scores['random_encoder'])}"]
        yield (
            f"probe {column}, {result['classes']} classes, {result['images']} images in {result['groups']} groups, "
            f"accuracy linear / nearest neighbours: {'; '.join(told)}"
        )


def _both(scores: dict) -> str:
    return f"{scores['linear']['accuracy']:.3f} / {scores['knn']['accuracy']:.3f}"


def _texts(record: dict) -> Iterator[str]:
    for name, result in record.get("texts", {}).items():
        for column, zero in result.get("zero_shot", {}).items():
            yield f"{name}, zero-shot {column}: accuracy {zero['accuracy']:.3f}, chance {zero['chance']:.3f}"
        if "retrieval" in result:
            found = result["retrieval"]
            ways = (
                f"{way.replace('_', ' ')} R@1/5/10 " + "/".join(f"{found[way][f'r{k}']:.3f}" for k in (1, 5, 10))
                for way in ("image_to_text", "text_to_image")
            )
            inside = found["within_modality"]
            within = (
                f"within modalities R@1 {shown('r1', inside['r1'])}, chance {shown('r1', inside['chance'])}, "
                f"histogram and PCA {shown('r1', inside.get('histogram_pca'))}"
            )
            yield f"{name}, {found['captions']} captions: {'; '.join(ways)}; {within}"
