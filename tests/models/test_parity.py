"""With the same weights, every stored quantity of the published implementation comes out of this one."""

from __future__ import annotations

import gc
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F

from meditok import ops
from meditok.nn.blocks import BottleneckBlock

from .parity import SHARED, Golden, weight

CHAIN, STAGE, GRADIENT, MARGIN = 2e-5, 5e-6, 5e-5, 5e-5  # shares of the largest magnitude; see error()
SIZES = ["slim", "xs", "small", "large"]


@pytest.fixture(scope="module", params=SIZES)
def golden(request):
    if request.param != "slim" and not SHARED.is_dir():
        pytest.skip(f"golden_{request.param}.npz is not here; set MEDITOK_SHARED")
    return Golden(request.param)


@pytest.fixture(scope="module")
def model(golden):
    yield golden.model()
    gc.collect()


def check(golden, name, value, tolerance):
    error = golden.error(name, value)
    assert error <= tolerance, f"{name}: off by {error:.2e} of its largest magnitude, allowed {tolerance:.0e}"


def same_ids(ids, golden, prefix=""):
    """Equal wherever the best code leads the second by more than rounding."""
    clear = golden[f"{prefix}margin"] > MARGIN
    assert clear.float().mean() > 0.99
    assert torch.equal(ids[clear], golden[f"{prefix}indices"].long()[clear])


def test_state_dict_has_the_published_keys_shapes_and_trainable_set(golden, model):
    manifest = {t["key"]: tuple(t["shape"]) for t in golden.manifest["tensors"]}
    state = model.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == manifest
    frozen = {"encoder.pos_embed"} | {key for key in manifest if key.endswith(("zero_k_bias", "vocab_usage"))}
    assert {t["key"] for t in golden.manifest["tensors"] if not t["trainable"]} == frozen
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["encoder.pos_embed"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == golden.manifest["trainable_parameters"]


def test_generated_weights_are_the_ones_the_answers_were_made_with(golden):
    if golden.manifest["parameters"] > 1e8:
        pytest.skip("hashing is shown on the smaller sizes")
    digest = hashlib.sha256()
    for key, value in golden.state.items():
        digest.update(key.encode() + value.numpy().tobytes())
    assert digest.hexdigest() == golden.manifest["weights_sha256_seed0"]


def test_chain_from_image_to_image_agrees(golden, model):
    images = golden["images"]
    hidden = model.latents(images, "encoder")
    check(golden, "encoder_out", hidden, CHAIN)
    with torch.no_grad():
        code = model.quant_proj(hidden)
    check(golden, "quant_proj_out", code, CHAIN)
    tokens = model.tokenize(images)
    same_ids(tokens, golden)
    ids = golden["indices"].long()
    check(golden, "quantized", model.lookup(ids), 5e-7)
    check(golden, "encode_image_vq", model.latents(ids, "code"), 5e-7)
    check(golden, "post_quant_out", model.latents(ids, "post"), CHAIN)
    check(golden, "decoder_clamped", model.detokenize(ids), CHAIN)
    check(golden, "encode_image_normalized", model.embed(images), CHAIN)
    check(golden, "forward_features", model.features(images), CHAIN)
    if torch.equal(tokens, ids):
        assert torch.equal(model.reconstruct(images), model.detokenize(ids))


@torch.no_grad()
def test_each_stage_agrees_when_fed_with_the_stored_input(golden, model):
    stages = [
        ("encoder_out", "quant_proj_out", model.quant_proj),
        ("quantized", "post_quant_out", model.post_quant_proj),
        ("post_quant_out", "decoder_raw", lambda x: model.decoder(x, (math.isqrt(x.shape[1]),) * 2)),
    ]
    for source, result, run in stages:
        if golden.complete(source):
            check(golden, result, run(golden[source]), CHAIN if result == "decoder_raw" else STAGE)
    same_ids(model.quantizer.assign(golden["quant_proj_out"]), golden)


@torch.no_grad()
def test_best_similarity_agrees(golden, model):
    pieces = F.normalize(golden["quant_proj_out"].unflatten(-1, (8, 8)), dim=-1)
    chosen = model.lookup(golden["indices"].long()).unflatten(-1, (8, 8))
    similarity = (pieces * chosen).sum(-1).transpose(1, 2)
    check(golden, "top1_similarity", similarity, STAGE)


@torch.no_grad()
def test_inner_modules_agree(golden, model):
    if "dbg_stem" not in golden:
        pytest.skip("the slim copy holds no inner activations")
    middle = len(model.encoder.blocks) // 2
    backbone = model.encoder.patch_embed["backbone"]
    first, block = {}, model.encoder.blocks[0]
    hook = block.register_forward_pre_hook(lambda _m, inputs: first.__setitem__("x", inputs[0]))
    model.latents(golden["images"], "encoder")
    hook.remove()
    # Their residual and norms are fused into them where they stand, so these two are called alone.
    attended = block.attn(block.norm1(first["x"]))
    alone = {"enc_block0_attn": attended, "enc_block0_mlp": block.mlp(block.norm2(first["x"] + attended))}
    inner = {
        "stem": backbone.stem,
        "stage0_block0": backbone.stages[0][0],
        "stage0": backbone.stages[0],
        "stage1_block0": backbone.stages[1][0],
        "stage1": backbone.stages[1],
        "pool": backbone.pool,
        "enc_block0": model.encoder.blocks[0],
        "enc_block_mid": model.encoder.blocks[middle],
        "enc_block_last": model.encoder.blocks[-1],
        "quant_proj_attn": model.quant_proj.attn,
        "quant_proj_proj": model.quant_proj.proj,
        "quant_proj_mlp": model.quant_proj.mlp,
        "post_quant_attn": model.post_quant_proj.attn,
        "post_quant_proj": model.post_quant_proj.proj,
        "dec_block0": model.decoder.blocks[0],
        "dec_block_last": model.decoder.blocks[-1],
        "dec_norm": model.decoder.norm,
        "up_conv1": model.decoder.up_conv1,
        "up_conv2_block0": model.decoder.up_conv2[0],
        "up_conv2": model.decoder.up_conv2,
        "up_conv3": model.decoder.up_conv3,
    }
    assert {f"dbg_{name}" for name in (*inner, *alone)} == {name for name in golden.names if name.startswith("dbg_")}
    seen = {name: [] for name in inner}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(out))
        for name, module in inner.items()
    ]
    model.latents(golden["images"], "encoder")
    model.quant_proj(model.latents(golden["images"], "encoder"))
    model.detokenize(golden["indices"].long())
    for hook in hooks:
        hook.remove()
    for name, value in alone.items():
        check(golden, f"dbg_{name}", value, CHAIN)
    for name, parts in seen.items():  # convolutions take images one by one
        check(golden, f"dbg_{name}", torch.cat(parts)[-len(golden["images"]) :], CHAIN)


def test_training_pass_agrees(golden):
    model = golden.model().train()
    with torch.no_grad():
        out = model(golden["images"])
        check(golden, "forward_img_rec", out.reconstruction, CHAIN)
        check(golden, "forward_vq_loss", out.vq_loss, CHAIN)
        check(golden, "forward_features_normalized", out.features, CHAIN)
        check(golden, "forward_logit_scale", out.logit_scale, STAGE)
        check(golden, "forward_usage_percent", out.usage, STAGE)
        check(golden, "vocab_usage_after1", model.quantizer.usage, STAGE)
        again = model(golden["images"].flip(-1))
        check(golden, "forward_vq_loss_2", again.vq_loss, CHAIN)
        check(golden, "vocab_usage_after2", model.quantizer.usage, STAGE)
        check(golden, "forward_usage_percent_2", again.usage, STAGE)


@torch.no_grad()
def test_loss_of_every_codebook_agrees(golden, model):
    code = golden["quant_proj_out"].flatten(0, 1).unflatten(-1, (8, 8))
    losses = [ops.vq_quantize(code[:, i : i + 1], model.codebook[i : i + 1])[2] for i in range(8)]
    check(golden, "forward_vq_loss_per_codebook", torch.stack(losses), CHAIN)


def test_loss_and_gradients_agree(golden):
    model = golden.model().train()
    kept = {}

    def keep(name):
        def hook(_module, _inputs, output):
            output.retain_grad()
            kept[name] = output

        return hook

    model.encoder.register_forward_hook(keep("encoder_out"))
    model.quant_proj.register_forward_hook(keep("quant_proj_out"))
    model.post_quant_proj.register_forward_hook(keep("post_quant_out"))
    images = golden["images"]
    out = model(images)
    l1, l2 = (out.reconstruction - images).abs().mean(), (out.reconstruction - images).square().mean()
    logits = out.logit_scale * out.features @ golden["clip_targets"].T
    clip = F.cross_entropy(logits, torch.arange(len(images)))
    total = 0.2 * l1 + l2 + out.vq_loss + clip
    total.backward()
    for name, value in (("total", total), ("l1", l1), ("l2", l2), ("clip", clip)):
        check(golden, f"loss_{name}", value, CHAIN)
    for name, value in kept.items():
        check(golden, f"grad_act:{name}", value.grad, GRADIENT)
    gradients = published_gradients(model)
    for name in golden.names:
        if name.startswith("grad:"):
            check(golden, name, gradients[name.removeprefix("grad:")], GRADIENT)
    trained = [t["key"] for t in golden.manifest["tensors"] if t["trainable"]]
    norms = torch.stack([gradients[key].double().norm() for key in trained])
    relative = (norms - golden["grad_norms"]).abs() / golden["grad_norms"].clamp(min=1e-12)
    assert relative.max() <= 5e-5, f"{trained[relative.argmax()]}: gradient norm off by {relative.max():.1e}"


def published_gradients(model):
    """Gradients under the names of the state dict, where each codebook is a tensor of its own."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for i, part in enumerate(gradients.pop("quantizer.codebook")):
        gradients[f"quantizer.codebooks.{i}.codebook.weight"] = part
    return gradients


@torch.no_grad()
def test_unitoks_full_attention_agrees(golden):
    if "unitok_quant_proj_out" not in golden:
        pytest.skip("this size stores no UniTok answers")
    model = golden.model(attention="full")
    if golden.complete("encoder_out"):
        check(golden, "unitok_quant_proj_out", model.quant_proj(golden["encoder_out"]), STAGE)
        same_ids(model.quantizer.assign(golden["unitok_quant_proj_out"]), golden, "unitok_")
    check(golden, "unitok_post_quant_out", model.post_quant_proj(golden["quantized"]), STAGE)


@pytest.mark.parametrize("name, sizes", [("down", (96, 16, 4)), ("up", (16, 96, 6))])
@torch.no_grad()
def test_bottleneck_alone_agrees(golden, name, sizes):
    block = BottleneckBlock(*sizes, causal=True)
    state = {
        key: torch.from_numpy(weight(f"unit_{name}.quant_proj.{key}", tuple(value.shape)))
        for key, value in block.state_dict().items()
    }
    block.load_state_dict(state)
    check(golden, f"unit_{name}_out", block(golden[f"unit_{name}_in"]), STAGE)
