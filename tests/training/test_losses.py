"""The terms of the denoising loss: their formulas, when they count, what is refused."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from fastgen.errors import FastgenError, InputError
from fastgen.presets import Training
from fastgen.training.diffusion import DiffusionTask, NoiseSchedule
from fastgen.training.draws import VALIDATION, Draws
from fastgen.training.encode import cached_moments
from fastgen.training.losses import (
    Objective,
    decoder_features,
    feature_distance,
    min_snr_weights,
    moments_kl,
    objective_of,
    refuse_unet_keys,
)
from fastgen.training.sources import LabelSource, LatentSpace, PixelSpace

CPU = torch.device("cpu")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
RECIPE = Training(steps=1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def schedule(prediction_type: str, zero_snr: bool = False, count: int = 100) -> dict[str, Any]:
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": count,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_snr,
        "clip_sample": False,
    }


class FakeLpips(nn.Module):
    """Stands in for the package's class: the squared distance after one frozen convolution, (b, 1, 1, 1)."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "vgg"
        self.conv = nn.Conv2d(3, 4, 3)
        nn.init.constant_(self.conv.weight, 0.1)
        nn.init.zeros_(self.conv.bias)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.conv(a) - self.conv(b)).square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch) -> type[FakeLpips]:
    module = ModuleType("lpips")
    module.LPIPS = FakeLpips  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    return FakeLpips


class Fixed(nn.Module):
    """Predicts the same whatever it is shown; the gradient of its loss is that of the prediction."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.answer = nn.Parameter(torch.randn(shape, generator=generator))

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return self.answer[: len(x)]


def tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.5,
    )
    return vae.eval().requires_grad_(False)


def images(count: int = 8, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def latents(flip: bool = False, jitter: float = 0) -> LatentSpace:
    vae = tiny_vae()
    fields = {"data": "losses", "size": 32}
    return LatentSpace(cached_moments(vae, images(), fields, flip, CPU, False, jitter), images(), vae, CPU)


def task_on(space: Any, prediction_type: str = "epsilon", **options: Any) -> DiffusionTask:
    rows = np.arange(6), np.arange(6, 8)
    labels = LabelSource(np.zeros((8, 2), np.float32), CPU)
    module = Fixed((6, *space.shape))
    zero_snr = options.pop("zero_snr", False)
    config = schedule(prediction_type, zero_snr)
    return DiffusionTask(module, space, labels, config, rows, dropout=0, flip=options.pop("flip", False), **options)


def draws(step: int = 0, positions: np.ndarray | None = None) -> Draws:
    return Draws(3, step, np.arange(6) if positions is None else positions, 6, CPU)


# --- what the prediction implies


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_the_implied_clean_sample_is_diffusers_pred_original_sample(prediction_type: str, name: str) -> None:
    import diffusers

    ours = NoiseSchedule(schedule(prediction_type))
    theirs = getattr(diffusers, name).from_config(schedule(prediction_type))
    theirs.set_timesteps(100)
    x, prediction = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    timesteps = torch.tensor([0, 13, 50, 99])
    found = ours.x0(x, prediction, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        expected = theirs.step(prediction[i : i + 1], t, x[i : i + 1]).pred_original_sample[0]
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_right_prediction_implies_the_clean_sample(prediction_type: str) -> None:
    ours = NoiseSchedule(schedule(prediction_type))
    x0, noise = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8)
    timesteps = torch.tensor([0, 20, 40, 60, 99])
    noisy, target = ours.example(x0, noise, timesteps)
    torch.testing.assert_close(ours.x0(noisy, target, timesteps), x0, rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr_with_noise_prediction_says_what_to_use() -> None:
    with pytest.raises(InputError, match=r'rescale_betas_zero_snr .*use prediction_type = "v_prediction"'):
        NoiseSchedule(schedule("epsilon", zero_snr=True))
    for prediction_type in ("v_prediction", "sample"):
        assert NoiseSchedule(schedule(prediction_type, zero_snr=True)).alphas_cumprod(torch.tensor([99])) == 0


# --- min-SNR


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_are_those_of_diffusers_training_script(prediction_type: str) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler.from_config(schedule(prediction_type, count=1000))
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)
    expected = torch.minimum(snr, torch.full_like(snr, 5.0))
    expected = expected / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(())}[prediction_type]
    found = min_snr_weights(scheduler.alphas_cumprod, 5.0, prediction_type)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_are_finite_at_both_ends(prediction_type: str) -> None:
    assert min_snr_weights(torch.tensor([0.0, 1e-9, 0.5, 1.0]), 5.0, prediction_type).isfinite().all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weighs_the_squared_error_of_training_and_not_of_validation(prediction_type: str) -> None:
    space = PixelSpace(images(size=8), CPU)
    plain = task_on(space, prediction_type)
    weighed = task_on(space, prediction_type, objective=Objective(min_snr_gamma=2.0))
    rows = np.arange(6)
    timesteps = draws().timesteps(1, 100)
    a = plain.schedule.alphas_cumprod(timesteps).double()
    snr = a / (1 - a)
    expected = snr.clamp(max=2) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    before, after = (t.losses(t.module, rows, draws()) for t in (plain, weighed))
    torch.testing.assert_close(after, (before * expected).float(), rtol=1e-4, atol=1e-6)
    both = [t.losses(t.module.eval(), rows, draws(VALIDATION)) for t in (plain, weighed)]
    assert torch.equal(*both)


# --- terms on the clean sample


def test_the_moments_divergence_is_torchs_kl_of_the_normals() -> None:
    from torch.distributions import Normal, kl_divergence

    x = 1.7 * torch.randn(3, 4, 8, 8) + 0.3
    theirs = kl_divergence(Normal(x.mean((2, 3)), x.std((2, 3), correction=0)), Normal(0.0, 1.0)).mean(1)
    torch.testing.assert_close(moments_kl(x), theirs)
    assert moments_kl(torch.zeros(1, 4, 8, 8)).isfinite().all()


def test_decoder_features_are_what_flows_through_the_decoder() -> None:
    vae, z = tiny_vae(), torch.randn(2, 4, 8, 8)
    seen: list[Tensor] = []
    blocks = (vae.decoder.mid_block, *vae.decoder.up_blocks[:2])
    hooks = [block.register_forward_hook(lambda module, given, out: seen.append(out)) for block in blocks]
    vae.decode(z)
    for hook in hooks:
        hook.remove()
    found = decoder_features(vae, z)
    assert len(found) == 3
    for ours, theirs in zip(found, seen, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_feature_distance_is_two_minus_twice_the_cosine() -> None:
    a, b = ([torch.randn(2, c, s, s) for c, s in ((8, 4), (5, 8))] for _ in range(2))
    cosines = [torch.cosine_similarity(x, y, dim=1).mean(dim=(1, 2)) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(feature_distance(a, b), 2 - 2 * torch.stack(cosines).mean(0))
    torch.testing.assert_close(feature_distance(a, [3 * x for x in a]), torch.zeros(2), rtol=0, atol=1e-6)
    assert feature_distance([torch.zeros(1, 8, 4, 4)], [torch.zeros(1, 8, 4, 4)]) == 0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("term", ["lpips", "kl", "latent_perceptual"])
def test_a_term_is_computed_from_the_implied_sample_and_weighed_by_alphas_cumprod(
    lpips: type[FakeLpips], term: str, prediction_type: str
) -> None:
    space = latents(flip=True)
    recipe = replace(RECIPE, loss={"mse": 0, term: 0.25})
    objective = objective_of(recipe, latents=True, image_size=32)
    task = task_on(space, prediction_type, objective=objective, flip=True)
    rows = np.arange(6)
    losses = task.losses(task.module, rows, draws())

    x0, timesteps = space.clean(rows, draws(), flip=True), draws().timesteps(1, 100)
    noisy, _ = task.schedule.example(x0, draws().normal(0, space.shape), timesteps)
    x0_hat = task.schedule.x0(noisy, task.module.answer, timesteps)  # type: ignore[arg-type]
    z = x0_hat / 0.5
    if term == "lpips":
        flipped = draws().integers(2, 2) == 1
        pictures = images()[rows].copy()
        pictures[flipped] = pictures[flipped][:, :, ::-1]
        real = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        expected = lpips("vgg", False)(space.vae.decode(z).sample, real).flatten()
    elif term == "kl":
        expected = moments_kl(x0_hat)
    else:
        expected = feature_distance(decoder_features(space.vae, z), decoder_features(space.vae, x0 / 0.5))
    a = task.schedule.alphas_cumprod(timesteps)
    assert losses.shape == (6,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, 0.25 * a * expected, rtol=1e-4, atol=1e-6)
    losses.sum().backward()
    gradient = task.module.answer.grad
    assert gradient is not None
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None for p in space.vae.parameters())


@pytest.mark.parametrize("term", ["lpips", "kl", "latent_perceptual"])
def test_a_perfect_prediction_costs_nothing_but_the_divergence_of_the_data(lpips: Any, term: str) -> None:
    space = latents()
    objective = objective_of(replace(RECIPE, loss={term: 1.0}), latents=True, image_size=32)
    task = task_on(space, "v_prediction", objective=objective)
    rows, timesteps = np.arange(6), draws().timesteps(1, 100)
    x0 = space.clean(rows, draws())
    _, target = task.schedule.example(x0, draws().normal(0, space.shape), timesteps)
    task.module.answer.data = target
    found = task.losses(task.module, rows, draws())
    a = task.schedule.alphas_cumprod(timesteps)
    assert isinstance(task.objective.lpips, FakeLpips | None)
    if term == "lpips":  # the decoded latents are not the picture itself: the autoencoder's own error is left
        found = found - a * task.objective.lpips(space.decode(x0), space.pictures(rows, draws())).flatten()  # type: ignore
    elif term == "kl":
        found = found - a * moments_kl(x0)
    torch.testing.assert_close(found.detach(), torch.zeros(6), rtol=0, atol=1e-4)


@pytest.mark.parametrize("term", ["mse", "lpips", "kl", "latent_perceptual"])
def test_micro_batches_give_the_same_losses(lpips: Any, term: str) -> None:
    space = latents(flip=True, jitter=0.3)
    objective = objective_of(
        replace(RECIPE, loss={"mse": 0.1, term: 1.0}, min_snr_gamma=5), latents=True, image_size=32
    )
    task = task_on(space, "sample", objective=objective, flip=True, jitter=0.3)
    whole = task.losses(task.module, np.arange(6), draws())
    for part in (np.arange(2), np.arange(2, 6)):
        module = Fixed((6, *space.shape))
        module.answer.data = module.answer.data[part]
        losses = task.losses(module, part, draws(positions=part))
        torch.testing.assert_close(losses, whole[part], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_everything_is_finite_at_zero_terminal_snr_forward_and_backward(lpips: Any, prediction_type: str) -> None:
    recipe = replace(RECIPE, loss={"mse": 1, "lpips": 1, "kl": 1, "latent_perceptual": 1}, min_snr_gamma=5)
    task = task_on(
        latents(), prediction_type, objective=objective_of(recipe, latents=True, image_size=32), zero_snr=True
    )
    last = Draws(0, 0, np.arange(5, 6), 6, CPU)

    class Last(Draws):
        def timesteps(self, stream: int, count: int, shift: float = 1) -> Tensor:
            return torch.full((len(self.positions),), count - 1)

    losses = task.losses(task.module, np.arange(5, 6), Last(**vars(last)))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert task.module.answer.grad.isfinite().all()  # type: ignore[union-attr]


def test_fp16_autocast_does_not_reach_the_decoder(lpips: Any) -> None:
    space = latents()
    objective = objective_of(replace(RECIPE, loss={"lpips": 1.0}), latents=True, image_size=32)
    task, rows = task_on(space, objective=objective), np.arange(6)
    seen: list[torch.dtype] = []
    space.vae.decoder.conv_in.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            task.losses(task.module, rows, draws())
    assert seen == [torch.float32, torch.bfloat16]


# --- when terms count


def test_a_term_counts_from_its_epoch_on_and_validation_stays_comparable(lpips: Any) -> None:
    recipe = replace(RECIPE, loss={"lpips": 0.1, "kl": 0.01}, loss_from_epoch={"lpips": 2, "kl": 3.5})
    objective = objective_of(recipe, latents=True, image_size=32)
    assert objective.active(0) == objective.active(1.99) == {"mse": 1.0}
    assert objective.active(2) == {"mse": 1.0, "lpips": 0.1}
    assert objective.active(3.5) == {"mse": 1.0, "lpips": 0.1, "kl": 0.01}
    task, plain = (task_on(latents(), objective=o) for o in (objective, None))
    rows = np.arange(6)  # one epoch is one step: 6 rows, batches of 6
    for step in (0, 1, 2, VALIDATION):
        ours, theirs = (t.losses(t.module, rows, draws(step)) for t in (task, plain))
        assert torch.equal(ours, theirs) == (step != 2)


def test_the_parts_are_means_since_the_last_call_over_all_processes_and_only_of_terms_that_counted() -> None:
    recipe = replace(RECIPE, loss={"mse": 2.0, "kl": 0.5}, loss_from_epoch={"kl": 1})
    task = task_on(latents(), objective=objective_of(recipe, latents=True, image_size=32))
    rows = np.arange(6)
    alone = float(task.losses(task.module, rows, draws(0)).detach().mean())
    assert task.parts() == {"loss_mse": pytest.approx(alone / 2)}
    totals = []
    for step in (1, 2):
        for positions in (np.arange(3), np.arange(3, 6)):
            totals.append(task.losses(task.module, positions, draws(step, positions)).detach())
    task.losses(task.module.eval(), rows, draws(VALIDATION))
    parts = task.parts()
    assert set(parts) == {"loss_mse", "loss_kl"}
    weighed = 2 * parts["loss_mse"] + 0.5 * parts["loss_kl"]
    assert weighed == pytest.approx(float(torch.cat(totals).mean()), rel=1e-5)
    assert task.parts() == {}
    elsewhere = torch.tensor([[60.0, 6.0], [0.0, 0.0]], dtype=torch.float64)  # another process's sums
    task.losses(task.module, rows, draws(0))
    assert task.parts(lambda sums: sums + elsewhere) == {"loss_mse": pytest.approx((alone / 2 + 10) / 2)}
    plain = task_on(latents())
    plain.losses(plain.module, rows, draws(0))
    assert plain.parts(lambda sums: pytest.fail("nothing to add up")) == {}


# --- what is refused before training


@pytest.mark.parametrize(
    ("loss", "latent", "message"),
    [
        ({"lpip": 0.1}, True, "unknown loss term 'lpip'; did you mean 'lpips'"),
        ({"kl": -1}, True, r"unet\.train\.loss\.kl = -1: expected 0 or more"),
        ({"mse": 0}, True, "no term counts in the first epoch"),
        ({"latent_perceptual": 0.1}, False, r"latent_perceptual = 0\.1: .*this model works on pixels"),
        ({"kl": 0.1}, False, r"kl = 0\.1: .*this model works on pixels"),
    ],
)
def test_an_objective_that_cannot_be_is_one_line(loss: dict[str, float], latent: bool, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        objective_of(replace(RECIPE, loss=loss), latents=latent, image_size=32)
    assert "\n" not in str(raised.value)


def test_an_unknown_term_in_loss_from_epoch_is_named() -> None:
    with pytest.raises(InputError, match="unknown loss term 'lpisp'"):
        objective_of(replace(RECIPE, loss_from_epoch={"lpisp": 3}), latents=True, image_size=32)


def test_lpips_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *rest: Any) -> None:
        if name == "lpips":
            raise ModuleNotFoundError("No module named 'lpips'", name="lpips")

    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.setattr(sys, "meta_path", [type("Gone", (), {"find_spec": staticmethod(missing)}), *sys.meta_path])
    with pytest.raises(InputError) as raised:
        objective_of(replace(RECIPE, loss={"lpips": 0.1}), latents=True, image_size=32)
    assert str(raised.value) == "unet.train.loss.lpips = 0.1 needs the package lpips: pip install lpips"
    assert objective_of(replace(RECIPE, loss={"lpips": 0.0}), latents=True, image_size=32).lpips is None


def test_lpips_that_cannot_load_its_weights_fails_at_the_start(lpips: type[FakeLpips]) -> None:
    def offline(self: Any, net: str, verbose: bool) -> None:
        raise OSError("no connection")

    original, lpips.__init__ = lpips.__init__, offline  # type: ignore[method-assign]
    try:
        with pytest.raises(FastgenError, match=r"weights of LPIPS cannot be loaded: no connection"):
            objective_of(replace(RECIPE, loss={"lpips": 0.1}), latents=True, image_size=32)
    finally:
        lpips.__init__ = original  # type: ignore[method-assign]


def test_images_too_small_for_lpips_are_refused(lpips: Any) -> None:
    with pytest.raises(InputError, match="at least 32 px, not 16"):
        objective_of(replace(RECIPE, loss={"lpips": 0.1}), latents=False, image_size=16)


def test_lpips_is_frozen(lpips: Any) -> None:
    network = objective_of(replace(RECIPE, loss={"lpips": 0.1}), latents=False, image_size=64).lpips
    assert network is not None
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("changes", [{"min_snr_gamma": 5.0}, {"color_jitter": 0.1}, {"loss": {"l1": 1.0}}])
def test_keys_that_another_network_would_ignore_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"text_encoder\.train\..* belongs to unet\.train"):
        refuse_unet_keys(replace(RECIPE, **changes), "text_encoder")
    refuse_unet_keys(replace(RECIPE, loss={"l1": 1.0}), "vae")
