"""Starting from principal components: an untrained model that is already a transform codec."""

from __future__ import annotations

import pytest
import torch

import meditok
from meditok.errors import UsageError
from meditok.evaluate.metrics import psnr
from meditok.train import run
from meditok.train.start import principal_components

from . import stages

SMALL = dict(
    width=128, encoder_depth=1, decoder_depth=1, expansion=1, grid_depth=1, overlap=2, ends="patches", num_codebooks=2,
    codebook_size=256, embed_dim=16,
)  # fmt: skip


def images(count: int, components: int) -> list[torch.Tensor]:
    """(3, 64, 64) whose patches are mixtures of a few patterns."""
    patterns = torch.randn(components, 3, 16, 16)
    mixed = torch.einsum("nijk,kcyx->nciyjx", torch.randn(count, 4, 4, components) * 0.04, patterns)
    return list(mixed.reshape(count, 3, 64, 64).clamp(-1, 1))


def test_patches_of_few_components_come_back_through_the_untrained_model():
    torch.manual_seed(0)
    seen = images(12, components=11)  # and colour: 14 coefficients in all; 192 patches, each with a code of its own
    model = meditok.build("tiny", seed=0, **SMALL)
    before = psnr(seen[0], model.reconstruct(seen[0][None])[0], 2.0)
    principal_components(model, seen)
    after = [psnr(x, y, 2.0) for x, y in zip(seen, model.reconstruct(torch.stack(seen)), strict=True)]
    assert min(after) > 40 > 25 > before


def test_it_is_the_same_for_the_same_seed_and_images():
    hashes = []
    for _ in range(2):
        torch.manual_seed(0)
        model = meditok.build("tiny", seed=0, **SMALL)
        principal_components(model, images(6, components=20))
        hashes.append(model.hash)
    assert hashes[0] == hashes[1]


def test_a_model_that_is_no_transform_codec_is_refused():
    with pytest.raises(UsageError, match="ends='stages'"):
        principal_components(meditok.build("vitamin-small"), images(1, components=3))


def test_a_run_starts_there_and_resumes_bit_for_bit(tmp_path):
    data = str(stages.pictures(tmp_path / "data"))
    options = dict(
        data=data, model=SMALL, start="pca", start_patches=500, log_l2=0.1, perceptual=0.0, contrastive=0.0,
        adversarial=0.0, codebook_update="ema", cache=True,
    )  # fmt: skip
    rows = stages.run(tmp_path / "a", **options)
    assert all(row["log_l2"] < 0 for row in rows)

    def stop(row: dict) -> None:
        if row.get("step") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.start(stages.settings(**options), tmp_path / "b", device="cpu", report=stop)
    stages.run(tmp_path / "b", **options)
    a, b = (meditok.load(tmp_path / name / "model.safetensors", device="cpu") for name in "ab")
    assert a.hash == b.hash
