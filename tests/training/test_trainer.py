from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from fastgen.errors import FastgenError, InputError
from fastgen.models import checkpoints
from fastgen.presets import Training
from fastgen.training import optimizers
from fastgen.training.autocast import choose
from fastgen.training.contrastive import ContrastiveTask
from fastgen.training.diffusion import DiffusionTask, NoiseSchedule
from fastgen.training.draws import Draws, batch_rows
from fastgen.training.ema import Ema
from fastgen.training.logs import TrainingLog
from fastgen.training.optimise import learning_rate
from fastgen.training.optimizers import Muon
from fastgen.training.sources import ClassSource, LabelSource, PixelSpace
from fastgen.training.trainer import TrainingRun, fit

CPU = torch.device("cpu")
RECIPE = Training(
    steps=24,
    batch_size=8,
    learning_rate=1e-2,
    lr_schedule="cosine",
    warmup_steps=3,
    precision="fp32",
    checkpoint_every=8,
    validate_every=8,
)
SCHEDULE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "prediction_type": "v_prediction"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class TinyUNet(nn.Module):
    """(b, 3, 8, 8), (b,), (b, 4) -> (b, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.condition, self.outer = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Linear(5, 8),
            nn.Conv2d(8, 3, 3, padding=1),
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        embedding = self.condition(torch.cat([labels, timesteps[:, None] / 100], dim=1))
        return self.outer(torch.tanh(self.dropout(self.inner(x)) + embedding[:, :, None, None]))


def diffusion_task(dropout_layer: float = 0.1) -> DiffusionTask:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (40, 4)).astype(np.float32)
    noise = rng.integers(0, 56, (40, 8, 8, 3))
    images = (200 * labels[:, None, None, :3] + noise).astype(np.uint8)  # the labels say the colour
    module = TinyUNet()
    module.dropout.p = dropout_layer
    rows = np.arange(30), np.arange(30, 40)
    sources = PixelSpace(images, CPU), LabelSource(labels, CPU)
    return DiffusionTask(module, *sources, SCHEDULE, rows, dropout=0.2, flip=True)


def run_in(folder: Path, job: str = "a", precision: str = "fp32") -> TrainingRun:
    return TrainingRun(
        folder / "checkpoints",
        folder / "previews",
        TrainingLog(folder / "log.jsonl"),
        choose(precision, "cpu"),
        job,
        False,
    )


def trained(
    folder: Path, recipe: Training = RECIPE, task: DiffusionTask | None = None, precision: str = "fp32"
) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    task = task or diffusion_task()
    fit(task, recipe, run_in(folder, precision=precision))
    return task.module.state_dict()


def figures(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if k != "images_per_s"} for row in TrainingLog(folder / "log.jsonl").rows("unet")
    ]


class StopError(Exception):
    pass


class Stopping(DiffusionTask):
    """Is interrupted in the middle of the given step."""

    stop_at = 10**9

    def losses(self, module: nn.Module, rows: np.ndarray, draws: Draws) -> Tensor:
        if draws.step == self.stop_at:
            raise StopError
        return super().losses(module, rows, draws)


def interrupted(folder: Path, step: int) -> None:
    task = diffusion_task()
    task.__class__ = Stopping
    task.stop_at = step  # type: ignore[attr-defined]
    with pytest.raises(StopError):
        trained(folder, task=task)


def test_training_lowers_the_loss_and_the_validation_loss(tmp_path: Path) -> None:
    trained(tmp_path, structs.replace(RECIPE, steps=100))
    rows = figures(tmp_path)
    losses, validation = [r["loss"] for r in rows], [r["validation_loss"] for r in rows if "validation_loss" in r]
    assert losses[-1] < 0.9 * losses[0]
    assert validation[-1] < 0.9 * validation[0]


@pytest.mark.parametrize("stop_at", [5, 8, 13, 23])
def test_an_interrupted_run_that_continues_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, stop_at: int
) -> None:
    whole = trained(tmp_path / "whole")
    interrupted(tmp_path / "parts", stop_at)
    parts = trained(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_a_damaged_last_checkpoint_costs_time_but_not_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trained(tmp_path / "whole")
    interrupted(tmp_path / "parts", 20)
    weights = tmp_path / "parts" / "checkpoints" / "step-000016" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    parts = trained(tmp_path / "parts")
    assert "step-000016: optimizer.safetensors is damaged" in capsys.readouterr().err
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_micro_batches_give_the_same_curve_as_whole_batches(tmp_path: Path) -> None:
    curves = []
    for accumulation in (1, 4):
        folder = tmp_path / str(accumulation)
        trained(
            folder,
            structs.replace(RECIPE, accumulation=accumulation, checkpoint_every=1),
            diffusion_task(dropout_layer=0),
        )
        curves.append([row["loss"] for row in figures(folder)])
    assert len(curves[0]) == RECIPE.steps
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-5)


def test_another_seed_gives_another_curve(tmp_path: Path) -> None:
    trained(tmp_path / "0")
    trained(tmp_path / "1", structs.replace(RECIPE, seed=1))
    assert figures(tmp_path / "0")[0]["loss"] != figures(tmp_path / "1")[0]["loss"]


def test_a_finished_run_is_loaded_without_training(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    task = diffusion_task()
    task.__class__ = Stopping
    task.stop_at = 0  # type: ignore[attr-defined]
    again = trained(tmp_path, task=task)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_loss_that_is_nan_names_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Exploding(DiffusionTask):
        def losses(self, module: nn.Module, rows: np.ndarray, draws: Draws) -> Tensor:
            return super().losses(module, rows, draws) * (math.nan if draws.step == 17 else 1)

    task = diffusion_task()
    task.__class__ = Exploding
    with pytest.raises(FastgenError, match=r"unet: .* at step 18; the last good checkpoint is .*step-000016"):
        trained(tmp_path, task=task)
    assert sorted(f.name for f in (tmp_path / "checkpoints").glob("step-*")) == ["step-000008", "step-000016"]


def test_checkpoints_of_another_job_are_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(InputError, match="belongs to another job"):
        fit(diffusion_task(), RECIPE, run_in(tmp_path, job="b"))


def test_a_loss_over_the_whole_batch_refuses_micro_batches(tmp_path: Path) -> None:
    task = diffusion_task()
    task.splits_batches = False
    with pytest.raises(InputError, match=r"unet\.train\.accumulation = 2: expected 1"):
        fit(task, structs.replace(RECIPE, accumulation=2), run_in(tmp_path))


def test_previews_are_written_at_their_interval_and_the_end(tmp_path: Path) -> None:
    task = diffusion_task()
    task._preview = lambda module: Image.new("RGB", (4, 4))
    trained(tmp_path, structs.replace(RECIPE, preview_every=10), task)
    assert sorted(f.name for f in (tmp_path / "previews").iterdir()) == ["000010.png", "000020.png", "000024.png"]


def test_the_average_equals_torchs_from_the_first_step_on() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    decay = 0.1  # the rising decay of a short run starts here
    ours = Ema(module, decay)
    multi_avg_fn = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    theirs = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=multi_avg_fn)
    theirs.update_parameters(module)
    for step in range(5):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(module, step)
        theirs.update_parameters(module)
    for name, value in theirs.module.named_parameters():
        torch.testing.assert_close(ours.weights[name], value.detach())


def test_the_average_is_swapped_in_only_inside_the_block() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(module, 0.9)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    with ema.swapped_in(module):
        assert torch.equal(module.weight, before)
        assert not module.training
    assert torch.equal(module.weight, before + 1)
    assert module.training


def test_the_learning_rate_is_torchs_cosine_after_a_linear_warm_up() -> None:
    recipe = Training(steps=40, learning_rate=0.5, lr_schedule="cosine")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(40):
        assert learning_rate(recipe, step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
    warm = Training(steps=40, learning_rate=0.5, warmup_steps=5)
    assert [learning_rate(warm, step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])


def test_every_epoch_visits_every_example_once_in_another_order() -> None:
    rows = np.concatenate([batch_rows(10, 4, seed=3, step=step) for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert list(rows[:10]) != list(rows[10:])
    assert list(batch_rows(10, 4, seed=3, step=2)) == list(rows[8:12])


def test_draws_depend_on_seed_step_and_position_alone() -> None:
    whole = Draws(1, 5, np.arange(8), 8, CPU)
    part = Draws(1, 5, np.arange(4, 6), 8, CPU)
    assert torch.equal(whole.normal(0, (3, 2))[4:6], part.normal(0, (3, 2)))
    assert torch.equal(whole.timesteps(1, 1000)[4:6], part.timesteps(1, 1000))
    np.testing.assert_array_equal(whole.uniform(2)[4:6], part.uniform(2))
    for other in (replace(whole, seed=2), replace(whole, step=6), replace(whole, positions=np.arange(1, 9))):
        assert not (other.keys == whole.keys).any()
        assert not torch.equal(other.normal(0, (3, 2)), whole.normal(0, (3, 2)))
    assert not (whole.uniform(2) == whole.uniform(3)).any()


def test_warmup_stable_decay_is_constant_until_its_linear_end() -> None:
    """torch's LinearLR over the last fifth; before it, the rate of a run does not depend on how long it will be."""
    recipe = Training(steps=100, learning_rate=0.5, lr_schedule="warmup-stable-decay", warmup_steps=4)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=1e-9, total_iters=20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    found = [learning_rate(recipe, step) for step in range(100)]
    np.testing.assert_allclose(found[:4], [0.125, 0.25, 0.375, 0.5])
    assert set(found[4:81]) == {0.5}
    np.testing.assert_allclose(found[80:], rates, rtol=1e-6)
    longer = structs.replace(recipe, steps=1000)
    assert [learning_rate(longer, step) for step in range(81)] == found[:81]


def test_shifted_timesteps_are_those_of_the_shifted_range() -> None:
    """Esser et al., 2024, eq. 23: the middle of the range goes to s / (1 + s); 1 changes nothing."""
    draws = Draws(0, 0, np.arange(4000), 4000, CPU)
    plain, shifted = (draws.timesteps(1, 1000, shift).numpy() for shift in (1, 3))
    assert torch.equal(draws.timesteps(1, 1000), draws.timesteps(1, 1000, 1))
    assert np.median(plain) == pytest.approx(500, abs=2)
    assert np.median(shifted) == pytest.approx(750, abs=2)
    assert shifted.min() == 0
    assert shifted.max() == 999
    share = np.sort(plain) / 1000
    np.testing.assert_allclose(np.sort(shifted), 3 * share / (1 + 2 * share) * 1000, atol=4)


def test_draws_are_uniform_and_independent_of_their_neighbours() -> None:
    values = np.concatenate([Draws(0, step, np.arange(64), 64, CPU).uniform(3) for step in range(100)])
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert abs(stats.pearsonr(values[:-1], values[1:]).statistic) < 0.04
    steps = Draws(0, 0, np.arange(50), 50, CPU).timesteps(1, 1000)
    np.testing.assert_array_equal(steps.numpy() // 20, np.arange(50))  # one in each stratum


def test_targets_are_diffusers_own() -> None:
    from diffusers import DDPMScheduler

    task = diffusion_task()
    seen: dict[str, Tensor] = {}

    class Recorder(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            seen.update(x=x, timesteps=timesteps)
            return torch.zeros_like(x)

    rows, draws = np.arange(30, 38), Draws(0, 3, np.arange(8), 8, CPU)
    losses = task.losses(Recorder().eval(), rows, draws)
    scheduler = DDPMScheduler.from_config(SCHEDULE)
    x0, noise = task.space.clean(rows, draws, flip=False), draws.normal(0, (3, 8, 8))
    timesteps = seen["timesteps"].long()
    assert torch.equal(seen["x"], scheduler.add_noise(x0, noise, timesteps))
    velocity = scheduler.get_velocity(x0, noise, timesteps)
    torch.testing.assert_close(losses, velocity.square().mean(dim=(1, 2, 3)))


def test_the_share_of_dropped_conditions_is_the_one_asked_for() -> None:
    labels = LabelSource(np.ones((1, 4), np.float32), CPU)
    draws = Draws(0, 0, np.arange(4000), 4000, CPU)
    (given,) = labels.of(np.zeros(4000, int), draws, 0.25)
    assert set(given.sum(dim=1).tolist()) == {0.0, 4.0}
    assert stats.binomtest(int((given.sum(dim=1) == 0).sum()), 4000, 0.25).pvalue > 1e-3
    assert (labels.of(np.zeros(4000, int), draws, 0.0)[0] == 1).all()


def test_dropped_classes_are_the_class_that_stands_for_none() -> None:
    source = ClassSource(np.array([2, 0, 1]), 3, CPU)
    rows = np.array([0, 1, 2] * 1000)
    (given,) = source.of(rows, Draws(0, 0, np.arange(3000), 3000, CPU), 0.25)
    dropped = given == 3
    assert torch.equal(given[~dropped], torch.from_numpy(source.classes[rows])[~dropped])
    assert stats.binomtest(int(dropped.sum()), 3000, 0.25).pvalue > 1e-3
    (cond,), (uncond,) = source.pair(np.array([0, 2]))
    assert (cond.tolist(), uncond.tolist()) == ([2, 1], [3, 3])


def test_precision_that_a_cpu_lacks_is_refused() -> None:
    with pytest.raises(InputError, match=r"fp16.*needs a GPU"):
        choose("fp16", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA devices"):
            choose("auto", "cuda")


@pytest.mark.parametrize("entries", [2**24, 300], ids=["together", "in several batches"])
def test_muon_is_torchs_muon_for_matrices_and_torchs_adamw_for_the_rest(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    monkeypatch.setattr(optimizers, "BATCH", entries)
    torch.manual_seed(0)
    shapes = [(8, 4, 3, 3), (36, 8), (8, 36), (8, 4, 3, 3), (16, 1, 1, 1), (5, 5), (8,), (3,)]
    values = [torch.randn(shape) for shape in shapes]
    ours, theirs = [nn.Parameter(v.clone()) for v in values], [nn.Parameter(_matrix(v).clone()) for v in values]
    unused = nn.Parameter(torch.ones(8, 36))  # has no gradient
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    muon = Muon([*ours[:6], unused], ours[6:], torch.bfloat16, betas=(0.9, 0.99), **options)
    references = [
        torch.optim.Muon(theirs[:6], momentum=0.95, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(theirs[6:], betas=(0.9, 0.99), **options),
    ]
    for _ in range(5):
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn(our.shape)
            their.grad = _matrix(our.grad).clone()
        muon.step()
        for reference in references:
            reference.step()
    assert torch.equal(unused, torch.ones(8, 36))
    for our, their in zip(ours[:6], theirs, strict=False):
        torch.testing.assert_close(_matrix(our), their, rtol=0, atol=2e-3)  # bf16 products
    for our, their in zip(ours[6:], theirs[6:], strict=True):
        torch.testing.assert_close(our, their)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor


def test_a_muon_run_that_continues_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    recipe = structs.replace(RECIPE, optimizer="muon")
    whole = trained(tmp_path / "whole", recipe)
    task = diffusion_task()
    task.__class__ = Stopping
    task.stop_at = 13  # type: ignore[attr-defined]
    with pytest.raises(StopError):
        trained(tmp_path / "parts", recipe, task)
    parts = trained(tmp_path / "parts", recipe)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_captions_of_one_monster_are_never_negatives() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=18,
        eos_token_id=19,
        pad_token_id=19,
    )
    subjects = np.array([0, 0, 1, 0]), np.array([0, 1, 2, 0])  # (monster, its captions) of four images
    ids = np.full((3, 77), 19)
    ids[:, 0] = 18
    images = np.zeros((4, 32, 32, 3), np.uint8)
    choices = [np.array([0]), np.array([1]), np.array([2]), np.array([0])]
    rows = np.arange(4), np.arange(4)
    task = ContrastiveTask(CLIPTextModel(config), ids, choices, subjects, images, rows, CPU)
    targets = task._targets(np.arange(4))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    same, other_pose, other_monster = targets[0, 3], targets[0, 1], targets[0, 2]
    assert same == targets[0, 0] > other_pose > other_monster == 0
    losses = task.losses(task.module, np.arange(4), Draws(0, 0, np.arange(4), 4, CPU))
    assert losses.shape == (4,)
    assert (losses > 0).all()


def test_every_average_is_kept_in_the_checkpoints_and_equals_a_run_with_that_decay_alone(tmp_path: Path) -> None:
    trained(tmp_path / "both", structs.replace(RECIPE, ema_decay=0.9, further_ema_decays=(0.5, 0.0)))
    trained(tmp_path / "alone", structs.replace(RECIPE, ema_decay=0.5))
    both, alone = (checkpoints.read(tmp_path / n / "checkpoints" / "step-000024") for n in ("both", "alone"))
    assert set(both.parts) == {"model", "ema", "ema-0.5", "optimizer"}  # an average with decay 0 is the model itself
    assert all(torch.equal(value, both.load("ema-0.5")[name]) for name, value in alone.load("ema").items())


def test_without_an_average_the_model_is_the_weights_themselves(tmp_path: Path) -> None:
    weights = trained(tmp_path, structs.replace(RECIPE, ema_decay=0.0))
    last = checkpoints.read(tmp_path / "checkpoints" / "step-000024")
    assert set(last.parts) == {"model", "optimizer"}
    assert all(torch.equal(value, last.load("model")[name]) for name, value in weights.items())


def test_checkpoints_that_a_killed_run_did_not_delete_are_deleted_by_the_next(tmp_path: Path) -> None:
    trained(tmp_path, structs.replace(RECIPE, checkpoint_limit=0))
    folder = tmp_path / "checkpoints"
    assert len(list(folder.glob("step-*"))) > 2
    trained(tmp_path, structs.replace(RECIPE, checkpoint_limit=2))
    assert [f.name for f in sorted(folder.glob("step-*"))] == ["step-000016", "step-000024"]


def test_an_average_that_begins_late_starts_from_the_weights_of_that_epoch(tmp_path: Path) -> None:
    late = structs.replace(RECIPE, ema_decay=0.9, ema_from_epoch=2.2)  # 30 examples, batches of 8: step 8
    trained(tmp_path, structs.replace(late, checkpoint_limit=0))
    first, second = (checkpoints.read(tmp_path / "checkpoints" / f"step-{n:06d}") for n in (8, 16))
    assert all(torch.equal(v, first.load("ema")[name]) for name, v in first.load("model").items())
    assert any(not torch.equal(v, second.load("ema")[name]) for name, v in second.load("model").items())


@pytest.mark.parametrize(("final", "key"), [("best-validation", "validation_loss"), ("best-loss", "loss")])
def test_the_best_weights_are_kept_and_become_the_model(tmp_path: Path, final: str, key: str) -> None:
    class Worsening(DiffusionTask):
        def losses(self, module: nn.Module, rows: np.ndarray, draws: Draws) -> Tensor:
            losses = super().losses(module, rows, draws)
            return 100 - losses if draws.step >= 32 else losses

    task = diffusion_task()
    task.__class__ = Worsening
    recipe = structs.replace(RECIPE, lr_schedule="constant", ema_decay=0.0, steps=48, final=final, checkpoint_limit=0)
    weights = trained(tmp_path, recipe, task)
    best = checkpoints.read(tmp_path / "checkpoints" / "best")
    assert all(torch.equal(value, best.load("ema")[name]) for name, value in weights.items())
    rows = figures(tmp_path)
    assert best.extra["loss"] < min(r[key] for r in rows if r["step"] == 8)
    if key == "validation_loss":
        lowest = min((r for r in rows if key in r), key=lambda r: r[key])
        assert (best.step, best.extra["loss"]) == (lowest["step"], lowest[key])
    assert 16 <= best.step <= 40
    at_best = checkpoints.read(tmp_path / "checkpoints" / f"step-{best.step:06d}")
    assert all(torch.equal(value, at_best.load("model")[name]) for name, value in weights.items())


def test_plateau_lowers_the_rate_as_torchs_scheduler_does(tmp_path: Path) -> None:
    recipe = structs.replace(
        RECIPE, learning_rate=0.3, lr_schedule="plateau", warmup_steps=0, plateau_patience=1, steps=96
    )
    trained(tmp_path, recipe)
    rows = [row for row in figures(tmp_path) if "validation_loss" in row]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1)
    rates = []
    for row in rows:
        rates.append(optimizer.param_groups[0]["lr"])  # what the steps before this validation used
        reference.step(row["validation_loss"])
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    assert min(rates) < 0.3


def test_intervals_in_epochs_fall_on_the_first_step_behind_each(tmp_path: Path) -> None:
    recipe = structs.replace(RECIPE, checkpoint_every=10**6, checkpoint_every_epochs=2, checkpoint_limit=0)
    trained(tmp_path, recipe)  # an epoch is 30 / 8 = 3.75 steps
    found = sorted(f.name for f in (tmp_path / "checkpoints").glob("step-*"))
    assert found == [f"step-{step:06d}" for step in (8, 15, 23, 24)]


def test_a_run_that_branches_off_a_checkpoint_equals_the_run_it_left(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", structs.replace(RECIPE, checkpoint_limit=0))
    run = run_in(tmp_path / "branch", "b")
    run.log.path.parent.mkdir()
    task = diffusion_task()
    at = checkpoints.read(tmp_path / "whole" / "checkpoints" / "step-000008")
    fit(task, RECIPE, replace(run, resume=at))
    assert all(torch.equal(whole[name], value) for name, value in task.module.state_dict().items())
    assert min(row["step"] for row in figures(tmp_path / "branch")) > 8


@pytest.mark.parametrize("step", [8, 24])
def test_a_branch_begins_with_the_best_weights_that_were_found_before_it(tmp_path: Path, step: int) -> None:
    recipe = structs.replace(RECIPE, checkpoint_limit=0, final="best-validation", learning_rate=1e-5)
    trained(tmp_path / "whole", recipe)
    kept = tmp_path / "whole" / "checkpoints"
    best = checkpoints.read(kept / checkpoints.BEST)
    assert best.step == 24  # so nothing is kept of what was the best at step 8
    run = run_in(tmp_path / "branch", "b")
    run.log.path.parent.mkdir()
    task = diffusion_task()
    fit(task, recipe, replace(run, resume=checkpoints.read(kept / f"step-{step:06d}")))
    again = checkpoints.read(run.checkpoints / checkpoints.BEST)
    assert again.step == 24
    assert all(torch.equal(again.load("ema")[name], value) for name, value in best.load("ema").items())
    assert all(torch.equal(again.load("ema")[name], value) for name, value in task.module.state_dict().items())


def test_a_checkpoint_of_another_architecture_is_refused_key_by_key(tmp_path: Path) -> None:
    trained(tmp_path / "a")
    task = diffusion_task()
    task.module.outer = nn.Conv2d(8, 3, 1)
    at = checkpoints.read(tmp_path / "a" / "checkpoints" / "step-000024")
    with pytest.raises(
        InputError, match=r"step-000024: 1 weights do not match this TinyUNet: .*outer\.weight is \(3, 8, 3, 3\)"
    ):
        fit(task, RECIPE, replace(run_in(tmp_path / "b"), resume=at))


class Crowded(DiffusionTask):
    """More than `room` examples at a time do not fit into memory."""

    room = 2

    def losses(self, module: nn.Module, rows: np.ndarray, draws: Draws) -> Tensor:
        losses = super().losses(module, rows, draws)
        if len(rows) > self.room and module.training:
            losses.sum().backward()  # some gradients are there already
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return losses


def test_where_memory_runs_out_micro_batches_halve_and_the_curve_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = diffusion_task(0.0)
    task.__class__ = Crowded
    short = trained(tmp_path / "short", task=task)
    said = capsys.readouterr().err
    assert "out of memory at step 0; going on with micro-batches of 4, accumulation 2" in said
    assert "going on with micro-batches of 2, accumulation 4 (train.accumulation=4 avoids the detour)" in said
    assert said.count("out of memory") == 2
    whole = trained(tmp_path / "whole", task=diffusion_task(0.0))
    assert all(torch.allclose(whole[name], short[name], atol=1e-5) for name in whole)


def test_an_example_that_does_not_fit_alone_is_one_line(tmp_path: Path) -> None:
    task = diffusion_task()
    task.__class__ = Crowded
    task.room = 0  # type: ignore[attr-defined]
    with pytest.raises(FastgenError, match=r"unet: out of memory at step 0, and even one example does not fit"):
        trained(tmp_path, task=task)


@pytest.mark.slow
def test_a_compiled_run_has_the_curve_of_an_eager_one(tmp_path: Path) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        trained(tmp_path / name, structs.replace(RECIPE, steps=10, compile=compiled), diffusion_task(0.0))
    eager, compiled_rows = figures(tmp_path / "eager"), figures(tmp_path / "compiled")
    for key in ("loss", "grad_norm", "validation_loss"):
        curve = [row[key] for row in eager if key in row]
        assert [row[key] for row in compiled_rows if key in row] == pytest.approx(curve, rel=1e-4)


def test_the_curves_are_drawn_beside_the_checkpoints(tmp_path: Path) -> None:
    trained(tmp_path)
    with Image.open(tmp_path / "checkpoints" / "loss.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10  # lines, axes, words


@pytest.mark.parametrize("name", ["gpu", "cuda:x"])
def test_a_device_that_torch_does_not_know_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=f"device: found '{name}', expected cpu, cuda, cuda:1"):
        choose("fp32", name)


@pytest.mark.parametrize("wrong", [{"beta_schedule": "steep"}, {"beta_start": "low"}, {"num_train_timesteps": 0}])
def test_a_noise_schedule_that_diffusers_refuses_is_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="scheduler: ") as raised:
        NoiseSchedule({**SCHEDULE, "prediction_type": "epsilon", **wrong})
    assert "\n" not in str(raised.value)
