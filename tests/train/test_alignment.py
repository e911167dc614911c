"""Both stages of MedITok, small but whole: teacher, perceptual net, discriminator and all."""

from __future__ import annotations

import csv
import json
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import meditok
from meditok.cli import run as command
from meditok.errors import MissingPartError
from meditok.train import checkpoint
from meditok.train.data import batches
from meditok.train.distributed import World
from meditok.train.items import find_items, read
from meditok.train.speed import Speed
from meditok.train.tasks.alignment import Alignment

from . import launch, stages

TARGETS = ("image", "text")
JOINED = {"steps": 3} | stages.GENTLE
TWENTY = {"steps": 20, "save_every": 10, "batch": 2, "size": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(stages.pictures(tmp_path_factory.mktemp("data") / "pictures"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folder of runs in processes of their own: each stage killed in step 13 and beyond, and in 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [launch.Job(folder / f"killed {t}", of_stage(t, data, **TWENTY, kill=12)) for t in TARGETS]
    jobs += [launch.Job(folder / f"{n} {t}", of_stage(t, data, **JOINED), n) for t in TARGETS for n in (2, 4)]
    sharded = of_stage("text", data, **JOINED, sharded=True, sheet_every=2)
    jobs.append(launch.Job(folder / "2 sharded text", sharded, 2))
    statuses, said = launch.start("stages", jobs)
    assert statuses == [[-signal.SIGKILL]] * 2 + [[0] * job.processes for job in jobs[2:]], said
    return folder


def of_stage(target: str, data: str, **options) -> dict:
    return {"data": data, "target": target, "codebook_update": "ema" if target == "text" else "gradient"} | options


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(other[name], value)] == []


@pytest.mark.parametrize("target", ["image", "text"])
def test_a_stage_lowers_every_loss_of_the_generator_it_can_and_writes_a_model(data, tmp_path, target):
    rows = stages.run(tmp_path / "out", data=data, target=target, contrastive=1.0, steps=12, lr=3e-3, adversarial=0.0)
    first, last = rows[0], rows[-1]
    for term in ("l1", "l2", "contrastive"):
        assert last[term] < first[term], term
    model = meditok.load(tmp_path / "out" / "model.safetensors", device="cpu")
    assert model.embed(torch.zeros(1, 3, 48, 48)).shape == (1, 16)
    if target == "text":
        assert model.embed_text(["noise number 0", "noise number 1"]).norm(dim=1).tolist() == pytest.approx([1, 1])
    else:
        with pytest.raises(MissingPartError, match="no text tower"):
            model.embed_text(["noise number 0"])
    with open(tmp_path / "out" / "log.csv") as file:
        log = list(csv.DictReader(file))
    assert [row["step"] for row in log] == [str(step) for step in range(1, 13)]
    assert list(log[0])[:2] == ["step", "loss_total"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "perplexity_min" in page and "://" not in page


def test_heads_alone_learn_and_leave_tokens_and_reconstructions_as_they_are(data, tmp_path):
    meditok.build("tiny", seed=3, **stages.MODEL).save_pretrained(tmp_path / "first")
    options = dict(target="text", contrastive=1.0, steps=30, warmup=3, adversarial=0.0, perceptual=0.0, heads_only=True)
    rows = stages.run(tmp_path / "out", data=data, init=str(tmp_path / "first"), **options)
    assert rows[-1]["contrastive"] < rows[0]["contrastive"]
    first, last = (meditok.load(tmp_path / name, device="cpu") for name in ("first", "out/model.safetensors"))
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(first.reconstruct(x), last.reconstruct(x)) and first.codebook_hash == last.codebook_hash
    assert not torch.equal(first.embed(x), last.embed(x))


def test_an_encoder_at_rate_zero_keeps_its_tokens_while_the_decoder_learns(data, tmp_path):
    meditok.build("tiny", seed=3, **stages.MODEL).save_pretrained(tmp_path / "first")
    options = dict(adversarial=0.0, perceptual=0.0, ssim=1.0, encoder_lr=0.0, codebook_update="frozen", ema=0.0)
    options |= dict(teacher_view="whole", store="float16", steps=8)
    rows = stages.run(tmp_path / "out", data=data, init=str(tmp_path / "first"), **options)
    assert rows[-1]["ssim"] < rows[0]["ssim"] and rows[-1]["contrastive"] > 0
    first, last = (meditok.load(tmp_path / name, device="cpu") for name in ("first", "out/model.safetensors"))
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    assert (first.tokenize(x) != last.tokenize(x)).float().mean() < 0.02  # float16 moves a few
    assert not torch.allclose(first.detokenize(first.tokenize(x)), last.detokenize(first.tokenize(x)), atol=1e-2)
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


def test_a_teacher_of_whole_pictures_reads_each_once_and_not_the_crops(data):
    config = stages.settings(data=data, teacher_view="whole", adversarial=0.0, perceptual=0.0, crop_scale=(0.3, 0.5))
    task = Alignment(config, World(0, 1, torch.device("cpu")))
    items = find_items(config)
    asked = []

    def whole(place: int) -> torch.Tensor:
        asked.append(place)
        return read(items[place], None)

    task.whole = whole
    for step in range(3):
        batch = next(batches(items, config, start=step, rank=0, world=1))
        task.prepare(batch)
        target = task._target(batch)
        for row, place in zip(target, batch.pictures, strict=True):
            assert torch.equal(row, task.teacher(read(items[place], None)[None])[0])
    assert len(asked) == len(set(asked)) > 4


def test_what_is_computed_once_is_not_of_the_work_that_is_counted_of_a_step(data):
    config = stages.settings(data=data, teacher_view="whole", adversarial=0.0, perceptual=0.0)
    task = Alignment(config, World(0, 1, torch.device("cpu")))
    items = find_items(config)
    task.whole = lambda place: read(items[place], None)
    batch = next(batches(items, config, start=0, rank=0, world=1))
    work = []
    for _ in ("new pictures", "known ones"):
        speed = Speed(torch.device("cpu"), "fp32", len(batch.samples))
        task.prepare(batch)
        with speed.step():
            task.losses("generator", task.modules, batch, 0)
        work.append(speed.flops)
    assert work[0] == work[1] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_stage_killed_between_checkpoints_ends_as_one_that_was_not(data, runs, tmp_path, target):
    killed = runs / f"killed {target}"
    assert [path.name for path in checkpoint.existing(killed)] == ["step-00000010"]
    rows = stages.run(killed, **of_stage(target, data, **TWENTY))
    stages.run(tmp_path / "whole", **of_stage(target, data, **TWENTY))
    assert_same_weights(tmp_path / "whole", killed)
    assert rows[0] == {"resumed": 10} and all(row["hinge"] and row["adversarial"] for row in rows[1:])


@pytest.mark.parametrize("target", TARGETS)
def test_processes_agree_with_one_on_the_joined_batch(data, runs, tmp_path, target):
    rows = stages.run(tmp_path / "one", **of_stage(target, data, **JOINED))
    losses = ("l1", "l2", "vq", "perceptual", "contrastive", "adversarial", "hinge", "consistency")
    for processes in ("2", "4") + (("2 sharded",) if target == "text" else ()):
        many = runs / f"{processes} {target}"
        with open(many / "log.csv") as file:
            log = list(csv.DictReader(file))
        for row, other in zip(rows, log, strict=True):
            for name in (*losses, "perplexity_min", "grad_norm", "adversarial_weight"):
                limit = 1e-3 if name in losses else 5e-3  # gradients cross kinks
                assert float(other[name]) == pytest.approx(row[name], limit, 1e-4), (processes, row["step"], name)
        record = (many / "data.json").read_text()
        assert record == (tmp_path / "one" / "data.json").read_text() and len(json.loads(record)["files"]) == 8


def test_the_teacher_and_the_perceptual_net_learn_nothing(data, tmp_path):
    config = stages.settings(data=data)
    task = Alignment(config, World(0, 1, torch.device("cpu")))
    frozen = {
        f"{part}.{name}": value.clone()
        for part in ("teacher", "perceptual")
        for name, value in getattr(task, part).state_dict().items()
    }
    batch = next(batches(find_items(config), config, start=1, rank=0, world=1))
    optimizers = {phase: task.optimizer(phase) for phase in task.modules}
    for phase, optimizer in optimizers.items():
        torch.stack(list(task.losses(phase, task.modules, batch, 1).values())).sum().backward()
        optimizer.step()
    for name, value in frozen.items():
        part, _, key = name.partition(".")
        assert torch.equal(getattr(task, part).state_dict()[key], value), name


def test_the_generator_phase_leaves_no_gradient_on_the_discriminator(data):
    config = stages.settings(data=data)
    task = Alignment(config, World(0, 1, torch.device("cpu")))
    batch = next(batches(find_items(config), config, start=1, rank=0, world=1))
    terms = task.losses("generator", task.modules, batch, 1)
    assert terms["adversarial"].item() != 0
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in task.modules["discriminator"].parameters())
    unreached = [name for name, p in task.modules["generator"].named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == []


def test_recomputing_activations_changes_no_gradient(data):
    gradients = []
    for checkpointing in (False, True):
        config = stages.settings(data=data, checkpointing=checkpointing, adversarial=0.0, perceptual=0.0)
        task = Alignment(config, World(0, 1, torch.device("cpu")))
        batch = next(batches(find_items(config), config, start=0, rank=0, world=1))
        torch.stack(list(task.losses("generator", task.modules, batch, 0).values())).sum().backward()
        gradients.append({name: p.grad for name, p in task.modules["generator"].named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


def test_half_precision_moves_losses_a_little_and_reaches_neither_quantiser_nor_losses(data):
    losses = {}
    for precision in ("fp32", "bf16"):
        config = stages.settings(data=data, target="text", precision=precision)
        task = Alignment(config, World(0, 1, torch.device("cpu")))
        core, seen = task.modules["generator"].core, []
        core.quantizer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].dtype))
        batch = next(batches(find_items(config), config, start=1, rank=0, world=1))
        losses[precision] = task.losses("generator", task.modules, batch, 1)
        assert seen == [torch.float32]
    for term, value in losses["bf16"].items():
        expected = losses["fp32"][term].item()
        assert value.dtype == torch.float32 and value.item() != expected, term
        if term in ("l1", "l2", "vq", "perceptual"):  # the others hang on which codes are chosen
            assert value.item() == pytest.approx(expected, rel=0.05), term


def test_a_loss_that_is_not_finite_is_told_with_the_names_of_its_pictures(data, tmp_path, capfd):
    (tmp_path / "own.toml").write_text(
        'base = "tiny-stage1"\nperceptual = 0.0\ncontrastive = 0.0\nsize = 32\nbatch = 3\nlog_every = 1\nl1 = 1e39\n'
        "start_patches = 256\nsteps = 2\n"
    )
    arguments = ["train", str(tmp_path / "own.toml"), "--out", str(tmp_path / "out"), f"--data={data}"]
    assert command(arguments) == 1
    said = capfd.readouterr().err.strip().splitlines()[-1]
    found = re.search("step 1: loss l1 is not finite on rank 0; .* samples 0 to 2: (.*)", said)
    assert found and re.fullmatch("([0-7].png#0(, )?){1,3}", found[1]), said
    assert command([*arguments, "--device=cuda:99"]) == 4
    assert "device 'cuda:99'" in capfd.readouterr().err


def test_the_command_trains_and_goes_on(data, tmp_path, capfd):
    (tmp_path / "own.toml").write_text(
        'base = "tiny-stage1"\nperceptual = 0.0\ncontrastive = 0.0\nsize = 32\nbatch = 2\nworkers = 0\nlog_every = 1\n'
        "start_patches = 256\n"
    )
    arguments = ["train", str(tmp_path / "own.toml"), "--out", str(tmp_path / "out"), f"--data={data}", "--steps=2"]
    assert command(arguments) == 0
    assert "step 2" in capfd.readouterr().err
    assert command(arguments) == 0  # nothing to do
    assert "going on from step 2" in capfd.readouterr().err
    assert command([*arguments, "--lr=1"]) == 2
    assert "lr 0.001, now 1.0" in capfd.readouterr().err
    made = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(made)["config"]["lr"] == 0.001  # the run's own, whatever was asked of it since
    assert command([*arguments, "--learning=1"]) == 2
    assert "no setting learning" in capfd.readouterr().err
    assert command([*arguments, f"--init={tmp_path}/out/model.safetensors", "--start="]) == 2
    assert "the weights of --init" in capfd.readouterr().err
    assert command([*arguments, "--lr=1", "--fresh"]) == 0
