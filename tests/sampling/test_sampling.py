# mypy: disable-error-code="attr-defined, arg-type"
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers_loop import Denoiser, config, run_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgen.sampling.loop as sampling
from fastgen.errors import InputError
from fastgen.sampling.compile import TableCompiler, compile_table
from fastgen.sampling.loop import guide, initial_latents, pack_rows, sample, sample_steps, step, table_rows, take_rows
from fastgen.sampling.noise import normal
from fastgen.sampling.schedulers import make_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SHAPE = (3, 8, 8)
SEEDS = [11, 2**62 + 5]
NO_COND = ()


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fastgen_run(table, network, library="torch", clean=None, **options):
    """The sample of the table's run with the torch network, the loop in the given library."""
    return fastgen_states(table, network, library, clean, **options)[-1]


def fastgen_states(table, network, library="torch", clean=None, **options):
    """The states of that run after each row."""
    if library == "numpy":
        x = initial_latents(table, SEEDS, SHAPE, None if clean is None else clean.numpy())

        def call(sample, timestep):
            return network(torch.from_numpy(sample), torch.from_numpy(timestep)).numpy()

        steps = sample_steps(call, table, x, NO_COND, seeds=SEEDS, **options)
        return [torch.from_numpy(x) for _, x in steps]
    x = initial_latents(table, SEEDS, SHAPE, clean, xp=torch)
    steps = sample_steps(network, table, x, NO_COND, seeds=SEEDS, **options)
    return [x for _, x in steps]


def clean_latents():
    return torch.randn(len(SEEDS), *SHAPE, generator=torch.Generator().manual_seed(5)).clamp(-1, 1)


def assert_same_trajectory(table, scheduler, timesteps, x, *, begin=0, clean=None, library="torch", **step_options):
    """fastgen's states and diffusers' own differ by at most 1e-4 after every row."""
    network = Denoiser(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    theirs: list[torch.Tensor] = []
    ours = fastgen_states(table, network, library, clean)
    final = ours[-1]
    first_stream = int(table.streams[0])
    run_diffusers(
        scheduler, timesteps, network, x, seeds=SEEDS, begin=begin, first_stream=first_stream, trail=theirs,
        **step_options,
    )  # fmt: skip
    assert len(ours) == len(theirs) == len(table)
    assert final.dtype == torch.float32
    for row, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        scale = max(1.0, float(reference.abs().max()))  # Euler's states begin as large as their sigma
        assert float((mine - reference).abs().max()) <= 1e-4 * scale, f"row {row}"
    assert float((final - theirs[-1]).abs().max()) <= 1e-4
    assert 0.05 < float(final.std()) < 5


def full_start(scheduler):
    return torch.from_numpy(normal(SEEDS, 0, SHAPE)) * float(scheduler.init_noise_sigma)


def assert_like_diffusers(scheduler, steps, library="torch", **step_options):
    table = compile_table(scheduler, steps, **step_options)
    scheduler.set_timesteps(steps)
    assert_same_trajectory(
        table, scheduler, scheduler.timesteps, full_start(scheduler), library=library, **step_options
    )  # fmt: skip


# The reference systems' samplers (i-CLEVR: DDPM with a squared cosine; monsters: PNDM, DDIM, DPM-Solver++)
REFERENCE_SYSTEMS = {
    "ddpm-100": (diffusers.DDPMScheduler(**COSINE), 100, {}),
    "ddim-50": (
        diffusers.DDIMScheduler(**SCALED_LINEAR, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        50,
        {},
    ),
    "ddim-50-eta": (diffusers.DDIMScheduler(**SCALED_LINEAR), 50, {"eta": 0.8}),
    "pndm-70": (diffusers.PNDMScheduler(**SCALED_LINEAR), 70, {}),
    "pndm-70-skip": (diffusers.PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True), 70, {}),
    "dpmpp-130": (diffusers.DPMSolverMultistepScheduler(), 130, {}),
    "dpmpp-15": (diffusers.DPMSolverMultistepScheduler(**SCALED_LINEAR), 15, {}),
}


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("name", REFERENCE_SYSTEMS)
def test_reference_systems_sample_as_diffusers_does(name, library):
    scheduler, steps, step_options = REFERENCE_SYSTEMS[name]
    assert_like_diffusers(scheduler, steps, library, **step_options)


@pytest.mark.parametrize("train_steps", [1000, 2000])
def test_the_training_schedule_samples_as_diffusers_does(train_steps):
    assert_like_diffusers(diffusers.DDPMScheduler(num_train_timesteps=train_steps, **COSINE), train_steps)


NAMES = ["ddpm", "ddim", "pndm", "pndm-prk", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-2m-karras", "dpmpp-2s", "unipc", "deis"]
NAMES += ["euler", "euler-ancestral", "heun", "heun-karras", "lcm", "tcd", "sa-solver"]
OWN_SPACING = ("dpmpp-2m-karras", "dpmpp-2s", "heun-karras", "lcm", "tcd")


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    steps=st.integers(8, 30),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    prediction_type=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    betas=st.sampled_from([SCALED_LINEAR, COSINE]),
    clip=st.booleans(),
    library=st.sampled_from(["torch", "numpy"]),
)
def test_any_solver_samples_as_diffusers_does(name, steps, spacing, prediction_type, betas, clip, library):
    if name in ("pndm", "pndm-prk", "euler-ancestral") and prediction_type == "sample":
        prediction_type = "v_prediction"  # they know no other
    if betas is COSINE and (spacing != "leading" or name in OWN_SPACING):
        betas = SCALED_LINEAR  # at timestep 999 a squared cosine's x0 is noise times 20,000: too much for float32
    model = config(prediction_type=prediction_type, clip_sample=clip, **betas)
    scheduler = make_scheduler(name, model, timestep_spacing=None if name == "dpmpp-2s" else spacing)
    assert_like_diffusers(scheduler, steps, library)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp-2m", "unipc", "euler", "euler-ancestral"])
def test_zero_terminal_snr_samples_as_diffusers_does(name):
    model = config(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    assert_like_diffusers(make_scheduler(name, model), 12)


def late_start(scheduler, timestep):
    """Noised by the scheduler itself, which must know where it begins."""
    noise = torch.from_numpy(normal(SEEDS, 0, SHAPE))
    return scheduler.add_noise(clean_latents(), noise, torch.as_tensor(timestep).repeat(len(SEEDS)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name", ["ddpm", "ddim", "dpmpp-2m", "dpmpp-2m-sde", "unipc", "deis", "euler", "heun", "kdpm2"]
)
def test_a_late_start_samples_as_diffusers_begun_late(name, prediction_type):
    scheduler = make_scheduler(name, config(prediction_type=prediction_type, **SCALED_LINEAR))
    table = compile_table(scheduler, 20, 13)
    scheduler.set_timesteps(20)
    begin = 7 * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    timesteps = scheduler.timesteps[begin:]
    x = late_start(scheduler, timesteps[0])
    assert_same_trajectory(table, scheduler, timesteps, x, begin=begin, clean=clean_latents())


@pytest.mark.parametrize(("steps", "noise_steps"), [(70, 60), (20, 13), (20, 4), (20, 20)])
@pytest.mark.parametrize("skip", [True, False])
def test_late_pndm_samples_as_a_fresh_pndm_that_warms_up_there(skip, steps, noise_steps):
    scheduler = diffusers.PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=skip)
    table = compile_table(scheduler, steps, noise_steps)
    scheduler.set_timesteps(steps)
    t = [steps_left * (1000 // steps) for steps_left in reversed(range(noise_steps))]
    if skip:
        rows = [t[0], t[1], *t[1:]]
    else:
        half = 1000 // steps // 2
        warm_up = [[t[i], t[i + 1] + half, t[i + 1] + half, t[i + 1]] for i in range(3)]
        scheduler.prk_timesteps = np.array(warm_up).ravel()
        rows = [*scheduler.prk_timesteps.tolist(), *t[3:]]
    assert_same_trajectory(table, scheduler, torch.tensor(rows), late_start(scheduler, t[0]), clean=clean_latents())


def test_a_late_pndm_run_continues_a_full_one_and_sliced_timesteps_do_not():
    scheduler = diffusers.PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True)
    full, late = compile_table(scheduler, 70), compile_table(scheduler, 70, 60)
    network = Denoiser(scheduler.alphas_cumprod)
    states = fastgen_states(full, network)
    expected = states[-1]
    assert full.timesteps[11] == late.timesteps[0]
    halfway = states[10]
    continued = sample(network, late, halfway, NO_COND, seeds=SEEDS)
    scheduler.set_timesteps(70)
    sliced = run_diffusers(scheduler, scheduler.timesteps[-60:], network, halfway, seeds=SEEDS)
    assert (continued - expected).abs().max() < 0.1 * (sliced - expected).abs().max()


class Gaussian:
    """The exact noise prediction for clean samples from N(0, 0.5^2), and the exact solution of the sampling ODE."""

    def __init__(self, alphas_cumprod):
        self.sigma = np.sqrt(1 - alphas_cumprod)
        self.spread = np.sqrt(0.25 * alphas_cumprod + 1 - alphas_cumprod)

    def __call__(self, x, timestep):
        t = int(timestep[0])
        return np.float32(self.sigma[t] / self.spread[t] ** 2) * x

    def solution(self, x, timestep):
        return x * (self.spread[0] / self.spread[int(timestep)])


@pytest.mark.parametrize("name", ["ddim", "pndm", "pndm-prk", "dpmpp-2m", "unipc", "deis", "heun"])
def test_full_and_late_runs_approach_the_exact_solution(name):
    scheduler = make_scheduler(name, config(clip_sample=False, **SCALED_LINEAR))
    for noise_steps in (None, 60):
        table = compile_table(scheduler, 100, noise_steps)
        clean = None if noise_steps is None else clean_latents().numpy()
        x = initial_latents(table, SEEDS, SHAPE, clean)
        network = Gaussian(scheduler.alphas_cumprod.double().numpy())
        scaled = x * table.scale[0]
        result = sample(network, table, x, NO_COND, seeds=SEEDS)
        assert np.abs(result - network.solution(scaled, table.timesteps[0])).max() < (0.12 if name == "ddim" else 0.05)


# --------------------------------------------------------------------------------------------------------- guidance


class Conditional(Denoiser):
    def __call__(self, sample, timestep, cond=None):
        return super().__call__(sample, timestep, torch.as_tensor(cond))


COND = torch.tensor([[0.4], [-1.0]])
UNCOND = torch.zeros(1, 1)


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "euler-ancestral", "heun"])
def test_guidance_is_what_diffusers_pipelines_do(name):
    scheduler = make_scheduler(name, config(clip_sample=False, **SCALED_LINEAR))
    table = compile_table(scheduler, 10)
    network = Conditional(scheduler.alphas_cumprod)
    x = initial_latents(table, SEEDS, SHAPE, xp=torch)
    ours = sample(network, table, x, (COND,), seeds=SEEDS, guidance_scale=2.0, uncond=(UNCOND,))

    def guided(x, timestep):  # StableDiffusionPipeline.__call__
        prediction = network(torch.cat([x] * 2), timestep, torch.cat([UNCOND.expand(2, 1), COND]))
        noise_pred_uncond, noise_pred_text = prediction.chunk(2)
        return noise_pred_uncond + 2.0 * (noise_pred_text - noise_pred_uncond)

    scheduler.set_timesteps(10)
    theirs = run_diffusers(scheduler, scheduler.timesteps, guided, full_start(scheduler), seeds=SEEDS)
    assert float((ours - theirs).abs().max()) <= 1e-4


def test_guidance_scale_one_runs_the_conditional_rows_only():
    table = TableCompiler(config()).table("ddim:6")
    network = Conditional(diffusers.DDPMScheduler().alphas_cumprod)
    x = initial_latents(table, SEEDS, SHAPE, xp=torch)
    sample(network, table, x, (COND,), seeds=SEEDS, guidance_scale=1.0, uncond=(UNCOND,))
    assert network.calls == [2] * 6


def test_a_guidance_interval_limits_guidance_to_its_rows():
    table = TableCompiler(config()).table("ddim:6")
    network = Conditional(diffusers.DDPMScheduler().alphas_cumprod)
    x = initial_latents(table, SEEDS, SHAPE, xp=torch)
    options = {"seeds": SEEDS, "guidance_scale": 5.0, "uncond": (UNCOND,)}
    states = [x for _, x in sample_steps(network, table, x, (COND,), guidance_interval=(2, 4), **options)]
    limited = states[-1]
    assert network.calls == [2, 2, 4, 4, 2, 2]
    assert torch.equal(
        sample(network, table, x, (COND,), guidance_interval=(0, 6), **options),
        sample(network, table, x, (COND,), **options),
    )
    unguided = [x for _, x in sample_steps(network, table, x, (COND,), seeds=SEEDS)]
    assert torch.equal(states[1], unguided[1])
    assert not torch.allclose(states[2], unguided[2])
    assert not torch.allclose(limited, unguided[-1])


@pytest.mark.parametrize("interval", [(3, 3), (4, 2), (-1, 3), (0, 7)])
def test_an_impossible_guidance_interval_is_an_input_error(interval):
    table = TableCompiler(config()).table("ddim:6")
    with pytest.raises(InputError, match=r"guidance_interval is .*expected 0 <= LO < HI <= 6"):
        fastgen_run(table, Denoiser([0.5] * 1000), guidance_interval=interval)


def test_guidance_without_an_unconditional_row_is_an_input_error():
    table = TableCompiler(config()).table("ddim:2")
    x = initial_latents(table, SEEDS, SHAPE, xp=torch)
    with pytest.raises(InputError, match="needs the unconditional row"):
        sample(None, table, x, (COND,), seeds=SEEDS, guidance_scale=2.0)
    with pytest.raises(InputError, match=r"unconditional row of shape \(3, 1\), expected \(1, 1\)"):
        sample(None, table, x, (COND,), seeds=SEEDS, guidance_scale=2.0, uncond=(torch.zeros(3, 1),))
    with pytest.raises(InputError, match="0 unconditional arrays, expected 1, one for each condition"):
        sample(None, table, x, (COND,), seeds=SEEDS, guidance_scale=2.0, uncond=())


def test_an_unconditional_row_may_be_each_images_own():
    table = TableCompiler(config()).table("ddim:4")
    network = Conditional(diffusers.DDPMScheduler().alphas_cumprod)
    x = initial_latents(table, SEEDS, SHAPE, xp=torch)

    def run(rows, uncond):
        seeds = [SEEDS[i] for i in rows]
        return sample(network, table, x[rows], (COND[rows],), seeds=seeds, guidance_scale=3.0, uncond=(uncond,))

    own = torch.tensor([[0.1], [0.7]])
    together = run([0, 1], own)
    for i in (0, 1):
        torch.testing.assert_close(together[i], run([i], own[i : i + 1])[0])


def test_guide_leaves_the_prediction_alone():
    prediction = np.arange(8, dtype=np.float32).reshape(4, 2)
    np.testing.assert_array_equal(guide(prediction, 2.0), [[8, 9], [10, 11]])
    np.testing.assert_array_equal(prediction, np.arange(8, dtype=np.float32).reshape(4, 2))


# ---------------------------------------------------------------------------------------------- the loop's promises


@pytest.mark.parametrize("key", ["ddpm:12", "pndm-prk:9", "unipc:8", "dpmpp-2m-sde:8", "heun:5"])
def test_numpy_and_torch_run_the_same_loop(key):
    table = TableCompiler(config(**SCALED_LINEAR)).table(key)
    network = Denoiser(diffusers.DDPMScheduler(**SCALED_LINEAR).alphas_cumprod)
    difference = fastgen_run(table, network, "numpy") - fastgen_run(table, network, "torch")
    assert float(difference.abs().max()) <= 1e-5


@pytest.mark.parametrize("key", ["ddpm:12", "dpmpp-2m-sde:8"])
def test_an_image_does_not_depend_on_its_batch(key):
    table = TableCompiler(config()).table(key)

    def network(sample, timestep, cond):
        return np.tanh(sample) * cond[:, :, None, None]

    def run(seeds, cond):
        return sample(network, table, initial_latents(table, seeds, SHAPE), (cond,), seeds=seeds)

    seeds, cond = [5, 9, 2**50], np.array([[0.5], [1.0], [0.1]], np.float32)
    together = run(seeds, cond)
    for j, seed in enumerate(seeds):
        np.testing.assert_array_equal(run([seed], cond[j : j + 1])[0], together[j])


def test_noise_is_drawn_only_for_rows_that_add_it():
    with mock.patch.object(sampling, "normal", wraps=normal) as drawn:
        for key, streams in (("ddim:5", []), ("ddpm:5", [1, 2, 3, 4]), ("dpmpp-2m-sde:3", [1, 2])):
            fastgen_run(TableCompiler(config()).table(key), Denoiser([0.5] * 1000))
            assert [call.args[1] for call in drawn.call_args_list] == [0, *streams]
            drawn.reset_mock()


def test_a_late_run_uses_the_full_schedules_streams():
    with mock.patch.object(sampling, "normal", wraps=normal) as drawn:
        fastgen_run(TableCompiler(config()).table("ddpm:10:4"), Denoiser([0.5] * 1000), clean=clean_latents())
    assert [call.args[1] for call in drawn.call_args_list] == [0, 7, 8, 9]


def test_the_network_gets_float32_timesteps_and_the_state_it_expects():
    table = TableCompiler(config()).table("euler:4")
    seen = []

    def network(sample, timestep):
        seen.append((sample.dtype, timestep.dtype, timestep.shape, float(timestep[0]), float(np.std(sample))))
        return sample * 0

    x = initial_latents(table, range(8), SHAPE)
    sample(network, table, x, (), seeds=range(8))
    assert {(s[0], s[1], s[2]) for s in seen} == {(np.dtype("float32"), np.dtype("float32"), (8,))}
    assert [s[3] for s in seen] == table.timesteps.tolist()
    assert seen[0][4] == pytest.approx(1, abs=0.05)  # the state's sigma is scaled away


@pytest.mark.parametrize("key", ["ddpm:6", "unipc:6", "pndm-prk:6"])
def test_a_step_writes_to_none_of_its_arguments(key):
    rng = np.random.default_rng(0)
    history = ()
    for row in table_rows(TableCompiler(config()).table(key)):
        x, prediction, z = rng.standard_normal((3, 2, *SHAPE), dtype=np.float32)
        arrays = [x, prediction, z, *history]
        copies = [array.copy() for array in arrays]
        _, history = step(x, history, prediction, row, z)
        assert all(np.array_equal(a, b) for a, b in zip(arrays, copies, strict=True))


@pytest.mark.parametrize("library", [np, torch])
@pytest.mark.parametrize("key", ["ddpm:6", "unipc:6", "heun:4", "pndm:5"])
def test_images_at_different_rows_may_share_a_batch(key, library):
    """A request that joins a running batch gets the image that it would have got alone."""
    table = TableCompiler(config(**COSINE)).table(key)
    rows, depth = len(table), table.depth
    packed = pack_rows(table, xp=library)
    zeros = library.zeros((2, *SHAPE), dtype=library.float32)
    history = (zeros,) * (depth - 1)
    seeds = library.asarray(SEEDS, dtype=library.int64)
    start = initial_latents(table, SEEDS, SHAPE, xp=library)
    x = start

    def network(sample, row):
        return library.tanh(sample + row.timestep[:, None, None, None] / 500)

    finished = {}
    for tick in range(rows + 2):  # the second image joins two rows later
        index = library.asarray([min(tick, rows - 1), min(max(tick - 2, 0), rows - 1)])
        row = take_rows(packed, index)
        if tick == 2:
            x = library.stack((x[0], start[1]))
            history = tuple(library.stack((m[0], zeros[1])) for m in history)
        z = normal(seeds, row.stream, SHAPE)
        x, history = step(x, history, network(row.scale * x, row), row, z)
        finished.update({0: x[0]} if tick == rows - 1 else {1: x[1]} if tick == rows + 1 else {})
    alone = sample(
        lambda sample, t: library.tanh(sample + t[:, None, None, None] / 500), table, start, (), seeds=SEEDS
    )  # fmt: skip
    for j in (0, 1):
        np.testing.assert_allclose(np.asarray(finished[j]), np.asarray(alone[j]), atol=2e-5)


def test_initial_latents_are_the_first_stream_scaled():
    table = TableCompiler(config()).table("euler:5")
    np.testing.assert_allclose(
        initial_latents(table, SEEDS, SHAPE), table.init_sigma * normal(SEEDS, 0, SHAPE), rtol=1e-6
    )  # fmt: skip


def test_clean_latents_belong_to_late_starts_and_fit_the_seeds():
    full, late = TableCompiler(config()).table("ddim:5"), TableCompiler(config()).table("ddim:5:3")
    with pytest.raises(InputError, match="solver ddim:5:3: no latents to start from"):
        initial_latents(late, SEEDS, SHAPE)
    with pytest.raises(InputError, match="solver ddim:5: clean latents to start from"):
        initial_latents(full, SEEDS, SHAPE, clean_latents())
    with pytest.raises(InputError, match=r"clean latents of shape \(2, 3, 8, 8\), expected \(3, 3, 8, 8\)"):
        initial_latents(late, [1, 2, 3], SHAPE, clean_latents())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
def test_row_lookup_noise_and_step_compile_to_one_graph():
    table = TableCompiler(config()).table("dpmpp-2m-sde:6")
    packed, zeros, seeds = pack_rows(table, xp=torch), torch.zeros(2, *SHAPE), torch.tensor(SEEDS)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def looked_up(index, x, history, prediction):
        row = take_rows(packed, index)
        return step(x, history, prediction, row, normal(seeds, row.stream, SHAPE))

    compiled = torch.compile(looked_up, backend=count, fullgraph=True)
    for index in (torch.tensor([0, 3]), torch.tensor([5, 1])):
        x, prediction = torch.randn(2, 2, *SHAPE)
        torch.testing.assert_close(
            compiled(index, x, (zeros,), prediction), looked_up(index, x, (zeros,), prediction)
        )  # fmt: skip
    assert len(graphs) == 1
