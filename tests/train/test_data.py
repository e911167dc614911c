"""Training data: found as every command finds it, checked first, and a function of the seed and the sample number."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import multiprocessing
import re
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import meditok
from meditok.data.augment import Augmentation
from meditok.errors import BadInputError, UsageError
from meditok.train import data
from meditok.train.config import TrainConfig
from meditok.train.distributed import World
from meditok.train.items import check_items, data_record, drawn_window, find_items, read

from . import launch, stages


def config(path, **changes) -> TrainConfig:
    values = {"data": str(path), "size": 32, "steps": 4, "batch": 4, "workers": 0, "precision": "fp32"}
    return TrainConfig(**values | changes)


@pytest.fixture
def manifest(tmp_path):
    """Eight 16-bit CT of 65 HU and four photographs, the last of another split."""
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["identifier", "caption", "modality", "split", "ct_bias"])
        for index in range(12):
            ct = index < 8
            pixels = np.full((40, 48), 1024 + 65, np.uint16) if ct else np.full((40, 48, 3), 20 * index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{index}.png")
            split = "val" if index == 11 else "train"
            writer.writerow([f"{index}.png", f"picture {index}", "ct" if ct else "us", split, 1024 if ct else ""])
    return tmp_path / "pairs.csv"


def test_a_manifest_gives_captions_and_modalities_of_its_split(manifest):
    items = find_items(config(manifest))
    assert sorted(item.caption for item in items) == sorted(f"picture {index}" for index in range(11))
    assert [item.caption for item in find_items(config(manifest, split="val"))] == ["picture 11"]
    texts = {item.caption for item in find_items(config(manifest, caption="modality"))}
    assert texts == {"A ct image", "A us image"}


def test_every_row_that_cannot_be_read_is_listed_before_the_first_step(manifest):
    (manifest.parent / "3.png").write_bytes(b"not a picture")
    (manifest.parent / "5.png").unlink()
    with pytest.raises(BadInputError) as failure:
        find_items(config(manifest))
    assert "2 inputs cannot be trained on" in str(failure.value)
    assert "3.png" in str(failure.value) and "5.png" in str(failure.value) or "row 7" in str(failure.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_trained_on_is_recorded_file_by_file_with_what_the_start_was_trained_on(manifest, tmp_path, workers):
    meditok.build("tiny", seed=0, **stages.MODEL).save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "data.json").write_text(json.dumps({"files": ["0123456789abcdef"]}))
    made = config(manifest, workers=workers, init=str(tmp_path / "start"))
    record = data_record(find_items(made), made, World(0, 1, torch.device("cpu")))
    files = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in tmp_path.glob("*.png")]
    assert record["images"] == 11 and set(record["files"]) <= {"0123456789abcdef", *files}
    assert len(record["files"]) == 5  # the start's, one of eight equal CT, three photographs


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_read_to_its_end_before_the_first_step(manifest, workers):
    for name in ("3.png", "9.png"):
        path = manifest.parent / name
        path.write_bytes(path.read_bytes()[:-30])
    made = config(manifest, workers=workers)
    items = find_items(made)  # their headers are whole
    with pytest.raises(BadInputError, match="2 inputs cannot be trained on: .*3.png.*9.png"):
        check_items(items, made, World(0, 1, torch.device("cpu")))


def test_stage_two_needs_a_caption_for_every_image(manifest):
    text = manifest.read_text().replace("picture 4", "")
    manifest.write_text(text)
    assert len(find_items(config(manifest))) == 11  # stage 1 does not
    with pytest.raises(BadInputError, match="4.png: no caption for it"):
        find_items(config(manifest, target="text"))


def test_nothing_to_train_on_says_why(manifest):
    with pytest.raises(BadInputError, match="12 not of split test"):
        find_items(config(manifest, split="test"))
    with pytest.raises(UsageError, match="no data"):
        find_items(config(""))


def test_a_sample_depends_on_the_seed_and_its_number_alone(manifest):
    items = find_items(config(manifest))
    one, same, other = (data.Samples(items, config(manifest, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one[5][0], same[5][0]) and one[5][1:] == same[5][1:]
    assert [one.pick(i) for i in range(22)] != [other.pick(i) for i in range(22)]


def test_every_image_comes_once_a_pass(manifest):
    samples = data.Samples(items := find_items(config(manifest)), config(manifest))
    for start in (0, 11, 22):
        assert sorted(samples.pick(start + i) for i in range(11)) == list(range(len(items)))


def test_balance_draws_modalities_alike(manifest):
    samples = data.Samples(items := find_items(config(manifest)), config(manifest, balance=1.0))
    drawn = [items[samples.pick(i)].modality for i in range(2000)]
    assert 0.45 < drawn.count("ct") / 2000 < 0.55  # 8 of the 11 images are CT


def test_ct_windows_vary_and_keep_their_meaning(manifest):
    items = [item for item in find_items(config(manifest)) if item.modality == "ct"]
    seen = {
        round(float(read(items[0], drawn_window(items[0], np.random.default_rng(seed))).mean()), 4)
        for seed in range(80)
    }
    assert seen == {0.065, 0.8313, 0.075, -0.29, -0.3722}  # 65 HU in default, lung, soft-tissue, full and bone


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_ranks_and_workers_share_a_run_without_loss(manifest, world, workers):
    made = config(manifest, accumulate=2, workers=workers)
    items = find_items(made)
    parts = [list(data.batches(items, made, start=1, rank=rank, world=world)) for rank in range(world)]
    numbers = [number for micro in zip(*parts, strict=True) for batch in micro for number in batch.samples]
    assert numbers == list(range(4, 16))  # steps 1 to 3, in order, whoever reads them
    assert parts[0][0].images.shape == (2 // world, 3, 32, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_in_the_middle_is_one_line_whoever_reads(manifest, workers):
    (manifest.parent / "3.png").write_bytes((manifest.parent / "3.png").read_bytes()[:-30])
    made = config(manifest, workers=workers, check="open")
    with pytest.raises(BadInputError, match="3.png: PNG cannot be decoded in full.*get the file again$") as error:
        list(data.batches(find_items(made), made, start=0, rank=0, world=1))
    assert "\n" not in str(error.value) and multiprocessing.active_children() == []


def test_a_picture_that_one_process_cannot_read_ends_all_with_the_same_words(tmp_path):
    """Also where processes of their own read for them, which would otherwise be waited for."""
    pairs = stages.pictures(tmp_path / "pictures", 10)
    bad = pairs.parent / "1.png"  # not on the sheet, which shows 8
    bad.write_bytes(bad.read_bytes()[:700])
    options = dict(data=str(pairs), check="open", workers=1, perceptual=0.0, adversarial=0.0, contrastive=0.0, steps=9)
    result = launch.under_torchrun("stages", 2, tmp_path / "out", 100, **options)
    assert result.returncode == 1
    assert len(re.findall("CorruptImageError: .*1.png: PNG cannot be decoded in full", result.stderr)) >= 2


def test_a_process_whose_fellow_is_gone_says_so(tmp_path):
    """The first process cannot make its folder; the other one is waiting for it."""
    (tmp_path / "out").write_text("a file")
    options = dict(data=str(stages.pictures(tmp_path / "pictures")), perceptual=0.0, adversarial=0.0, contrastive=0.0)
    statuses, said = launch.start("stages", [launch.Job(tmp_path / "out", options, 2)])
    assert statuses == [[1, 1]] and "rank 0: FileExistsError" in said
    assert "rank 1: LostProcessError: rank 1: another process has ended, or not answered for 30 s; " in said


def test_a_batch_that_does_not_divide_is_refused(manifest):
    with pytest.raises(UsageError, match="does not divide by 3 processes"):
        next(data.batches(find_items(config(manifest)), config(manifest), start=0, rank=0, world=3))


def test_tars_bring_their_captions(tmp_path):
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for key in ("a", "b"):
            content = io.BytesIO()
            Image.fromarray(np.zeros((32, 32), np.uint8)).save(content, "PNG")
            note = json.dumps({"modality": "us", "split": "train"} | ({"caption": "text a"} if key == "a" else {}))
            text = "not this" if key == "a" else "text b\n"
            sidecars = ((f"{key}.json", note.encode()), (f"{key}.txt", text.encode()))
            for name, body in ((f"{key}.png", content.getvalue()), *sidecars):
                member = tarfile.TarInfo(name)
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    items = find_items(config(tmp_path / "pairs.tar", target="text"))
    assert [item.caption for item in items] == ["text a", "text b"]


def test_views_are_what_the_recipe_says():
    """Whole area, no turns, no grey: the picture itself, flipped half of the time along each axis."""
    picture = torch.rand(3, 32, 32) * 2 - 1
    still = Augmentation(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), turn=0.0, grayscale=0.0)
    views = [still(picture, torch.Generator().manual_seed(seed)) for seed in range(200)]
    wanted = [picture, picture.flip(1), picture.flip(2), picture.flip(1).flip(2)]
    counts = [sum(torch.equal(view, one) for view in views) for one in wanted]
    assert sum(counts) == 200 and min(counts) > 25


def test_both_quarter_turns_occur():
    picture = torch.rand(3, 32, 32)
    turning = Augmentation(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, turn=1.0, grayscale=0.0)
    views = [turning(picture, torch.Generator().manual_seed(seed)) for seed in range(40)]
    left, right = (sum(torch.equal(view, torch.rot90(picture, k, (1, 2))) for view in views) for k in (1, -1))
    assert left + right == 40 and min(left, right) > 8


def test_crops_keep_area_and_aspect_in_range():
    augmentation = Augmentation(32)
    for seed in range(300):
        _, _, height, width = augmentation.crop(200, 200, torch.Generator().manual_seed(seed))
        assert 0.88 <= height * width / 200**2 <= 1.0
        assert 0.73 <= width / height <= 1.37


def test_grey_views_have_equal_channels():
    picture = torch.rand(3, 32, 32)
    grey = replace(Augmentation(32), grayscale=1.0)(picture, torch.Generator().manual_seed(0))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
