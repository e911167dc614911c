"""LPIPS and shift-tolerant LPIPS: the formula, the networks, and where their weights come from."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meditok.errors import BadInputError, MissingPartError, UnsafeFileError, UsageError
from meditok.models.frozen import package_file, read_state
from meditok.objectives.perceptual import build_perceptual, feature_distance, vgg16

WIDTHS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def alexnet():
    return build_perceptual("stlpips-alexnet")


def _images(size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(2, 3, size, size + 8) * 2 - 1
    return (x + 0.2 * torch.randn_like(x)).clamp(-1, 1), x


def test_distance_of_features_matches_the_formula_in_loops():
    """Unit vectors per pixel, squared difference, weighted sum over channels, mean over space, sum over layers."""
    a, b = ([torch.randn(2, c, 3, 4, dtype=torch.float64) for c in (5, 7)] for _ in range(2))
    heads = [torch.rand(c, dtype=torch.float64) for c in (5, 7)]
    expected = np.zeros(2)
    for x, y, head in zip(a, b, heads, strict=True):
        for image in range(2):
            for place in np.ndindex(3, 4):
                u, v = x[(image, slice(None), *place)].numpy(), y[(image, slice(None), *place)].numpy()
                u = u / (np.sqrt((u**2).sum() + 1e-9) + 1e-10)
                v = v / (np.sqrt((v**2).sum() + 1e-9) + 1e-10)
                expected[image] += (head.numpy() * (u - v) ** 2).sum() / 12
    np.testing.assert_allclose(feature_distance(a, b, heads).numpy(), expected, rtol=1e-12)


def test_distance_of_features_has_a_finite_gradient_where_all_channels_are_zero():
    """ReLU features may be 0 in every channel of a pixel; elsewhere the gradient is that of finite differences."""
    a, b = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    head = [torch.rand(3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda x: feature_distance([x], [b], head), (a.requires_grad_(),))
    zero = torch.zeros(1, 3, 2, 2, requires_grad=True)
    feature_distance([zero], [b.float()], head).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("net", ["alexnet", "vgg16"])
def test_shift_tolerant_lpips_equals_its_package(net, monkeypatch):
    """The package's own network and distance, run beside ours, agree per image to float32 rounding.

    The package imports torchvision, IPython and torchsummary for parts that this variant never reaches; empty modules
    stand in for those three.
    """
    for name in ("torchvision", "torchvision.models", "IPython", "torchsummary"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["torchvision"], "models", sys.modules["torchvision.models"], raising=False)
    monkeypatch.setattr(sys.modules["IPython"], "embed", None, raising=False)
    monkeypatch.setattr(sys.modules["torchsummary"], "summary", None, raising=False)
    from stlpips_pytorch import stlpips

    theirs = stlpips.LPIPS(net=net.replace("net", "").replace("16", ""), variant="shift_tolerant", verbose=False)
    ours = build_perceptual(f"stlpips-{net}")
    a, b = _images()
    with torch.no_grad():
        torch.testing.assert_close(ours.each(a, b), theirs(a, b).flatten(), rtol=1e-5, atol=1e-8)
        assert ours(a, b).item() == pytest.approx(theirs(a, b).mean().item(), rel=1e-5)


def test_shift_tolerant_lpips_orders_distortions_of_a_photograph(alexnet):
    """Nothing < shifted by one pixel < blurred, and a gradient reaches the reconstruction alone."""
    from skimage import data

    from meditok.objectives.diffaug import blur

    picture = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float() / 127.5 - 1
    x, shifted = picture[:, :, 80:176, 100:196], picture[:, :, 81:177, 100:196]
    same, moved, soft = (alexnet(y, x).item() for y in (x, shifted, blur(x, 0.4)))
    assert same == 0 and 0 < moved < soft
    r = (x + 0.1).requires_grad_()
    alexnet(r, x).backward()
    assert r.grad.any() and all(p.grad is None for p in alexnet.parameters())


def test_distance_is_float32_under_autocast(alexnet):
    """bfloat16 autocast changes nothing: the value is bit-equal to the one without it."""
    a, b = _images()
    with torch.autocast("cpu", torch.bfloat16):
        found = alexnet(a, b)
    assert found.dtype == torch.float32 and torch.equal(found, alexnet(a, b))


def test_small_images_have_no_perceptual_term(alexnet):
    """Under 48 pixels of height the term is 0, as in MedITok's training."""
    a, b = _images(40)
    assert alexnet(a, b).item() == 0
    assert alexnet(*_images(48)).item() > 0


def test_frozen_networks_stay_in_evaluation_mode(alexnet):
    """train() changes nothing and no weight asks for a gradient."""
    alexnet.train()
    assert not any(m.training for m in alexnet.modules()) and not any(p.requires_grad for p in alexnet.parameters())


# ---- LPIPS over the user's VGG16 ---------------------------------------------------------------------------

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's numbers within features


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """A file in torchvision's layout with random weights, classifier included."""
    state, number, width = {"classifier.6.bias": torch.zeros(10)}, iter(CONVOLUTIONS), 3
    g = torch.Generator().manual_seed(0)
    for out, count in zip(WIDTHS, (2, 2, 3, 3, 3), strict=True):
        for i in map(next, [number] * count):
            state[f"features.{i}.weight"] = torch.randn(out, width, 3, 3, generator=g) * (2 / (9 * width)) ** 0.5
            state[f"features.{i}.bias"] = torch.randn(out, generator=g) * 0.1
            width = out
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def heads_package(tmp_path, monkeypatch):
    """A package of the name and layout of lpips, with random heads."""
    folder = tmp_path / "lpips" / "weights" / "v0.1"
    folder.mkdir(parents=True)
    (tmp_path / "lpips" / "__init__.py").write_text("raise ImportError('never to be imported')\n")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(WIDTHS)}
    torch.save(heads, folder / "vgg.pth")
    monkeypatch.syspath_prepend(tmp_path)
    return heads


def test_lpips_over_vgg16_equals_functions_written_out(vgg_file, heads_package):
    """Normalised input, 13 convolutions, features after relu1_2, 2_2, 3_3, 4_3 and 5_3, then the distance."""
    a, b = _images()
    state = torch.load(vgg_file)
    features = []
    for x in (a, b):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        found = []
        for i in CONVOLUTIONS:
            if i in (5, 10, 17, 24):
                found.append(x)
                x = F.max_pool2d(x, 2)
            x = F.relu(F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
        features.append([*found, x])
    expected = 0
    for i, (x, y) in enumerate(zip(*features, strict=True)):
        x, y = (z / ((z.square().sum(1, keepdim=True) + 1e-9).sqrt() + 1e-10) for z in (x, y))
        head = heads_package[f"lin{i}.model.1.weight"].view(1, -1, 1, 1)
        expected = expected + (head * (x - y).square()).sum(1).mean((1, 2))
    found = build_perceptual("lpips-vgg16", vgg_file)
    torch.testing.assert_close(found.each(a, b), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("lpips") is None, reason="lpips is not installed; it asks for torchvision")
def test_heads_of_the_lpips_package(vgg_file):
    """Five non-negative heads of VGG16's widths, and the distance of random features weighted with them by hand."""
    path = package_file("lpips", "weights/v0.1/vgg.pth", "test", "pip install --no-deps lpips")
    file = {key: value.flatten() for key, value in read_state(path).items()}
    model = build_perceptual("lpips-vgg16", vgg_file)
    assert [len(head) for head in model.heads] == list(WIDTHS) and all((head >= 0).all() for head in model.heads)
    a, b = ([torch.randn(1, c, 2, 2, dtype=torch.float64) for c in WIDTHS] for _ in range(2))
    expected = 0.0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        u, v = (z.numpy() / np.sqrt((z.numpy() ** 2).sum(1, keepdims=True)) for z in (x, y))
        expected += ((u - v) ** 2 * file[f"lin{i}.model.1.weight"].double().numpy()[None, :, None, None]).sum(1).mean()
    assert feature_distance(a, b, model.heads).item() == pytest.approx(expected, rel=1e-7)


def test_vgg16_files_that_do_not_fit_are_named_in_one_line(vgg_file, tmp_path):
    """A misshapen convolution and a missing one."""
    state = read_state(vgg_file)
    state["features.28.weight"] = torch.zeros(4, 4)
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(BadInputError, match=r"26 weights do not fit.* is \(4, 4\) instead of \(512, 512, 3, 3\)"):
        build_perceptual("lpips-vgg16", tmp_path / "vgg.pth")
    torch.save({"classifier.6.bias": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(BadInputError, match=r"no key 'features\.\*'; it holds classifier.6.bias"):
        build_perceptual("lpips-vgg16", tmp_path / "head.pth")


def test_missing_parts_say_where_to_get_them(vgg_file, monkeypatch, tmp_path):
    """The VGG16 file, the package of the heads, the package of the shift-tolerant weights; one line each."""
    with pytest.raises(MissingPartError, match="vgg16-397923af.pth and pass --perceptual-weights=FILE, or use"):
        build_perceptual("lpips-vgg16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPartError, match="pip install --no-deps lpips") as error:
        build_perceptual("lpips-vgg16", vgg_file)
    assert error.value.exit_code == 4 and "\n" not in str(error.value)
    with pytest.raises(MissingPartError, match=r"pip install 'meditok\[teachers\]'"):
        build_perceptual("stlpips-vgg16")
    with pytest.raises(UsageError, match="choose lpips-vgg16, stlpips-alexnet or stlpips-vgg16"):
        build_perceptual("vgg")


def test_a_vgg16_file_with_code_is_refused(tmp_path):
    """Exit code 5; nothing of the pickle runs."""

    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    torch.save({"features.0.weight": Code()}, tmp_path / "vgg.pth")
    with pytest.raises(UnsafeFileError):
        build_perceptual("lpips-vgg16", tmp_path / "vgg.pth")
    assert not (tmp_path / "marker").exists()


def test_vgg16_halves_the_image_four_times():
    """Five maps at strides 1, 2, 4, 8 and 16."""
    maps = vgg16()(torch.zeros(1, 3, 32, 48))
    assert [tuple(m.shape[1:]) for m in maps] == [(c, 32 >> i, 48 >> i) for i, c in enumerate(WIDTHS)]
