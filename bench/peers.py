"""The ways people quantise vectors today, as callables on the same x (N, G, C) and codebook (G, K, C).

`assign_peers` gives ids, `training_peers` one forward and backward. A library that is not installed is left out, and
so is a peer whose own memory (it often builds the N x K scores) would pass `MEMORY`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MEMORY = {"cpu": 4 << 30, "cuda": 16 << 30}  # bytes of scores that a peer may build


def eager_assign(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The published way: normalise, one product, argmax (cosine); expanded distances, argmin (l2)."""
    if metric == "cosine":
        return torch.einsum("ngc,gkc->ngk", F.normalize(x, dim=-1), F.normalize(codebook, dim=-1)).argmax(-1)
    product = torch.einsum("ngc,gkc->ngk", x, codebook)
    return (x.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2 * product).argmin(-1)


def eager_training(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The published training path (SPEC of MedITok's quantiser): ids, straight-through rows, both loss terms."""
    hat = F.normalize(x, dim=-1) if metric == "cosine" else x
    rows = F.normalize(codebook, dim=-1) if metric == "cosine" else codebook
    with torch.no_grad():
        ids = eager_assign(x, codebook, metric)
    code = torch.stack([F.embedding(ids[:, g], rows[g]) for g in range(x.shape[1])], 1)
    loss = 0.25 * F.mse_loss(hat, code.detach()) + F.mse_loss(code, hat.detach())
    return hat + (code - hat).detach(), loss


def eager_entropy(x: Tensor, codebook: Tensor) -> Tensor:
    """The published entropy term at its temperature of 0.01 (cosine): every probability (N, G, K) at once."""
    logits = 200 * torch.einsum("ngc,gkc->ngk", F.normalize(x, dim=-1), F.normalize(codebook, dim=-1))
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    mean = p.mean(0)
    return (mean * (mean + 1e-7).log()).sum(-1).mean() - (p * log_p).sum(-1).mean()


def gradients(loss: Callable, x: Tensor, codebook: Tensor) -> Callable[[], None]:
    """loss(x, codebook), then its gradients to both."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(x, codebook), (x, codebook))


def training_step(forward: Callable, x: Tensor, codebook: Tensor) -> Callable[[], None]:
    """Forward, then backward to x and codebook from a fixed gradient of z and of the loss."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    grad = torch.ones_like(x)

    def step() -> None:
        x.grad = codebook.grad = None
        z, loss = forward(x, codebook)
        torch.autograd.backward((z, loss), (grad, None))

    return step


def scores_bytes(x: Tensor, codebook: Tensor) -> int:
    return x.shape[0] * codebook.shape[0] * codebook.shape[1] * 4


def assign_peers(
    x: Tensor, codebook: Tensor, metric: str, *, every: bool = True, compiled: bool = True
) -> dict[str, Callable]:
    """{name: run}; with `every` False only torch eager and the strongest peer of the device, which on CUDA is
    torch.compile: `compiled` False leaves it out, as compiling a shape takes seconds."""
    peers: dict[str, Callable] = {}
    dense = scores_bytes(x, codebook) <= MEMORY[x.device.type]
    if dense:
        peers["torch eager"] = lambda: eager_assign(x, codebook, metric)
    if dense and compiled and (every or x.is_cuda):
        torch._dynamo.reset()  # after eight shapes of one function it would run eagerly and not say so
        compiled = torch.compile(eager_assign, dynamic=False)
        peers["torch.compile"] = lambda: compiled(x, codebook, metric)
    if x.device.type == "cpu":
        peers |= _faiss(x, codebook, metric, flat=every and dense)
        if every and dense:
            peers |= _scikit_learn(x, codebook, metric)
    if every:
        peers |= _keops(x, codebook, metric)
        if dense:
            peers |= _vector_quantize_pytorch(x, codebook, metric)
    return {name: run for name, run in peers.items() if _works(name, run)}


def training_peers(x: Tensor, codebook: Tensor, metric: str) -> dict[str, Callable]:
    torch._dynamo.reset()
    compiled = torch.compile(eager_training, dynamic=False)
    peers = {
        "torch eager": training_step(lambda a, b: eager_training(a, b, metric), x, codebook),
        "torch.compile": training_step(lambda a, b: compiled(a, b, metric), x, codebook),
    }
    return {name: run for name, run in peers.items() if _works(name, run)}


def _works(name: str, run: Callable) -> bool:
    """Whether a peer runs here at all; one that does not is told, never hidden."""
    try:
        run()
    except Exception as error:  # a peer's failure is its own, of any kind: it is reported and left out
        print(
            f"  {name}: does not run here: {str(error).splitlines()[0][:100] if str(error) else type(error).__name__}"
        )
        return False
    return True


def _faiss(x: Tensor, codebook: Tensor, metric: str, *, flat: bool) -> dict[str, Callable]:
    """ProductQuantizer takes powers of two and distances; unit rows make them cosine. Flat searches one codebook."""
    if importlib.util.find_spec("faiss") is None:
        return {}
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    groups, codes, width = codebook.shape
    rows = F.normalize(codebook, dim=-1) if metric == "cosine" else codebook
    points = F.normalize(x, dim=-1) if metric == "cosine" else x
    peers: dict[str, Callable] = {}
    bits = codes.bit_length() - 1
    if 1 << bits == codes and bits <= 16:
        quantizer = faiss.ProductQuantizer(groups * width, groups, bits)
        faiss.copy_array_to_vector(rows.reshape(-1).numpy(), quantizer.centroids)
        joined = points.reshape(x.shape[0], -1).numpy()
        peers["faiss ProductQuantizer"] = lambda: quantizer.compute_codes(joined)
    if flat:
        indices = [faiss.IndexFlatIP(width) if metric == "cosine" else faiss.IndexFlatL2(width) for _ in range(groups)]
        for index, code in zip(indices, rows, strict=True):
            index.add(code.contiguous().numpy())
        parts = [points[:, g].contiguous().numpy() for g in range(groups)]
        peers["faiss Flat"] = lambda: [i.search(p, 1) for i, p in zip(indices, parts, strict=True)]
    return peers


def _scikit_learn(x: Tensor, codebook: Tensor, metric: str) -> dict[str, Callable]:
    if importlib.util.find_spec("sklearn") is None:
        return {}
    from sklearn.metrics import pairwise_distances_argmin
    from threadpoolctl import threadpool_limits

    rows = (F.normalize(codebook, dim=-1) if metric == "cosine" else codebook).numpy()
    points = (F.normalize(x, dim=-1) if metric == "cosine" else x).numpy()
    threads = torch.get_num_threads()

    def run():
        with threadpool_limits(threads):
            return [pairwise_distances_argmin(points[:, g], rows[g]) for g in range(rows.shape[0])]

    return {"scikit-learn": run}


def _keops(x: Tensor, codebook: Tensor, metric: str) -> dict[str, Callable]:
    if importlib.util.find_spec("pykeops") is None:
        return {}
    import pykeops

    pykeops.set_verbose(False)
    from pykeops.torch import LazyTensor

    rows = F.normalize(codebook, dim=-1) if metric == "cosine" else codebook
    points = F.normalize(x, dim=-1) if metric == "cosine" else x
    left = points.transpose(0, 1).contiguous()[:, :, None]  # (G, N, 1, C)
    right = rows.contiguous()[:, None]  # (G, 1, K, C)
    return {"KeOps argKmin": lambda: ((LazyTensor(left) - LazyTensor(right)) ** 2).sum(-1).argKmin(1, dim=2)}


def _vector_quantize_pytorch(x: Tensor, codebook: Tensor, metric: str) -> dict[str, Callable]:
    if importlib.util.find_spec("vector_quantize_pytorch") is None:
        return {}
    from vector_quantize_pytorch import VectorQuantize

    groups, codes, width = codebook.shape
    model = VectorQuantize(
        dim=groups * width,
        codebook_size=codes,
        codebook_dim=width,
        heads=groups,
        separate_codebook_per_head=groups > 1,
        use_cosine_sim=metric == "cosine",
    ).to(x.device)
    model.project_in = model.project_out = torch.nn.Identity()
    with torch.no_grad():
        model._codebook.embed.copy_(F.normalize(codebook, dim=-1) if metric == "cosine" else codebook)
    model.eval()
    joined = x.reshape(1, x.shape[0], -1)

    def run():
        with torch.no_grad():
            return model(joined)[1]

    return {"vector-quantize-pytorch": run}
