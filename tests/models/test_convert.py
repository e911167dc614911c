"""`convert` reads the published layouts safely and writes safetensors; `load` reads only those."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
from collections import OrderedDict

import pytest
import torch

import meditok
from meditok.errors import BadInputError, MissingPartError, UnsafeFileError, UsageError
from meditok.models import convert as convert_module
from meditok.models.files import read_model, write_model


@pytest.fixture(scope="module")
def model():
    """Sizes of its own, so that every one of them must be inferred from the weights."""
    return meditok.build(
        "vitamin-small",
        seed=3,
        stem_width=24,
        stage_widths=(24, 48),
        decoder_widths=(64, 24),
        width=128,
        encoder_depth=2,
        decoder_depth=3,
        stage_depths=(2, 1),
        decoder_depths=(1, 2),
        codebook_size=96,
        embed_dim=24,
        expansion=4,
    )


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def bare(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def training(model):
    text = {
        "text_encoder.w": torch.zeros(3),
        "text_fc_norm.weight": torch.zeros(3),
        "text_projection.weight": torch.zeros(3),
    }
    trainer = {
        "config": {"l1": 0.2},
        "model": {f"core.{key}": value for key, value in bare(model).items()} | text,
        "disc": {"x_scale": torch.ones(3)},
        "model_optim": {"optimizer": {}},
        "disc_optim": {"optimizer": {}},
    }
    return {
        "args": OrderedDict(img_size=128, dtype=torch.bfloat16),
        "epoch": 2,
        "iter": 0,
        "trainer": trainer,
    }


def unitok(model):
    return {
        "args": {"img_size": 256, "model": "vitamin_large"},
        "epoch": 1,
        "iter": 5,
        "trainer": {
            "config": {},
            "unitok": bare(model) | {"text_encoder.token_embedding.weight": torch.zeros(5, 3)},
        },
    }


def wrapped(model):
    return {f"module._orig_mod.{key}": value for key, value in bare(model).items()}


@pytest.mark.parametrize(
    "layout, attention, size",
    [(bare, "causal", 256), (training, "causal", 128), (unitok, "full", 256), (wrapped, "causal", 256)],
)
def test_every_published_layout_becomes_the_same_model(tmp_path, model, images, layout, attention, size):
    torch.save(layout(model), tmp_path / "published.pth")
    out = meditok.convert(tmp_path / "published.pth", tmp_path / "model.safetensors")
    loaded = meditok.load(out, device="cpu")
    assert (loaded.config.attention, loaded.config.image_size, loaded.config.name) == (
        attention,
        size,
        "published",
    )
    if attention == "causal":
        assert loaded.hash == model.hash
        assert torch.equal(loaded.tokenize(images), model.tokenize(images))
    else:
        assert loaded.codebook_hash == model.codebook_hash and loaded.hash != model.hash


def test_attention_can_be_stated_where_the_file_cannot_tell(tmp_path, model):
    torch.save(bare(model), tmp_path / "published.pth")
    out = meditok.convert(tmp_path / "published.pth", tmp_path / "model.safetensors", attention="full")
    assert meditok.load(out).config.attention == "full"


class Touch:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_checkpoint_that_runs_code_is_refused_and_nothing_runs(tmp_path, kind):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    content = {"trainer": Touch(marker)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UnsafeFileError) as caught:
        meditok.convert(path, tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value) and "evil.pth" in str(caught.value)
    with pytest.raises(UnsafeFileError, match="meditok convert"):
        meditok.load(path)
    assert not marker.exists() and not (tmp_path / "out.safetensors").exists()


def test_foreign_objects_and_broken_files_are_refused_in_one_line(tmp_path, model):
    torch.save({"args": argparse.Namespace(x=1), **bare(model)}, tmp_path / "namespace.pth")
    torch.save(bare(model), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) * 6 // 10])
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("namespace", "cut"):
        with pytest.raises(UnsafeFileError) as caught:
            meditok.convert(tmp_path / f"{name}.pth", tmp_path / "out.safetensors")
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"some.weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "picture.pth").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    for name in ("list", "other", "absent", "empty", "picture"):
        with pytest.raises(BadInputError):
            meditok.convert(tmp_path / f"{name}.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_one_wrong_shape_gives_one_readable_line(tmp_path, model):
    state = bare(model)
    state["encoder.blocks.1.attn.proj.weight"] = torch.zeros(7, 128)
    del state["decoder.norm.bias"]
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(BadInputError) as caught:
        meditok.convert(tmp_path / "odd.pth", tmp_path / "out.safetensors")
    message = str(caught.value)
    assert "\n" not in message and "missing decoder.norm.bias" in message
    assert "encoder.blocks.1.attn.proj.weight is (7, 128) instead of (128, 128)" in message


def test_an_existing_output_is_not_overwritten(tmp_path, model):
    torch.save(bare(model), tmp_path / "published.pth")
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(UsageError):
        meditok.convert(tmp_path / "published.pth", tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_an_old_torch_is_refused(tmp_path, model, monkeypatch):
    torch.save(bare(model), tmp_path / "published.pth")
    monkeypatch.setattr(convert_module.torch, "__version__", "2.9.1+cpu")
    with pytest.raises(MissingPartError, match="2.10"):
        meditok.convert(tmp_path / "published.pth", tmp_path / "model.safetensors")


def test_safetensors_that_lie_or_break_are_refused_before_allocation(tmp_path, model):
    path = write_model(model, tmp_path / "model.safetensors")
    whole = path.read_bytes()
    cases = {
        "claims.safetensors": (struct.pack("<Q", 1 << 40) + whole[8:], UnsafeFileError),
        "stub.safetensors": (b"abc", UnsafeFileError),
        "cut.safetensors": (whole[:-1000], BadInputError),
        "plain.safetensors": (_without_description(whole), BadInputError),
    }
    for name, (content, error) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error) as caught:
            meditok.load(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(MissingPartError, match="no-such-model"):
        meditok.load("no-such-model")


def _without_description(whole: bytes) -> bytes:
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + size :]


def test_half_precision_files_load_as_float32(tmp_path, model, images):
    small = write_model(model, tmp_path / "small.safetensors", torch.float16)
    large = write_model(model, tmp_path / "large.safetensors")
    assert small.stat().st_size < 0.6 * large.stat().st_size
    assert {p.dtype for p in read_model(small).parameters()} == {torch.float32}


def test_a_saved_directory_loads_as_the_same_model(tmp_path, model, images):
    model.save_pretrained(tmp_path / "mine")
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
    }
    loaded = meditok.Tokenizer.from_pretrained(tmp_path / "mine")
    assert loaded.hash == model.hash and loaded.codebook_hash == model.codebook_hash and not loaded.training
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))
