"""A scheduler_config.json is read as diffusers writes it: infinite numbers too, which strict JSON does not have."""

from __future__ import annotations

import inspect
import json
import math
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from fastgen.errors import InputError  # noqa: E402
from fastgen.files.jsonfiles import infinity_as_text, infinity_from_text, read_json, write_json  # noqa: E402
from fastgen.generate.pipeline import load  # noqa: E402
from fastgen.models.bundle import read_bundle  # noqa: E402
from fastgen.models.folder import load_model  # noqa: E402
from fastgen.models.saving import save_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
PROMPTS, SEEDS = ["A red dragon with wings.", "A small blue slime."], [0, 5]


def scheduler_classes():
    """diffusers' scheduler classes whose packages are installed and whose arguments all have defaults."""
    found = [getattr(diffusers, name, None) for name in dir(diffusers.schedulers)]
    found = [cls for cls in found if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)]
    found = [cls for cls in found if cls is not diffusers.SchedulerMixin and not hasattr(cls, "_backends")]
    return [cls for cls in found if all(p.default is not p.empty for p in parameters(cls))]


def parameters(cls):
    return [p for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.fixture(scope="module")
def dpm_model(text_model, tmp_path_factory):
    """The text model with DPM-Solver++, saved as its users do."""
    folder = tmp_path_factory.mktemp("dpm") / "model"
    shutil.copytree(text_model, folder)
    (folder / "fastgen.json").unlink()
    config = read_json(text_model / "scheduler" / "scheduler_config.json")
    diffusers.DPMSolverMultistepScheduler.from_config(config).save_pretrained(folder / "scheduler")
    index = read_json(folder / "model_index.json") | {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}
    write_json(folder / "model_index.json", index)
    assert "-Infinity" in (folder / "scheduler" / "scheduler_config.json").read_text()
    return folder


@pytest.fixture(scope="module")
def dpm_label_model(label_model, tmp_path_factory):
    """The label model with the same scheduler: quicker to export."""
    folder = tmp_path_factory.mktemp("dpm") / "labels"
    shutil.copytree(label_model, folder)
    config = read_json(label_model / "scheduler" / "scheduler_config.json")
    diffusers.DPMSolverMultistepScheduler.from_config(config).save_pretrained(folder / "scheduler")
    return folder


def images(pipeline):
    found = pipeline.generate(PROMPTS, seeds=SEEDS, num_inference_steps=6, guidance_scale=3.0)
    return np.stack([np.asarray(image) for image in found]).astype(int)


def test_every_scheduler_class_is_read_as_diffusers_reads_it(tmp_path):
    classes, infinite = scheduler_classes(), []
    assert len(classes) > 30
    for cls in classes:
        folder = tmp_path / cls.__name__
        cls().save_pretrained(folder)
        config = read_json(folder / "scheduler_config.json", infinity=True)
        assert config == cls.load_config(folder), cls.__name__
        infinite += [cls.__name__ for value in config.values() if value in (math.inf, -math.inf)]
        write_json(folder / "scheduler_config.json", config, infinity=True)
        assert cls.load_config(folder) == config
        assert infinity_from_text(json.loads(json.dumps(infinity_as_text(config), allow_nan=False))) == config
    assert "DPMSolverMultistepScheduler" in infinite


def test_a_folder_with_dpm_solver_generates_what_diffusers_own_pipeline_does(dpm_model):
    from fastgen.sampling.noise import normal

    pipeline = load(dpm_model, "eager")
    assert pipeline.spec.sampling.scheduler == "dpmpp-2m"
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(dpm_model, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(normal(SEEDS, 0, pipeline.spec.space.shape))
    expected = theirs(PROMPTS, num_inference_steps=6, guidance_scale=3.0, latents=latents, output_type="np").images
    assert np.abs(images(pipeline) - np.round(255 * expected)).max() <= 1


@pytest.mark.usefixtures("_graphs_once")
def test_it_is_exported_and_read_again_and_its_bundle_json_is_strict(dpm_label_model, export_few, tmp_path):
    export_few(dpm_label_model, tmp_path / "bundle", engines=["ort"])
    json.loads((tmp_path / "bundle" / "bundle.json").read_text(), parse_constant=pytest.fail)
    config = read_bundle(tmp_path / "bundle").spec.scheduler_config
    assert config == load_model(dpm_label_model).scheduler_config
    assert config["lambda_min_clipped"] == -math.inf
    options = {"seeds": SEEDS, "scheduler": "dpmpp-2m", "num_inference_steps": 7}  # which the bundle does not store
    pipelines = load(tmp_path / "bundle", "ort"), load(dpm_label_model, "eager")
    ours, theirs = (np.stack(p.generate(labels=[["red cube"], ["gray sphere"]], **options)) for p in pipelines)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    said = []
    export_few(dpm_label_model, tmp_path / "bundle", engines=["ort"], say=said.append)
    assert "holds these weights already" in said[0]


def test_it_is_saved_again_as_diffusers_reads_it(dpm_model, tmp_path):
    save_model(load_model(dpm_model), tmp_path / "again")
    again = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path / "again" / "scheduler")
    assert again.config.lambda_min_clipped == -math.inf


def test_import_takes_its_schedule(dpm_model, tmp_path):
    from fastgen.models.importing.schedule import choose_schedule

    found = choose_schedule(str(dpm_model), None, latents=True)
    assert found["lambda_min_clipped"] == -math.inf


def test_nan_and_what_is_no_scheduler_config_stay_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"a": -Infinity,\n "b": NaN}')
    with pytest.raises(InputError, match="line 2, column 7: found NaN"):
        read_json(tmp_path / "x.json", infinity=True)
    with pytest.raises(InputError, match="line 1, column 7: found -Infinity"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", {"a": math.inf})
