"""Every op once on the device, forward and backward, small: what bench/gpu_check.sh runs under compute-sanitizer."""

from __future__ import annotations

import torch

from meditok import native, ops


def vq(generator: torch.Generator) -> None:
    for metric in ("cosine", "l2"):
        # One thread block and a few, both assign kernels, a code with more rows than one warp takes.
        for rows, groups, codes, width in [(70, 2, 100, 8), (600, 1, 3, 5), (40, 1, 70, 40), (20, 1, 33, 200)]:
            for dtype in (torch.float32, torch.float16):
                x = torch.randn(rows, groups, width, generator=generator).to("cuda", dtype).requires_grad_()
                codebook = torch.randn(groups, codes, width, generator=generator).to("cuda", dtype).requires_grad_()
                mask = torch.arange(rows, device="cuda") % 3 > 0
                z, ids, loss, _ = ops.vq_quantize(
                    x, codebook, metric=metric, mask=mask, rotation=dtype != torch.float32
                )
                (z.float().square().sum() + loss).backward()
                counts, sums = ops.vq_stats(x.detach(), ids, codes)
                state = [codebook.detach().float(), torch.rand(groups, codes, device="cuda"), sums.clone()]
                ops.vq_update_(*state, counts, sums, decay=0.9, eps=1e-5, metric=metric)
                assert x.grad.isfinite().all() and state[0].isfinite().all()


def attention(generator: torch.Generator) -> None:
    """Every kernel: 16-bit, tf32 and float32, both width classes, each kind of mask, aligned rows and others."""
    for dtype, tf32 in [(torch.float16, False), (torch.bfloat16, False), (torch.float32, True), (torch.float32, False)]:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for tokens, heads, width in [(70, 2, 64), (33, 1, 128), (40, 1, 9)]:
            qkv = torch.randn(2, tokens, 3, heads, width, generator=generator).to("cuda", dtype).requires_grad_()
            for reduce in (None, "mean"):
                ops.attention_qkv(qkv, is_causal=True, reduce=reduce).float().square().sum().backward()
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            mask = torch.rand(tokens, tokens, generator=generator).to("cuda") > 0.3
            for given in (None, mask, torch.zeros(tokens, tokens, device="cuda", dtype=dtype)):
                ops.attention(q, k, v, given).float().square().sum().backward()
            assert qkv.grad.isfinite().all()


def main() -> None:
    assert native.cuda_usable(torch.cuda.current_device()), native.cuda_problem()
    generator = torch.Generator().manual_seed(0)
    vq(generator)
    attention(generator)
    torch.cuda.synchronize()
    print("every op ran")


if __name__ == "__main__":
    main()
