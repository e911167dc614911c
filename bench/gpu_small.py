"""Every vq op once on the device, forward and backward, small: what bench/gpu_check.sh runs under compute-sanitizer."""

from __future__ import annotations

import torch

from meditok import native, ops


def main() -> None:
    assert native.cuda_usable(torch.cuda.current_device()), native.cuda_problem()
    generator = torch.Generator().manual_seed(0)
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
    torch.cuda.synchronize()
    print("every op ran")


if __name__ == "__main__":
    main()
