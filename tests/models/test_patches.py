"""Models whose pixels enter and leave by one linear map a patch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import meditok
from meditok.errors import BadInputError
from meditok.models.config import TokenizerConfig
from meditok.models.patches import Patches, PatchesBack

SMALL = dict(
    width=128, encoder_depth=1, decoder_depth=1, expansion=1, grid_depth=1, overlap=2, ends="patches", num_codebooks=2,
    codebook_size=32, embed_dim=16,
)  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 32)])
def test_any_grid_of_patches_comes_back_at_its_size(height, width):
    model = meditok.build("tiny", seed=0, **SMALL)
    images = torch.rand(2, 3, height, width) * 2 - 1
    tokens = model.tokenize(images)
    assert tokens.shape == (2, 2, height * width // 256)
    assert model.detokenize(tokens, (height // 16, width // 16)).shape == images.shape


@pytest.mark.parametrize("overlap", [0, 3])
def test_the_way_back_is_the_transposed_convolution(overlap):
    layer = PatchesBack(TokenizerConfig(**SMALL | {"overlap": overlap, "grid_depth": 0}))
    x = torch.randn(2, 128, 3, 2)
    wanted = F.conv_transpose2d(x, layer.proj.weight, layer.proj.bias, stride=16, padding=overlap)
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


def test_a_patch_reaches_the_pixels_of_its_overlap_and_no_others():
    c = TokenizerConfig(**SMALL | {"grid_depth": 0})
    image = torch.zeros(1, 3, 48, 48, requires_grad=True)
    Patches(c)(image)[0, 0, 1, 1].backward()  # the patch at rows and columns 16..31
    seen = image.grad[0].abs().sum(0).nonzero()
    assert seen.min() == 14 and seen.max() == 33


def test_a_model_survives_its_file_and_ends_that_are_not_known_are_refused(tmp_path):
    model = meditok.build("tiny", seed=0, **SMALL)
    model.save_pretrained(tmp_path / "m")
    assert meditok.load(tmp_path / "m", device="cpu").hash == model.hash
    with pytest.raises(BadInputError, match="ends='both'"):
        TokenizerConfig(ends="both")
    with pytest.raises(BadInputError, match="overlap=9"):
        TokenizerConfig(ends="patches", overlap=9)
