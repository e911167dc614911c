"""Two products as attention has them, for what Triton's compiler makes of them on Hopper (test_cuda_attention.py)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def products(q, k, v, out):
    place = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    scores = tl.dot(tl.load(q + place), tl.trans(tl.load(k + place)))
    tl.store(out + place, tl.dot(tl.exp2(scores).to(tl.float16), tl.load(v + place)))


def hopper_ptx() -> str:
    """PTX of `products` for sm_90, fp16 inputs of 64 x 64."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=products, signature=dict(q="*fp16", k="*fp16", v="*fp16", out="*fp32"), constexprs={})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
