"""The numbers in the card of `tiny` and in README: python bench/tiny_card.py --data DIR [--html FILE]

Runs `meditok evaluate` on the held-out pictures of the tars in DIR/train with baselines, probes and the text-aligned
space, writes meditok/weights/tiny/metrics.json, and sets the marked blocks of the card and of README from it. The
pictures come from `meditok demo`, and curves.svg beside the weights from their log.csv. CI re-derives a part
(tests/models/test_bundled.py).
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
from pathlib import Path

from meditok.cli import run as command

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "meditok" / "weights" / "tiny"
ASKED = (
    *("--baseline", "jpeg", "--baseline", "jpeg2000", "--baseline", "pca"),
    *("--probe", "modality", "--probe", "body_part", "--zero-shot", "modality", "--retrieval"),
)
NAMES = {"ct": "CT", "mr": "MRI", "us": "ultrasound", "xr": "X-ray", "histology": "histology",
         "microscopy": "microscopy", "endoscopy": "endoscopy"}  # fmt: skip
MARKS = "<!-- numbers: python bench/tiny_card.py -->", "<!-- end -->"
CANDIDATES = "<!-- candidates: python bench/tiny_card.py -->"
SHOWN = ("log_l2", "ssim", "contrastive")
WIDTH, HEIGHT, POINTS = 300, 130, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with the manifest; without it metrics.json stays as it is")
    parser.add_argument("--html", help="the report page, too")
    options = parser.parse_args()
    if options.data:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.json")
            page = ["--html", options.html] if options.html else []
            if code := command(["evaluate", str(Path(options.data, "train")), *ASKED, *page, "--json", str(report)]):
                raise SystemExit(code)
            found = json.loads(report.read_text())
        (WEIGHTS / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads((WEIGHTS / "metrics.json").read_text())
    put(WEIGHTS / "README.md", for_card(found))
    put(WEIGHTS / "README.md", candidates(), CANDIDATES)
    put(ROOT / "README.md", for_readme(found))
    (WEIGHTS / "curves.svg").write_text(curves(WEIGHTS / "log.csv"))
    with tempfile.TemporaryDirectory() as folder:
        if code := command(["demo", "-o", folder]):
            raise SystemExit(code)
        shutil.copy(Path(folder, "side-by-side.png"), ROOT / "bench" / "results" / "demo.png")


def for_card(found: dict) -> list[str]:
    return [*modalities(found), "", *compared(found), "", *meaning(found)]


def for_readme(found: dict) -> list[str]:
    return [*across(found), "", *compared(found)]


def put(path: Path, lines: list[str], mark: str = MARKS[0]) -> None:
    """Replace what stands between the marks."""
    before, _, rest = path.read_text().partition(mark)
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise SystemExit(f"{path}: lacks {mark} ... {MARKS[1]}")
    path.write_text("\n".join([before + mark, *lines, MARKS[1] + after]))


def candidates(path: Path = ROOT / "bench" / "results" / "tiny_candidates.csv") -> list[str]:
    """What bench_tiny_candidates.py measured."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    keys = ("what", "parameters_m", "psnr", "ssim", "stlpips", "usage_min", "tokenized_per_s", "train_s")
    heads = [
        "",
        "M parameters",
        "PSNR dB",
        "SSIM",
        "ST-LPIPS",
        "least used codebook",
        "images/s tokenised",
        "s to train",
    ]
    return table(heads, [[row[key] for key in keys] for row in rows])


def table(heads: list[str], rows: list[list]) -> list[str]:
    return ["| " + " | ".join(map(str, row)) + " |" for row in (heads, ["---"] * len(heads), *rows)]


def scores(of: dict) -> list[str]:
    return [f"{of['psnr']:.2f}", f"{of['ssim']:.3f}", f"{of['ms_ssim']:.3f}", f"{of['st_lpips']:.3f}"]


def starred(name: str, of: dict) -> str:
    return NAMES.get(name, name) + (" *" if not of["counted"] else "")


def modalities(found: dict) -> list[str]:
    model = found["models"][0]
    rows = [[starred(name, of), of["n"], of["groups"], *scores(of)] for name, of in model["modalities"].items()]
    for name, of in (("mean of modalities", model["overall"]), ("mean of images", model["overall_micro"])):
        low, high = of["interval"]["psnr"]
        rows.append([f"{name} (95 % interval of PSNR {low:.1f} to {high:.1f})", of["n"], "", *scores(of)])
    usage, hu = model["codebook"], model["modalities"]["ct"]["mae_hu"]
    return [
        *table(["modality", "images", "groups", "PSNR dB", "SSIM", "MS-SSIM", "ST-LPIPS"], rows),
        "",
        "\\* fewer than 10 images or 5 groups: not in the mean of modalities.",
        f"CT: mean absolute error {hu:.1f} HU. The {model['overall_micro']['n']} images use "
        f"{100 * usage['usage_min']:.1f} % of the least used codebook, {100 * usage['usage_mean']:.1f} % on average.",
    ]


def across(found: dict) -> list[str]:
    kept = {name: of for name, of in found["models"][0]["modalities"].items() if of["n"] >= 10}
    overall = found["models"][0]["overall"]
    rows = [["images / groups", *(f"{of['n']} / {of['groups']}" for of in kept.values()), ""]]
    for key, label, digits in (("psnr", "PSNR, dB", 2), ("ssim", "SSIM", 3)):
        rows.append([label, *(f"{of[key]:.{digits}f}" for of in (*kept.values(), overall))])
    usage = found["models"][0]["codebook"]["usage_min"]
    return [
        *table(["", *(starred(name, of) for name, of in kept.items()), "mean"], rows),
        "",
        "\\* fewer than five groups (patients or files that belong together): not in the mean.",
        f"These images use at least {100 * usage:.1f} % of every codebook.",
    ]


def compared(found: dict) -> list[str]:
    """The model and the baselines, means of modalities."""
    rows = [[m["name"], round(m["bytes_mean"]), *scores(m["overall"])] for m in found["models"]]
    return table(["", "bytes an image", "PSNR dB", "SSIM", "MS-SSIM", "ST-LPIPS"], rows)


def meaning(found: dict) -> list[str]:
    """What features and the text-aligned space tell."""
    model, lines = found["models"][0], []
    rows = []
    for column, probe in found["probes"].items():
        if "withheld" in probe:
            lines += [f"Probe of {column}: withheld, {probe['withheld']}.", ""]
            continue
        mine = probe["models"][model["name"]]
        ways = [mine, mine["random_encoder"], probe["pca"]]
        cells = [f"{way[kind]['balanced_accuracy']:.2f}" for kind in ("linear", "knn") for way in ways]
        rows.append(
            [column, probe["classes"], probe["images"], *cells, f"{probe['majority']['balanced_accuracy']:.2f}"]
        )
    heads = [f"{kind}: {way}" for kind in ("linear", "kNN") for way in ("tiny", "random encoder", "PCA of pixels")]
    lines += ["Balanced accuracy of classifiers on `features`, folds by group:", ""]
    lines += [*table(["column", "classes", "images", *heads, "majority"], rows), ""]
    texts = found["texts"][model["name"]]
    zero, retrieval = texts["zero_shot"]["modality"], texts["retrieval"]
    there, inside = retrieval["image_to_text"], retrieval["within_modality"]
    lines += [
        f"Zero-shot modality of {zero['images']} images, {zero['classes']} classes: accuracy {zero['accuracy']:.2f}, "
        f"balanced {zero['balanced_accuracy']:.2f}, chance {zero['chance']:.2f}.",
        f"Captions of {retrieval['images']} images among {retrieval['captions']}: R@1 {there['r1']:.2f}, R@5 "
        f"{there['r5']:.2f}, R@10 {there['r10']:.2f} (chance {there['chance']['r1']:.2f}, {there['chance']['r5']:.2f}, "
        f"{there['chance']['r10']:.2f}); within the modality R@1 {inside['r1']:.2f}, chance {inside['chance']:.2f}, a "
        f"histogram and PCA of pixels fitted on these very images by folds {inside['histogram_pca']:.2f}.",
    ]
    return lines


def curves(log: Path) -> str:
    """Losses against the step, a panel each, running means of 20 rows."""
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    parts = []
    for place, name in enumerate(SHOWN):
        values = [float(row[name]) for row in rows]
        means = [sum(values[max(0, i - 19) : i + 1]) / len(values[max(0, i - 19) : i + 1]) for i in range(len(values))]
        chosen = (
            [round(i * (len(rows) - 1) / (POINTS - 1)) for i in range(POINTS)]
            if len(rows) > POINTS
            else range(len(rows))
        )
        low, high, last = min(means), max(means), int(rows[-1]["step"])
        points = " ".join(
            f"{WIDTH * int(rows[i]['step']) / last:.1f},{HEIGHT * (1 - (means[i] - low) / (high - low or 1)):.1f}"
            for i in chosen
        )
        parts.append(
            f'<g transform="translate({20 + place * (WIDTH + 20)},30)"><text y="-10">{name}: {means[0]:.3f} to '
            f'{means[-1]:.3f}, {last} steps</text><polyline points="{points}" fill="none" stroke="#1f6f8b"/></g>'
        )
    size = f'width="{20 + len(SHOWN) * (WIDTH + 20)}" height="{HEIGHT + 50}"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    return f"{head}{ground}{''.join(parts)}</svg>\n"


if __name__ == "__main__":
    main()
