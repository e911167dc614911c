"""Ten steps of both stages: the reference path gives the losses pinned here, and so does the compiled path.

Losses are float32, and every machine, instruction set and number of threads rounds in its own way. Until such an error
meets a kink (the sign of a ReLU's input) losses differ by 1e-7 of themselves; behind one, by what that part of a
gradient is worth times the learning rate, which is why it is small here (stages.GENTLE). Measured on an AVX-512 machine
with PyTorch and oneDNN as they are, kept to AVX2, and kept to SSE, and with each of our instruction sets: at most 1e-4
of every loss but the adversarial one, which is a small difference of large numbers and moved by 0.003. A learning rate
5 % off moves all but one by 0.2 to 7 %.
"""

from __future__ import annotations

import csv

import pytest

from meditok import native

from ..ops.helpers import levels_here
from . import launch, stages

STEPS = 10
TERMS = ("l1", "l2", "perceptual", "vq", "contrastive", "adversarial", "hinge", "consistency")
PINNED = {  # a row a step, in the order of TERMS
    "image": """
        0.0853248   0.284064   0.833016   0.106559    1.62598          0    2.04306    2.08052
        0.0813785   0.260777   0.858701   0.107351    1.90292  -0.0389177     2.0446    2.77931
        0.0791471   0.245973   0.810697  0.0992692    2.17763  -0.0794333    2.05544    2.31558
        0.0773067   0.231854   0.841499   0.103976    1.65528  -0.0488048    2.04072    1.22227
        0.0734552   0.211732   0.830627   0.108615    2.06816  -0.00970177    1.90974    1.13567
        0.0768708   0.233397   0.798633    0.10015     1.7915  -0.0423181    1.87302    1.12981
        0.0765707   0.228478   0.836623    0.10231    2.21285  -0.0406892    1.84896    1.34996
        0.0727211   0.208331   0.740251  0.0979871    2.94346  -0.0456759    1.85639    1.06927
        0.0794073   0.247376   0.836437  0.0982436     1.9581  -0.0162837    1.87441    1.45533
        0.0759999   0.228315   0.817563     0.1054    2.22426  -0.0243897    1.93263    1.16861
    """,
    "text": """
        0.0853248   0.284064   0.833016  0.0213119    1.78301          0    1.90395    1.86428
        0.0808512   0.257927   0.858198  0.0209498    1.44389  -0.0400108    1.96262     2.2352
        0.0771671    0.23403   0.829293  0.0188231    1.12584  -0.127204    1.97986    1.71698
         0.076816   0.230203   0.846638  0.0192517    1.25286  -0.121967    2.09441    1.64695
        0.0729255   0.208966   0.819765   0.019818    1.81748  -0.0680932    2.05587    1.19886
        0.0766899   0.229719   0.824466  0.0176376    1.40861  -0.0861103    2.01491     1.0844
        0.0723837   0.204598   0.833018  0.0179328    1.60268  -0.0973413    1.98311    1.35584
         0.073503   0.210844   0.760372  0.0170714    1.32104  -0.0624563    2.11178    1.66161
         0.076998   0.231015   0.835806  0.0167406    1.39725  -0.147379    2.02182    1.43065
        0.0720498   0.202806   0.844529  0.0175236    1.74614  -0.145073    2.05427    1.29187
    """,
}
TOLERANCE = {"adversarial": {"rel": 0, "abs": 0.01}}  # of every other term:
RELATIVE = {"rel": 1e-3, "abs": 0}


def options(target: str, data: str) -> dict:
    update = "ema" if target == "text" else "gradient"
    rest = dict(target=target, codebook_update=update, contrastive=1.0, steps=STEPS, save_every=STEPS)
    return {"data": data} | rest | stages.GENTLE


def check(rows: list[dict], target: str) -> None:
    pinned = [[float(value) for value in line.split()] for line in PINNED[target].strip().splitlines()]
    for step, (row, expected) in enumerate(zip(rows, pinned, strict=True), 1):
        for term, value in zip(TERMS, expected, strict=True):
            assert float(row[term]) == pytest.approx(value, **TOLERANCE.get(term, RELATIVE)), (step, term)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(stages.pictures(tmp_path_factory.mktemp("data") / "pictures"))


def test_the_reference_path_gives_the_pinned_losses(data, tmp_path):
    jobs = [launch.Job(tmp_path / target, options(target, data)) for target in PINNED]
    statuses, said = launch.start("stages", jobs, MEDITOK_BACKEND="reference")
    assert statuses == [[0], [0]], said
    for target in PINNED:
        with open(tmp_path / target / "log.csv") as file:
            check(list(csv.DictReader(file)), target)


@pytest.mark.parametrize(
    ("target", "level"),
    [("text", level) for level in levels_here()] + [("image", level) for level in levels_here()[-1:]],
)
def test_the_compiled_path_gives_them_on_every_instruction_set(data, tmp_path, target, level):
    native.core.choose_isa(level)
    try:
        with native.count_calls() as calls:
            check(stages.run(tmp_path / "out", **options(target, data)), target)
    finally:
        native.core.choose_isa(native.isa)
    assert calls["vq_quantize"] >= STEPS and calls["attention"] >= STEPS


def test_a_learning_rate_slightly_off_is_noticed(data, tmp_path):
    rows = stages.run(tmp_path / "out", **options("text", data) | {"lr": 1.05 * stages.GENTLE["lr"]})
    with pytest.raises(AssertionError, match="comparison failed"):
        check(rows, "text")
