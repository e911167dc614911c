"""Stored tokens and captions as training data: what they can train, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

import meditok
from meditok.cli import run as command
from meditok.errors import BadInputError, CodebookMismatchError, UsageError
from meditok.train import data
from meditok.train.distributed import World
from meditok.train.items import find_items
from meditok.train.tasks.alignment import Alignment

from . import stages

OPTIONS = dict(target="text", contrastive=1.0, heads_only=True, adversarial=0.0, lr=3e-3)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(model's folder, token file of eight pictures with their captions, the pictures' manifest)"""
    folder = tmp_path_factory.mktemp("stored")
    pairs = stages.pictures(folder / "pictures")
    meditok.build("tiny", seed=3, **stages.MODEL).save_pretrained(folder / "model")
    arguments = f"--model {folder / 'model'} --size 64 --columns caption,split --workers 0 --quiet".split()
    rows = pairs.read_text().splitlines()
    splits = ["split", *["train"] * 7, "val"]
    pairs.write_text("\n".join(f"{row},{split}" for row, split in zip(rows, splits, strict=True)))
    assert command(["tokenize", str(pairs), "-o", str(folder / "tokens.parquet"), *arguments]) == 0
    return folder / "model", folder / "tokens.parquet", pairs


def test_heads_learn_from_tokens_and_captions_alone_and_leave_the_rest_as_it_is(stored, tmp_path):
    model, tokens, _ = stored
    options = OPTIONS | dict(data=str(tokens), init=str(model), steps=30, warmup=3)
    rows = stages.run(tmp_path / "out", **options)
    assert rows[-1]["contrastive"] < 0.8 * rows[0]["contrastive"] and "usage" not in rows[0]
    first, last = (meditok.load(path, device="cpu") for path in (model, tmp_path / "out" / "model.safetensors"))
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(first.reconstruct(x), last.reconstruct(x)) and first.codebook_hash == last.codebook_hash
    assert not torch.equal(first.embed(x), last.embed(x)) and last.embed_text(["noise"]).shape == (1, 16)
    assert (tmp_path / "out" / "sheet-00000030.png").exists()
    assert json.loads((tmp_path / "out" / "data.json").read_text())["unlisted"] == 7
    assert stages.run(tmp_path / "out", **options) == [{"resumed": 30}]  # the rows are known again


def test_a_row_of_tokens_has_the_features_of_its_image(stored):
    model, tokens, pairs = stored
    config = stages.settings(data=str(tokens), init=str(model), **OPTIONS)
    items = find_items(config)
    task = Alignment(config, World(0, 1, torch.device("cpu")))
    core = task.modules["generator"].core.eval()
    batch = data.held_out(items, config, 7)
    images = data.held_out(find_items(stages.settings(data=str(pairs), size=64)), stages.settings(size=64), 7)
    place = {caption: [i for i, c in enumerate(images.captions) if c == caption] for caption in images.captions}
    assert batch.captions.count("noise number 0") == 2 and len(batch.captions) == 7
    features = core.aligned(task._pooled(batch))
    expected = core.embed(images.images)
    for caption, found in zip(batch.captions, features, strict=True):
        assert min((found - expected[i]).abs().max() for i in place[caption]) < 1e-6, caption


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "image"}, "hold no pixels to reconstruct, .* use tiny-stage2, or pass"),
        ({"heads_only": False}, "hold no pixels to reconstruct, .* use tiny-stage2, or pass"),
        ({"caption": "report"}, "7 inputs cannot be trained on: .*row 0: no report for it"),
        ({"split": "test"}, "nothing to train on .8 not of split test"),
    ],
)
def test_what_tokens_cannot_train_is_one_line(stored, options, message):
    with pytest.raises((UsageError, BadInputError), match=message) as error:
        find_items(stages.settings(data=str(stored[1]), **OPTIONS | options))
    assert "\n" not in str(error.value)


def test_tokens_of_another_codebook_or_beside_images_are_refused(stored, tmp_path):
    model, tokens, pairs = stored
    meditok.build("tiny", seed=4, **stages.MODEL).save_pretrained(tmp_path / "other")
    with pytest.raises(CodebookMismatchError):
        stages.run(tmp_path / "out", **OPTIONS, data=str(tokens), init=str(tmp_path / "other"))
    with pytest.raises(UsageError, match="trained on alone"):
        find_items(stages.settings(data=f"{pairs},{tokens}", **OPTIONS))
