"""The record of an evaluation as text: one table of all codecs, a line a modality."""

from __future__ import annotations

DIGITS = {"psnr": 2, "mae_hu": 1}  # decimals; three otherwise
TITLES = {"psnr": "PSNR dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "mae_hu": "MAE HU"}
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
    notes = [_codebook(model) for model in record["models"] if "codebook" in model]
    if any(not entry["counted"] for model in record["models"] for entry in model["modalities"].values()):
        notes.append("* left out of the mean of modalities: fewer than 10 images or 5 groups")
    return "\n".join(line.rstrip() for line in [*aligned, *notes])


def _codebook(model: dict) -> str:
    use = model["codebook"]
    return (
        f"{model['name']}: {model['bytes_mean']:.0f} bytes a picture; codes used by {use['tokens']} tokens a codebook: "
        f"least {use['usage_min']:.1%}, mean {use['usage_mean']:.1%}, perplexity {use['perplexity_mean']:.0f} of "
        f"{use['codes']}"
    )
