"""The discriminator: DINOv2 features from a generated file, the offline backbone, and the trained heads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from meditok.errors import BadInputError, MissingPartError, UnsafeFileError, UsageError
from meditok.models.discriminator import build_discriminator

from . import layouts


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "dinov2.pth"
    torch.save(layouts.vit() | {"mask_token": torch.zeros(1, 64)}, path)  # the release's file is a plain .pth
    return path


@pytest.fixture(scope="module")
def lite():
    return build_discriminator("efficientnet-lite0")


def _norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def _dino_by_hand(images, state, size):
    """The transformer in float64 functions, without position resizing: tokens after blocks 0, 2, 5, 8, 11."""
    state = {key: value.double() for key, value in state.items()}
    x = F.conv2d(images.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    grid = state["pos_embed"][:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    if size != 3:  # the +0.1 scales the coordinates, as well as being there against rounding down
        grid = F.interpolate(grid, scale_factor=(size + 0.1) / 3, mode="bicubic")
    x = x + torch.cat([state["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    found = []
    for i in range(12):
        name = f"blocks.{i}"
        y = _norm(x, state, f"{name}.norm1") @ state[f"{name}.attn.qkv.weight"].T + state[f"{name}.attn.qkv.bias"]
        q, k, v = y.chunk(3, dim=-1)  # one head of 64
        y = (q @ k.transpose(1, 2) / 8).softmax(-1) @ v
        y = y @ state[f"{name}.attn.proj.weight"].T + state[f"{name}.attn.proj.bias"]
        x = x + y * state[f"{name}.ls1.gamma"]
        y = _norm(x, state, f"{name}.norm2") @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        y = y @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"]
        x = x + y * state[f"{name}.ls2.gamma"]
        if i in (0, 2, 5, 8, 11):
            found.append((x[:, 1:] + x[:, :1]).transpose(1, 2))
    return found


@pytest.mark.parametrize("size", [3, 5])
def test_dino_taps_match_the_network_written_out(dino_file, size):
    """Patch tokens plus class token after five blocks, no final norm, positions at the trained and at another grid."""
    images = torch.randn(2, 3, 14 * size, 14 * size)
    taps = build_discriminator("dinov2-s", dino_file).backbone(images)
    for found, expected in zip(taps, _dino_by_hand(images, layouts.vit(), size), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_images_are_trimmed_to_whole_patches_as_published(dino_file):
    """32 becomes 28 (as 256, 252) by a random crop or an area average, evenly; one long side means a bicubic resize."""
    dino = build_discriminator("dinov2-s", dino_file).backbone
    images, g = torch.rand(1, 3, 32, 32), torch.Generator().manual_seed(0)
    area, crops = F.interpolate(images, (28, 28), mode="area"), 0
    places = set()
    for _ in range(60):
        trimmed = dino.trim(images, g)
        if torch.equal(trimmed, area):
            continue
        crops += 1
        (place,) = [
            (y, x) for y in range(5) for x in range(5) if torch.equal(trimmed, images[:, :, y : y + 28, x : x + 28])
        ]
        places.add(place)
    assert 18 <= crops <= 42 and len(places) > 10
    wide = torch.rand(1, 3, 28, 32)
    assert torch.equal(dino.trim(wide, g), F.interpolate(wide, (28, 28), mode="bicubic"))
    assert dino.trim(area, g) is area


def test_dino_logits_have_one_row_per_image_and_five_taps(dino_file):
    """256 px: 18 x 18 patches of five taps; the trim's generator makes a call repeatable."""
    discriminator = build_discriminator("dinov2-s", dino_file)
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    logits = [discriminator(images, torch.Generator().manual_seed(seed)) for seed in (3, 3)]
    assert logits[0].shape == (1, 5 * 324) and torch.equal(*logits)


def test_heads_match_the_published_layers(lite):
    """Circular convolutions, group norm, leaky ReLU, residual over sqrt(2), written out in float64."""
    head, x = lite.heads[3], torch.randn(2, 112, 30)  # 112 channels: 16 groups
    state = {key: value.double() for key, value in head.state_dict().items()}

    def block(y, name):
        kernel = state[f"{name}.0.weight"]
        pad = kernel.shape[-1] // 2
        y = F.conv1d(torch.cat([y[..., y.shape[-1] - pad :], y, y[..., :pad]], -1), kernel, state[f"{name}.0.bias"])
        grouped = y.unflatten(1, (16, -1))
        centred = grouped - grouped.mean((2, 3), keepdim=True)
        y = (centred / (centred.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()).flatten(1, 2)
        y = y * state[f"{name}.1.weight"][:, None] + state[f"{name}.1.bias"][:, None]
        return torch.where(y > 0, y, 0.2 * y)

    y = block(x.double(), "0")
    y = (block(y, "1.fn") + y) / math.sqrt(2)
    expected = F.conv1d(y, state["2.weight"], state["2.bias"])
    torch.testing.assert_close(head(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_heads_start_xavier_normal_of_half_gain(lite):
    """Standard deviation 0.5 * sqrt(2 / (fan in + fan out)), biases 0, norms 1 and 0."""
    for width, head in zip(lite.backbone.widths, lite.heads, strict=True):
        weight = head[1].fn[0].weight
        assert weight.std().item() == pytest.approx(0.5 * math.sqrt(2 / (18 * width)), rel=0.05)
        assert not head[1].fn[0].bias.any() and (head[1].fn[1].weight == 1).all()


def test_the_backbone_is_moved_but_never_trained_saved_or_switched(lite):
    """Only heads and normalisation are in the state dict, as published; dtype moves reach the backbone; a training step
    changes nothing of it."""
    assert {key.split(".")[0] for key in lite.state_dict()} == {"x_scale", "x_shift", "heads"}
    assert all(p.requires_grad for p in lite.parameters())
    before = {key: value.clone() for key, value in lite.backbone.state_dict().items()}
    lite.train()
    images = torch.rand(1, 3, 48, 48, requires_grad=True)
    lite(images).mean().backward()
    torch.optim.SGD(lite.parameters(), lr=0.1).step()
    lite.zero_grad()
    assert images.grad.any() and not any(m.training for m in lite.backbone.modules())
    assert all(p.grad is None and not p.requires_grad for p in lite.backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in lite.backbone.state_dict().items())
    lite.double()
    assert next(lite.backbone.parameters()).dtype == torch.float64
    lite.float()


def test_offline_discriminator_learns_to_tell_sharp_from_blurred(lite):
    """A few steps of its heads on the hinge loss put real images above blurred ones."""
    from skimage import data

    from meditok.objectives.adversarial import hinge_discriminator
    from meditok.objectives.diffaug import blur

    picture = torch.from_numpy(data.chelsea()).permute(2, 0, 1).float() / 127.5 - 1
    real = torch.stack([picture[:, y : y + 48, x : x + 48] for y in (60, 150) for x in (60, 250)])
    optimiser = torch.optim.AdamW(lite.parameters(), lr=2e-3, betas=(0.5, 0.9))
    fake = blur(real, 0.4)
    for _ in range(5):
        loss = hinge_discriminator(lite(real), lite(fake))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        assert (lite(real).mean(1) > lite(fake).mean(1)).all()


def test_files_that_do_not_fit_are_named_in_one_line(tmp_path):
    """Missing and misshapen tensors, too few blocks, a file of something else."""
    state = layouts.vit()
    state["blocks.3.mlp.fc2.weight"] = torch.zeros(7, 7)
    del state["norm.bias"]
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(BadInputError, match=r"missing norm.bias; blocks.3.mlp.fc2.weight is \(7, 7\)") as error:
        build_discriminator("dinov2-s", tmp_path / "wrong.safetensors")
    assert "\n" not in str(error.value)
    save_file(layouts.vit(depth=4), tmp_path / "shallow.safetensors")
    with pytest.raises(BadInputError, match="4 blocks"):
        build_discriminator("dinov2-s", tmp_path / "shallow.safetensors")
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInputError, match="not a DINOv2 transformer: no patch_embed"):
        build_discriminator("dinov2-s", tmp_path / "other.safetensors")


class _Code:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    """Exit code 5, and the marker file the pickle would write is absent."""
    torch.save(layouts.vit() | {"evil": _Code(str(tmp_path / "marker"))}, tmp_path / "dinov2.pth")
    with pytest.raises(UnsafeFileError) as error:
        build_discriminator("dinov2-s", tmp_path / "dinov2.pth")
    assert error.value.exit_code == 5 and not (tmp_path / "marker").exists()


def test_a_missing_file_says_where_to_get_it():
    """One line with the file's name and publisher, and what works without it."""
    for weights in ("", "nowhere.pth"):
        with pytest.raises(MissingPartError, match="dinov2_vits14_pretrain.pth .* or use efficientnet-lite0"):
            build_discriminator("dinov2-s", weights)
    with pytest.raises(UsageError, match="choose dinov2-s or efficientnet-lite0"):
        build_discriminator("resnet")
