"""The Python calls of a tokenizer: shapes, errors, independence of the batch, nothing changed on the side."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import meditok
from meditok import native, ops
from meditok.errors import (
    BadInputError,
    CodebookMismatchError,
    DtypeError,
    MissingPartError,
    NonFiniteError,
    ShapeError,
    TokenRangeError,
    TokenShapeError,
    UsageError,
)
from meditok.models.precision import check_precision

# The published family's shape, small: convolution stages at both ends.
SMALL = {
    "stem_width": 24,
    "stage_widths": (24, 48),
    "stage_depths": (1, 2),
    "width": 192,
    "encoder_depth": 3,
    "decoder_depth": 4,
    "decoder_widths": (64, 24),
    "decoder_depths": (2, 1),
    "expansion": 2,
}
ONE_BLOCK = SMALL | {"width": 64, "encoder_depth": 1, "decoder_depth": 1}


@pytest.fixture(scope="module")
def model():
    return meditok.build("vitamin-small", seed=1, embed_dim=32, **SMALL)


def pictures(batch, height=64, width=64, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_images_become_eight_codes_a_position_and_come_back(model):
    tokens = model.tokenize(pictures(2, 64, 96))
    assert tokens.shape == (2, 8, 24) and tokens.dtype == torch.int64
    images = model.detokenize(tokens, grid=(4, 6))
    assert images.shape == (2, 3, 64, 96) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 32, 32), (2, 16, 48)])
def test_reconstruct_is_detokenize_of_tokenize_bit_for_bit(model, shape):
    x = pictures(*shape)
    grid = shape[1] // 16, shape[2] // 16
    assert torch.equal(model.reconstruct(x), model.detokenize(model.tokenize(x), grid))


def test_an_empty_batch_gives_an_empty_answer(model):
    tokens = model.tokenize(pictures(0))
    assert tokens.shape == (0, 8, 16)
    assert model.detokenize(tokens).shape == (0, 3, 64, 64)
    assert model.tokenize(pictures(0), stable=True).shape == (0, 8, 16)


def test_stable_results_do_not_depend_on_the_number_of_threads(model):
    x = pictures(8, 32, 32, seed=5)
    tokens = model.tokenize(x, stable=True)
    images = model.detokenize(tokens, stable=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(model.tokenize(x, stable=True), tokens)
            assert torch.equal(model.detokenize(tokens, stable=True), images)
    finally:
        torch.set_num_threads(before)


def test_stages_and_features_have_the_stated_shapes(model):
    x, width = pictures(2), model.config.width
    tokens = model.tokenize(x)
    assert model.latents(x).shape == (2, 16, width)
    assert torch.equal(model.latents(x, "code"), model.lookup(tokens))
    assert torch.equal(model.latents(tokens, "post"), model.latents(x, "post"))
    assert model.lookup(tokens).unflatten(-1, (8, 8)).norm(dim=-1).sub(1).abs().max() < 1e-6
    assert torch.equal(model.features(x), model.latents(x).mean(1))
    assert model.embed(x).shape == (2, 32) and model.embed(x).norm(dim=-1).sub(1).abs().max() < 1e-6
    assert model.codebook.shape == (8, 4096, 8)


def test_features_of_a_medical_image_leave_padding_out(model, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((256, 96), 200, np.uint8)).save(tmp_path / "narrow.png")
    image = meditok.read(tmp_path / "narrow.png")
    x = model.processor([image])
    hidden = model.latents(x["pixel_values"]).unflatten(1, (16, 16))
    left = (256 - 96) // 2
    inside = hidden[:, :, left // 16 : 16 - (256 - 96 - left) // 16].flatten(1, 2).mean(1)
    assert torch.allclose(model.features([image]), inside, atol=1e-6)


def test_features_of_tokens_average_the_decoders_input_over_unpadded_positions(model):
    narrow, wide = np.full((64, 16), 200, np.uint8), np.full((64, 64), 90, np.uint8)
    tokens = meditok.tokenize([narrow, wide], model, size=64)
    post = model.latents(tokens, "post")
    assert torch.equal(post, model.latents(tokens.ids, "post"))
    inside = post[0].unflatten(0, (4, 4))[:, 1:3].flatten(0, 1).mean(0)  # 24 pixels of padding on either side
    assert torch.allclose(model.features(tokens), torch.stack([inside, post[1].mean(0)]), atol=1e-6)
    generated = tokens.from_sequence(tokens.to_sequence()[[0]])
    assert torch.allclose(model.features(generated), post[:1].mean(1), atol=1e-6)


def test_tokens_bring_their_grid_and_are_refused_by_another_codebook(model):
    tokens = meditok.tokenize(np.zeros((64, 64), np.uint8), model, size=64)
    assert torch.equal(model.detokenize(tokens), model.detokenize(tokens.ids))
    other = meditok.build("tiny", seed=2)
    for call in (other.detokenize, other.lookup, other.features, lambda t: other.latents(t, "code")):
        with pytest.raises(CodebookMismatchError) as caught:
            call(tokens)
        assert model.codebook_hash in str(caught.value) and other.codebook_hash in str(caught.value)


def test_a_model_made_in_inference_mode_is_an_ordinary_one():
    with torch.inference_mode():
        model = meditok.build("tiny", seed=1)
        tokens, digest = model.tokenize(pictures(1)), model.hash
    assert torch.equal(model.tokenize(pictures(1)), tokens) and model.hash == digest
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_parts_that_are_not_there_are_named():
    plain = meditok.build("tiny", seed=0)
    for call in (lambda: plain.embed(pictures(1)), lambda: plain.embed_text(["a chest X-ray"])):
        with pytest.raises(MissingPartError) as caught:
            call()
        assert caught.value.exit_code == 4
    biomed = meditok.build("tiny", seed=0, embed_dim=16, text_teacher="biomedclip", text_width=8)
    with pytest.raises(MissingPartError, match="pass --text-weights=FILE, or set text_weights of the model"):
        biomed.embed_text(["a chest X-ray"])
    with pytest.raises(MissingPartError, match="fp8"):
        meditok.load("tiny", precision="fp8")
    with pytest.raises(UsageError, match="vitamin-large"):
        meditok.build("vitamin-huge")
    with pytest.raises(BadInputError, match="image_size 250"):
        meditok.build("tiny", image_size=250)
    with pytest.raises(MissingPartError, match="no such directory"):
        meditok.Tokenizer.from_pretrained("/no/such/folder")


@pytest.mark.parametrize(
    "bad, error",
    [
        (torch.zeros(2, 2, 32, 32), ShapeError),
        (torch.zeros(3, 32, 32), ShapeError),
        (torch.zeros(1, 3, 40, 32), ShapeError),
        (torch.zeros(1, 3, 0, 32), ShapeError),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int32), DtypeError),
        (torch.zeros(1, 3, 32, 32, dtype=torch.bool), DtypeError),
        (torch.full((1, 3, 32, 32), 255.0), DtypeError),
        (torch.full((1, 3, 32, 32), torch.nan), NonFiniteError),
        (torch.full((1, 3, 32, 32), torch.inf), NonFiniteError),
        ([[0.0]], DtypeError),
    ],
)
@pytest.mark.parametrize("call", ["tokenize", "reconstruct"])
def test_images_that_are_not_meant_are_refused_in_one_line(model, call, bad, error):
    with pytest.raises(error) as caught:
        getattr(model, call)(bad)
    assert "\n" not in str(caught.value)


def test_the_nearest_legal_size_is_named(model):
    with pytest.raises(ShapeError, match="48 x 32"):
        model.tokenize(torch.zeros(1, 3, 50, 31))


def test_exact_conversions_are_made_and_a_suspicious_range_is_warned_about(model):
    x = pictures(1)
    assert torch.equal(model.tokenize(x.double()), model.tokenize(x))
    assert torch.equal(model.tokenize(x.numpy()), model.tokenize(x))
    byte = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model.tokenize(byte), model.tokenize(byte.float() / 127.5 - 1))
    with pytest.warns(UserWarning, match="0..1"):
        model.tokenize(x.abs())


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "strided", "offset"])
def test_any_memory_layout_gives_the_same_tokens(model, layout):
    x = pictures(2)
    if layout == "channels_last":
        other = x.contiguous(memory_format=torch.channels_last)
    elif layout == "expanded":
        x = x[:1].repeat(2, 1, 1, 1)
        other = x[:1].expand(2, 3, 64, 64)
    elif layout == "strided":
        other = x.repeat_interleave(2, dim=3)[..., ::2]
    else:
        other = torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)
    assert torch.equal(model.tokenize(other), model.tokenize(x))


@pytest.mark.parametrize(
    "bad, error",
    [
        (torch.full((1, 8, 16), -1), TokenRangeError),
        (torch.full((1, 8, 16), 4096), TokenRangeError),
        (torch.full((1, 8, 16), 2**31), TokenRangeError),
        (torch.zeros(1, 8, 16), TokenRangeError),
        (torch.zeros(1, 8, 16, dtype=torch.bool), TokenRangeError),
        (torch.zeros(8, 16, dtype=torch.int64), TokenShapeError),
        (torch.zeros(1, 7, 16, dtype=torch.int64), TokenShapeError),
        (torch.zeros(1, 8, 17, dtype=torch.int64), TokenShapeError),
        (torch.zeros(1, 8, 0, dtype=torch.int64), TokenShapeError),
    ],
)
def test_bad_tokens_are_refused_and_the_next_call_works(model, bad, error):
    with pytest.raises(error) as caught:
        model.detokenize(bad)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)
    assert model.detokenize(torch.zeros(1, 8, 16, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("grid", [(-4, -4), (4.0, 4.0), (16,), (4, 2, 2), "44", (0, 0)])
def test_a_grid_that_is_none_is_refused(model, grid):
    with pytest.raises(TokenShapeError):
        model.detokenize(torch.zeros(1, 8, 16, dtype=torch.int64), grid)


def test_a_bad_id_is_located(model):
    tokens = torch.zeros(2, 8, 16, dtype=torch.int64)
    tokens[1, 3, 7] = 5000
    with pytest.raises(TokenRangeError, match=r"0 to 5000.*image 1, codebook 3, position 7.*4095"):
        model.detokenize(tokens)


def test_evaluation_changes_no_buffer(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(3):
        model.tokenize(pictures(1))
        model.reconstruct(pictures(1))
        model(pictures(1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_changed_bit_of_the_codebook_changes_both_hashes():
    model = meditok.build("tiny", seed=2)
    before = model.hash, model.codebook_hash
    with torch.no_grad():
        model.quantizer.codebook.view(torch.int32)[3, 100, 5] ^= 1
    assert model.hash != before[0] and model.codebook_hash != before[1]


@pytest.mark.parametrize("settings", [dict(fused=True), dict(foreach=True)])
def test_no_optimiser_leaves_an_old_hash(settings):
    """A fused one writes without raising a tensor's version; averaged weights are written through `.data`."""
    model, fresh = (meditok.build("tiny", seed=2).eval() for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    hashes = {model.hash}
    for write in (optimizer.step, optimizer.step, lambda: model.quantizer.codebook.data.mul_(0.5)):
        write()
        fresh.load_state_dict(model.state_dict())
        assert model.hash == fresh.hash and model.hash not in hashes
        hashes.add(model.hash)


def test_tokenize_follows_a_codebook_that_changed_in_place():
    model, x = meditok.build("tiny", seed=2), pictures(1)
    before = model.tokenize(x)
    with torch.no_grad():
        model.quantizer.codebook.copy_(model.quantizer.codebook.flip(1))
    assert torch.equal(model.tokenize(x), 4095 - before)


def test_seeded_builds_are_equal_and_leave_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = meditok.build("tiny", seed=7)
    assert torch.equal(torch.rand(1), expected)
    assert first.hash == meditok.build("tiny", seed=7).hash != meditok.build("tiny", seed=8).hash


def test_bf16_runs_the_transformers_in_half_precision_and_the_quantiser_in_full(monkeypatch):
    model, x = meditok.build("vitamin-small", seed=1, **SMALL), pictures(2)
    full = model.tokenize(x)
    model.precision = "bf16"
    seen, attention = {}, ops.attention_qkv
    monkeypatch.setattr(
        ops, "attention_qkv", lambda qkv, **o: (seen.setdefault("encoder", qkv.dtype), attention(qkv, **o))[1]
    )
    model.quant_proj.attn.proj.register_forward_hook(lambda _m, _i, out: seen.update(bottleneck=out.dtype))
    half = model.tokenize(x)
    assert seen == {"encoder": torch.bfloat16, "bottleneck": torch.float32}
    assert (half == full).float().mean() > 0.2  # random weights: many near ties


def test_int8_rounds_the_linear_layers_of_the_blocks_and_nothing_else():
    """Most tokens and the picture stay; stable results depend on no batch; new weights are rounded anew."""
    model, x = meditok.build("vitamin-small", seed=1, **SMALL), pictures(3)
    full, image = model.tokenize(x), model.detokenize(model.tokenize(x))
    model.precision = check_precision("int8", torch.device("cpu"))
    found = model.tokenize(x, stable=True)
    assert 0.5 < (found == full).double().mean() < 1
    error = (model.detokenize(full) - image).square().mean() / image.square().mean()
    assert 0 < error < 1e-2, error
    assert torch.equal(model.tokenize(x[1:2], stable=True), found[1:2])
    with torch.enable_grad():
        assert torch.equal(model._encode(x), _in("fp32", model)._encode(x))
    model.precision = "int8"
    with torch.no_grad():
        hidden = model._encode(x)
        model.encoder.blocks[0].mlp.w2.weight.mul_(-1)
        assert not torch.equal(model._encode(x), hidden)
    with pytest.raises(MissingPartError, match="x86"):
        check_precision("int8", torch.device("cuda"))


def _in(precision, model):
    model.precision = precision
    return model


@pytest.mark.skipif(native.backend != "native", reason="the compiled core is not what runs here")
def test_one_tokenize_runs_the_compiled_kernels(model):
    with native.count_calls() as calls:
        model.detokenize(model.tokenize(pictures(1)))
    assert calls["vq_assign"] == 1 and calls["vq_lookup"] == 1
    attended = [len(part.blocks) for part in (model.encoder, model.decoder)]
    assert calls["attention"] == sum(attended) + 2  # and the two bottlenecks


@pytest.mark.parametrize("ends", ["stages", "patches"])
def test_encode_decode_and_a_training_step_compile_without_a_graph_break(ends):
    model = meditok.build("vitamin-small", seed=1, ends=ends, **ONE_BLOCK)
    x = pictures(2, 32, 32)
    tokens = torch.compile(model.tokenize, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(tokens, model.tokenize(x))
    images = torch.compile(model.detokenize, fullgraph=True, backend="aot_eager")(tokens)
    assert torch.allclose(images, model.detokenize(tokens), atol=1e-6)
    model.train()

    def loss(images):
        out = model(images)
        return (out.reconstruction - images).square().mean() + out.vq_loss

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    value.backward()
    compiled = model.encoder.norm.weight.grad.clone()
    model.zero_grad()
    loss(x).backward()
    assert torch.allclose(compiled, model.encoder.norm.weight.grad, atol=1e-6)


def test_neither_another_batch_size_nor_another_step_compiles_anew():
    model, compiled = meditok.build("vitamin-small", seed=1, **ONE_BLOCK).train(), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    step = torch.compile(lambda images: model(images).vq_loss, fullgraph=True, backend=backend)
    tokenize = torch.compile(model.tokenize, fullgraph=True, backend=backend)
    for call in (step, tokenize):
        compiled.clear()
        for batch in (2, 3, 4, 5, 5, 6, 7, 8, 9, 10):
            call(pictures(batch, 32, 32))
        assert len(compiled) <= 2, "one graph for the first batch size and one for any"


def test_import_loads_neither_readers_nor_parquet_nor_the_command_line():
    code = (
        "import sys, meditok; meditok.Tokenizer; meditok.ops; "
        "heavy = 'PIL pydicom nibabel pyarrow skimage click rich scipy'.split();"
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
