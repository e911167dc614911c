"""How well a tokenizer reconstructs held-out pictures, per modality, and how much of its codebooks it uses.

    python -m meditok.evaluate.reconstruction --data DIR [--model tiny]

DIR holds manifest.csv and the tars it names; the split `val` is used, whose patients, volumes and blocks of files are
in no training split. PSNR and SSIM are taken on [-1, 1] images at 256 px, CT in the default window.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch

from ..models.files import load
from ..models.tokenizer import Tokenizer
from ..train.pictures import Picture, manifest_rows, read_pictures
from .metrics import psnr, ssim

DATA_RANGE = 2.0  # images lie in [-1, 1]
MIN_IMAGES = 10  # modalities with fewer are shown, and left out of the means


@torch.no_grad()
def evaluate(model: Tokenizer, pictures: list[Picture]) -> dict:
    """{"modalities": {name: {n, psnr, ssim}}, "psnr", "ssim": means over modalities of at least MIN_IMAGES
    pictures, "codebook": usage of each}. PSNR in dB. Usage: the share of a codebook's codes that these pictures need.
    """
    scores, used = defaultdict(list), torch.zeros(model.codebook.shape[:2], dtype=torch.bool)
    for picture in pictures:
        image = picture.values()
        tokens = model.tokenize(image[None], stable=True)
        grid = image.shape[1] // 16, image.shape[2] // 16
        other = model.detokenize(tokens, grid, stable=True)[0].cpu()
        used.scatter_(1, tokens[0].cpu(), True)
        scores[picture.modality].append((psnr(image, other, DATA_RANGE), ssim(image, other, DATA_RANGE)))
    modalities = {
        name: {"n": len(pairs), "psnr": fmean(p for p, _ in pairs), "ssim": fmean(s for _, s in pairs)}
        for name, pairs in sorted(scores.items())
    }
    return {
        "modalities": modalities,
        "psnr": fmean(m["psnr"] for m in modalities.values() if m["n"] >= MIN_IMAGES),
        "ssim": fmean(m["ssim"] for m in modalities.values() if m["n"] >= MIN_IMAGES),
        "codebook": {"usage": used.float().mean(1).tolist()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    rows = manifest_rows(options.data / "manifest.csv", "val", publishable=False)
    model = load(options.model)
    result = evaluate(model, read_pictures(options.data, rows)) | {"model_hash": model.hash}
    print(f"{'modality':<12} {'n':>4} {'PSNR dB':>8} {'SSIM':>6}")
    for name, m in result["modalities"].items():
        print(f"{name:<12} {m['n']:>4} {m['psnr']:>8.2f} {m['ssim']:>6.3f}")
    print(f"{'mean':<12} {'':>4} {result['psnr']:>8.2f} {result['ssim']:>6.3f}")
    usage = result["codebook"]["usage"]
    print(f"codes used by these {len(rows)} images: least {min(usage):.1%}, mean {fmean(usage):.1%}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
