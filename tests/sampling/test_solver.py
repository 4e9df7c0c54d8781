# mypy: disable-error-code="attr-defined, misc"
import json
import subprocess
import sys
import zipfile
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers_loop import config, run_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgen.sampling.compile as solver
from fastgen.errors import InputError
from fastgen.files.installing import hint
from fastgen.sampling.compile import TableCompiler, compile_table
from fastgen.sampling.loop import step, table_rows
from fastgen.sampling.noise import normal
from fastgen.sampling.schedulers import SOLVERS, default_name, make_scheduler
from fastgen.sampling.tables import TableStore, format_key, nearest_key, parse_key, save_tables

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore:.*algorithm_type:FutureWarning")
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SEEDS = [3, 1]
# these schedulers round the state to float32 in every step
FLOAT32 = ("dpmpp-2m", "dpmpp-3m", "dpmpp-2m-sde", "euler", "euler-ancestral")


def error_on_random_vectors(table, scheduler, timesteps, begin=0, **step_options):
    """Largest relative error of a table against step(), over a run on predictions that are random float64 vectors."""
    generator = torch.Generator().manual_seed(1)
    predictions = torch.randn(len(timesteps), len(SEEDS), 1, 8, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(len(SEEDS), 1, 8, 8, generator=generator, dtype=torch.float64) * table.init_sigma
    x, feed = x.numpy(), iter(predictions)
    expected: list[torch.Tensor] = []
    run_diffusers(
        scheduler, timesteps, lambda *_: next(feed), torch.from_numpy(x), seeds=SEEDS, begin=begin,
        first_stream=int(table.streams[0]), trail=expected, **step_options,
    )  # fmt: skip
    history, worst = (), 0.0
    for row, prediction, reference in zip(table_rows(table), predictions.numpy(), expected, strict=True):
        z = normal(SEEDS, row.stream, x.shape[1:]).astype(np.float64)
        scale = max(np.abs(x).max(), np.abs(prediction).max(), np.abs(reference.numpy()).max())
        x, history = step(x, history, prediction, row, z)
        worst = max(worst, np.abs(x - reference.numpy()).max() / scale)
        x = reference.numpy()
    return worst


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(sorted(set(SOLVERS) - {"flow-match-euler", "kdpm2", "kdpm2-ancestral", "lms"})),
    steps=st.integers(1, 40),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    prediction_type=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    betas=st.sampled_from([SCALED_LINEAR, COSINE, {}]),
    clip=st.booleans(),
)
def test_a_table_is_what_step_does(name, steps, spacing, prediction_type, betas, clip):
    model = config(prediction_type=prediction_type, clip_sample=clip, **betas)
    refuses_sample = ("pndm", "pndm-prk", "euler-ancestral")
    if name in ("heun", "euler-ancestral") and betas is COSINE:
        spacing = (
            "leading"  # at timestep 999 sigma is 20,000: Heun loses digits, Euler ancestral's step is not a number
        )
    scheduler = make_scheduler(name, model, timestep_spacing=None if name == "dpmpp-2s" else spacing)
    if (prediction_type == "sample" and name in refuses_sample) or (name == "pndm-prk" and steps < 4):
        with pytest.raises(InputError, match=name):
            compile_table(scheduler, steps, name=name)
        return
    table = compile_table(scheduler, steps, name=name)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    tolerance = 5e-6 if name in FLOAT32 else 1e-10
    assert error_on_random_vectors(table, scheduler, scheduler.timesteps) < tolerance


@pytest.mark.parametrize("name", ["kdpm2", "kdpm2-ancestral", "lms", "dpmpp-2m-karras", "euler-karras", "unipc-karras"])
def test_a_table_is_what_step_does_for_the_other_names(name):
    scheduler = make_scheduler(name, config(clip_sample=False))
    table = compile_table(scheduler, 9, name=name)
    scheduler.set_timesteps(9)
    assert error_on_random_vectors(table, scheduler, scheduler.timesteps) < 5e-6


@pytest.mark.parametrize(
    ("cls", "options", "step_options"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {}),
        (diffusers.FlowMatchHeunDiscreteScheduler, {}, {}),
        (diffusers.EDMEulerScheduler, {}, {}),
        (diffusers.EDMDPMSolverMultistepScheduler, {}, {}),
        (diffusers.UnCLIPScheduler, {}, {}),
        (diffusers.EulerDiscreteScheduler, {}, {"s_churn": 0.5}),
        (diffusers.DDIMScheduler, COSINE, {"eta": 0.7}),
        (diffusers.DDIMScheduler, {}, {"eta": 1.0, "use_clipped_model_output": True}),
        (diffusers.TCDScheduler, {}, {"eta": 0.0}),
        (diffusers.DPMSolverMultistepScheduler, {"use_lu_lambdas": True, "solver_order": 3}, {}),
        (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
        (
            diffusers.UniPCMultistepScheduler,
            {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
            {},
        ),
        (diffusers.UniPCMultistepScheduler, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
        (diffusers.DDPMScheduler, {"variance_type": "fixed_large"}, {}),
        (diffusers.DDPMScheduler, {"clip_sample_range": 2.5}, {}),
    ],
)
def test_other_schedulers_and_options_become_tables(cls, options, step_options):
    scheduler = cls(**options)
    table = compile_table(scheduler, 12, **step_options)
    scheduler.set_timesteps(12)
    assert error_on_random_vectors(table, scheduler, scheduler.timesteps, **step_options) < 5e-6


@pytest.mark.parametrize("clip", [False, True])
def test_zero_terminal_snr_becomes_a_table(clip):
    model = config(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=clip
    )
    for name in ("ddpm", "ddim", "dpmpp-2m", "unipc", "euler"):
        scheduler = make_scheduler(name, model)
        table = compile_table(scheduler, 10, name=name)
        scheduler.set_timesteps(10)
        assert error_on_random_vectors(table, scheduler, scheduler.timesteps) < 5e-6


@pytest.mark.parametrize("name", ["ddpm", "dpmpp-2m", "dpmpp-2m-sde", "unipc", "deis", "euler-ancestral", "lcm"])
def test_a_late_table_is_a_scheduler_that_begins_late(name):
    scheduler = make_scheduler(name, config(clip_sample=False, **SCALED_LINEAR))
    table = compile_table(scheduler, 20, 8, name=name)
    scheduler.set_timesteps(20)
    assert table.streams.tolist() == list(range(13, 21))
    assert error_on_random_vectors(table, scheduler, scheduler.timesteps[12:], begin=12) < 5e-6


@pytest.mark.parametrize("name", ["heun", "kdpm2", "kdpm2-ancestral"])
def test_a_late_second_order_table_begins_at_a_whole_step(name):
    scheduler = make_scheduler(name, config(clip_sample=False, **SCALED_LINEAR))
    table = compile_table(scheduler, 20, 8, name=name)
    scheduler.set_timesteps(20)
    assert len(table) == 15
    assert table.streams.tolist() == list(range(25, 40))
    assert error_on_random_vectors(table, scheduler, scheduler.timesteps[24:], begin=24) < 1e-10


def test_late_pndm_tables_have_a_warm_up_of_their_own():
    model = config(**SCALED_LINEAR)  # 1000 training steps: 50 steps are 20 apart
    plain = TableCompiler(model).table("pndm:50:5")
    assert plain.timesteps.tolist() == [80, 60, 60, 40, 20, 0]
    warm_up = [80, 70, 70, 60, 60, 50, 50, 40, 40, 30, 30, 20]
    runge_kutta = TableCompiler(model).table("pndm-prk:50:5")
    assert runge_kutta.timesteps.tolist() == [*warm_up, 20, 0]
    assert (len(TableCompiler(model).table("pndm-prk:70")), len(TableCompiler(model).table("pndm-prk:70:60"))) == (
        79,
        69,
    )
    assert (len(TableCompiler(model).table("pndm:70")), len(TableCompiler(model).table("pndm:70:60"))) == (71, 61)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm", "pndm-prk", "dpmpp-2m", "dpmpp-2s", "unipc", "heun", "deis"])
@pytest.mark.parametrize("noise_steps", [4, 7, 20])
def test_a_late_start_begins_where_add_noise_puts_it(name, noise_steps):
    scheduler = make_scheduler(name, config(**SCALED_LINEAR))
    table = compile_table(scheduler, 20, noise_steps, name=name)
    timestep = torch.tensor([int(table.timesteps[0])])
    clean, noise = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha_squared = scheduler.alphas_cumprod[timestep].item()
    if name == "heun":  # its state is scaled to alpha = 1
        assert table.init_alpha == 1.0
        assert table.init_sigma == pytest.approx(np.sqrt((1 - alpha_squared) / alpha_squared), rel=1e-6)
    else:
        reference = diffusers.DDPMScheduler(**SCALED_LINEAR).add_noise(clean, noise, timestep)
        torch.testing.assert_close(table.init_alpha * clean + table.init_sigma * noise, reference)


def test_full_starts_are_pure_noise_of_the_schedulers_scale():
    for name in ("ddim", "pndm", "unipc", "euler", "heun"):
        scheduler = make_scheduler(name, config())
        table = compile_table(scheduler, 10, name=name)
        scheduler.set_timesteps(10)
        assert table.init_alpha == 0.0
        assert table.init_sigma == pytest.approx(float(scheduler.init_noise_sigma))


def test_history_is_as_deep_as_the_solver_and_no_deeper():
    depths = {"ddpm": 1, "ddim": 1, "euler": 1, "dpmpp-2m": 2, "heun": 2, "unipc": 3, "pndm": 5, "pndm-prk": 13}
    model = config(clip_sample=False)
    assert {name: TableCompiler(model).table(f"{name}:30").depth for name in depths} == depths


def test_clipping_is_a_term_only_where_the_scheduler_clips():
    assert TableCompiler(config(clip_sample=True, clip_sample_range=0.7)).table("ddpm:10").clip == 0.7
    assert TableCompiler(config(clip_sample=False)).table("ddpm:10").clip is None
    assert TableCompiler(config(clip_sample=True)).table("tcd:4").clip is None  # takes the option and ignores it


def test_compiling_leaves_the_scheduler_and_the_module_alone():
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(7)
    before, module = dict(vars(scheduler)), sys.modules[diffusers.DDPMScheduler.__module__]
    randn_tensor = module.randn_tensor
    compile_table(scheduler, 20, 5)
    with pytest.raises(InputError):
        compile_table(scheduler, 20, eta=1.0)  # step() raises TypeError in the middle of the probe
    assert module.randn_tensor is randn_tensor
    assert vars(scheduler).keys() == before.keys()
    assert scheduler.config.clip_sample_range == 1.0
    assert scheduler.num_inference_steps == 7


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"flow-match-euler"}))
def test_every_name_keeps_the_models_noise_schedule(name):
    model = config(beta_start=0.0003, beta_end=0.017, num_train_timesteps=400, prediction_type="v_prediction")
    scheduler = make_scheduler(name, model)
    expected = diffusers.DDPMScheduler(beta_start=0.0003, beta_end=0.017, num_train_timesteps=400).alphas_cumprod
    assert scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(scheduler.alphas_cumprod, expected, rtol=0, atol=0)


def test_betas_left_at_the_models_defaults_do_not_become_another_classs_defaults():
    model = {"_class_name": "DDPMScheduler"}  # as a config that states nothing
    scheduler = make_scheduler("heun", model)
    torch.testing.assert_close(scheduler.alphas_cumprod, diffusers.DDPMScheduler().alphas_cumprod, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*SOLVERS, "dpmpp-2m-karras", "heun-karras"])
def test_default_name_finds_the_name_of_a_schedulers_config(name):
    base = {"_class_name": "FlowMatchEulerDiscreteScheduler"} if name == "flow-match-euler" else config()
    assert default_name(json.loads(make_scheduler(name, base).to_json_string())) == name


def test_default_name_of_a_class_without_a_name_is_the_class():
    assert default_name({"_class_name": "EDMEulerScheduler"}) == "EDMEulerScheduler"
    assert default_name({"_class_name": "PNDMScheduler"}) == "pndm-prk"


def test_timestep_spacing_can_be_overridden():
    assert compile_table(make_scheduler("ddim", config(), timestep_spacing="trailing"), 4).timesteps[0] == 999
    with pytest.raises(InputError, match=r"DDIMScheduler at 4 steps: .*sideways"):
        compile_table(make_scheduler("ddim", config(), timestep_spacing="sideways"), 4)
    with pytest.raises(InputError, match="DPMSolverSinglestepScheduler has no option timestep_spacing"):
        make_scheduler("dpmpp-2s", config(), timestep_spacing="leading")


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("ddimm", config(), "unknown scheduler 'ddimm'; did you mean 'ddim'"),
        ("AutoencoderKL", config(), "unknown scheduler 'AutoencoderKL'"),
        ("ddim-karras", config(), "DDIMScheduler has no option use_karras_sigmas"),
        ("euler", {}, "_class_name is None"),
        ("euler", {"_class_name": "Nope"}, "_class_name is 'Nope'"),
        ("euler", config(diffusers.FlowMatchEulerDiscreteScheduler), "trained with flow matching"),
        ("flow-match-euler", config(), "trained with diffusion"),
        ("pndm", config(rescale_betas_zero_snr=True), "PNDMScheduler has no rescale_betas_zero_snr"),
        ("pndm", config(beta_schedule="sigmoid"), "PNDMScheduler refuses.*sigmoid"),
    ],
)
def test_a_scheduler_that_cannot_be_made_is_an_input_error(name, model, message):
    with pytest.raises(InputError, match=message):
        make_scheduler(name, model)


def test_a_scheduler_with_a_missing_package_says_which():
    if not hasattr(diffusers.DPMSolverSDEScheduler, "_backends"):
        pytest.skip("torchsde is installed")
    with pytest.raises(InputError, match=r"DPMSolverSDEScheduler needs .*torchsde"):
        make_scheduler("DPMSolverSDEScheduler", config())


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("ddim:20", {"thresholding": True}, "solver ddim .*thresholding=True"),
        (
            "ddim:10",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "not finite at timestep 999; a zero terminal SNR",
        ),
        ("ddim:61", {"timestep_spacing": "trailing"}, "ends at timestep -1"),
        ("ddim:1001", {}, "1001 inference steps, expected 1 to 1000"),
        ("pndm-prk:3", {}, "no room for the Runge-Kutta warm-up"),
        ("pndm-prk:20:3", {}, "no room for the Runge-Kutta warm-up"),
        ("lms:20:5", {}, "cannot start late"),
        ("pndm:20", {"prediction_type": "sample"}, "solver pndm .*prediction_type"),
    ],
)
def test_what_cannot_become_a_table_is_an_input_error(key, options, message):
    with pytest.raises(InputError, match=message) as caught:
        TableCompiler(config(**options)).table(key)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("noise_steps", [0, -1, 21])
def test_noise_steps_out_of_range_are_an_input_error(noise_steps):
    with pytest.raises(InputError, match="noise steps, expected 1 to 20"):
        compile_table(diffusers.DDIMScheduler(), 20, noise_steps)


def test_a_scheduler_that_is_not_linear_is_an_input_error():
    class Squares(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, **options):
            return super().step(model_output**2, timestep, sample, **options)

    with pytest.raises(InputError, match="Squares at 5 steps: not linear"):
        compile_table(Squares(clip_sample=False), 5)


@given(
    name=st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,20}", fullmatch=True), steps=st.integers(1, 5000), late=st.booleans()
)
def test_keys_round_trip(name, steps, late):
    key = (name, steps, max(1, steps // 2) if late else None)
    assert parse_key(format_key(*key)) == key


@pytest.mark.parametrize(
    "key", ["ddim", "ddim:", "ddim:x", "ddim:0", "ddim:5:0", "ddim:5:6", ":5", "a:1:1:1", "a:-3", ""]
)
def test_a_malformed_key_is_an_input_error(key):
    with pytest.raises(InputError, match="solver"):
        parse_key(key)


def test_nearest_key_prefers_the_solver_then_the_start_then_the_steps():
    keys = ["ddim:10", "ddim:50", "ddim:50:30", "pndm:52", "unipc:20"]
    assert nearest_key("ddim:52", keys) == "ddim:50"
    assert nearest_key("ddim:52:20", keys) == "ddim:50:30"
    assert nearest_key("ddjm:12", keys) == "ddim:10"
    assert nearest_key("ddim:12", []) is None


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "solvers.npz"
    model = config()
    tables = {
        key: TableCompiler(model).table(key) for key in ("ddpm:12", "pndm-prk:9", "pndm-prk:9:5", "heun:6:2", "euler:3")
    }
    save_tables(path, tables)
    return path, tables


def test_stored_tables_come_back_bit_for_bit(stored):
    path, tables = stored
    store = TableStore(path)
    assert store.names() == list(tables)
    for key, table in tables.items():
        loaded = store.get(key)
        assert key in store
        assert loaded.key == key
        for field, value in vars(table).items():
            assert np.array_equal(getattr(loaded, field), value), (key, field)
            assert getattr(getattr(loaded, field), "dtype", None) == getattr(value, "dtype", None), field


def test_a_table_that_is_not_stored_is_an_error_that_names_the_nearest(stored):
    with pytest.raises(InputError, match=r"pndm-prk:10:4 is not stored .*\(nearest: pndm-prk:9:5\)"):
        TableStore(stored[0]).get("pndm-prk:10:4")


def test_a_damaged_file_is_an_input_error(stored, tmp_path):
    broken = tmp_path / "solvers.npz"
    broken.write_bytes(stored[0].read_bytes()[:300])
    with pytest.raises(InputError, match=r"solvers\.npz: is no \.npz file: .*; export the bundle again"):
        TableStore(broken)
    with pytest.raises(InputError, match=r"missing\.npz: no such file"):
        TableStore(tmp_path / "missing.npz")
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("index.npy", b"not an array")
    with pytest.raises(InputError, match=r"solvers\.npz: index: found another kind of array"):
        TableStore(broken)


def test_writing_tables_leaves_no_temporary_file(stored):
    assert [path.name for path in stored[0].parent.iterdir()] == ["solvers.npz"]


def test_stored_tables_need_neither_torch_nor_diffusers(stored):
    script = f"""
import sys
class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "diffusers", "scipy"):
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Missing())
import numpy as np
from fastgen.sampling.loop import initial_latents, sample
from fastgen.sampling.compile import TableCompiler
from fastgen.sampling.tables import TableStore
table = TableStore({str(stored[0])!r}).get("ddpm:12")
x = initial_latents(table, [1, 2], (3, 8, 8))
x = sample(lambda x, t: x, table, x, (), seeds=[1, 2])
assert x.shape == (2, 3, 8, 8) and x.dtype == np.float32
try:
    TableCompiler({{"_class_name": "DDPMScheduler"}}).table("ddpm:12")
except Exception as error:
    print(type(error).__name__, error)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.startswith("InputError")
    assert hint("train") in output


def test_common_tables_hold_the_training_schedule_the_models_own_solver_and_report_what_is_skipped():
    skipped: dict[str, InputError] = {}
    model = config(diffusers.LCMScheduler, num_train_timesteps=200)
    with mock.patch.object(solver, "COMMON_STEPS", (1, 4, 60)):
        tables = dict(TableCompiler(model).common(skipped.__setitem__))
    assert {"ddpm:200", "lcm:4", "ddim:1", "heun:60", "unipc:4", "pndm-prk:4"} <= set(tables)
    assert set(skipped) == {"pndm-prk:1", "lcm:60"}
    assert all(isinstance(error, InputError) for error in skipped.values())
    assert all(table.key == key for key, table in tables.items())


@pytest.mark.slow
def test_all_common_tables_compile_and_stay_small(tmp_path):
    skipped: dict[str, InputError] = {}
    tables = dict(TableCompiler(config(**COSINE)).common(skipped.__setitem__))
    assert set(skipped) == {"pndm-prk:1", "pndm-prk:2", "pndm-prk:3"}
    assert len(tables) == 11 * 60 + 1 - len(skipped)
    save_tables(tmp_path / "solvers.npz", tables)
    assert (tmp_path / "solvers.npz").stat().st_size < 2e6
