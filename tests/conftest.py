"""Tiny models of both families with random weights, their bundles (exported once), and the `fastgen` command."""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from filelock import FileLock
from gpu_needs import lacking
from solver_steps import TABLE_STEPS

REPO = Path(__file__).parents[1]
PROMPTS = [
    "A red dragon with wings and horns. The monster is idling.",
    "A small blue slime with one big eye.",
    "Green robot with a sword and a shield. The monster is attacking.",
    "Purple insect with many legs and big teeth.",
    "A red dragon with wings and horns. The monster is dying.",
]
LABELS = [["gray cube"], ["red cube", "blue sphere"], ["green cylinder"], ["yellow cube", "cyan sphere", "brown cube"]]
LONG_FILES = (  # with their slow tests; in this order
    "test_scripts.py",
    "test_company.py",
    "test_soak.py",
    "test_compiling.py",
    "test_hostile_kills.py",
    "test_ray_cluster.py",
    "test_ray_serve.py",
    "test_trt_rtx_real.py",
    "test_compile.py",
    "test_presets.py",
    "test_gallery.py",
    "test_served_gallery.py",
    "test_serving_benchmark.py",
    "test_page_browser.py",
    "test_slow_clients.py",
    "test_service.py",
    "test_eight_bits_gpu.py",
    "test_int8.py",
)
BLOCKER = """
import os
from importlib.machinery import PathFinder

blocked, find_spec = os.environ["BLOCKED_IMPORTS"].split(), PathFinder.find_spec
PathFinder.find_spec = lambda name, *a, **k: None if name.partition(".")[0] in blocked else find_spec(name, *a, **k)
"""


def pytest_collection_modifyitems(items):
    """The longest files first, for a scheduler that gives files out in this order. Of the attacks in tests/hostile, which are
    thousands, every fourth row is run by bin/test, and all are by .ci/run."""
    places = {name: i for i, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    attacks = [item for item in items if hasattr(item, "callspec") and "fork_server" in item.fixturenames]
    for i, item in enumerate(attacks):
        if i % 4:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """A cache of the tests' own, and one thread for everything that tests start."""
    saved = dict(os.environ)
    os.environ |= {"FASTGEN_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process compiles fastgen's sources again
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    """Ctrl-C interrupts tests and what they start, also where a shell began them in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """(name, fill) -> folder of that name after `fill(folder)`, which one process of pytest-xdist does for all of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, fill: Callable[[Path], object]) -> Path:
        folder = root / "once" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                try:
                    fill(folder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        return folder

    return get


@pytest.fixture(scope="session")
def text_model(once) -> Path:
    """A text-to-latent model folder: 4x8x8 latents, 32 px images."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from fastgen.models.folder import Model
    from fastgen.models.saving import save_model
    from fastgen.sampling.defaults import Sampling
    from fastgen.training.bpe import train_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(PROMPTS * 2, vocab_size=600)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,  # heads, in diffusers: of 8 channels, whose scale 1 / sqrt(8) is no exact number
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
    )
    schedule = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    model = Model(None, unet.eval(), schedule, Sampling("ddim", 5, 3.0))
    model.text_encoders, model.tokenizers, model.vae = [text_encoder.eval()], [tokenizer], vae.eval()
    return once("models-text/text", partial(save_model, model))


@pytest.fixture(scope="session")
def label_model(once) -> Path:
    """A label-to-pixels model folder: the 24 objects of i-CLEVR, 16 px images."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers import UNet2DModel

    from fastgen.files.names import ICLEVR_OBJECTS
    from fastgen.models.folder import LabelConditioner, Model
    from fastgen.models.saving import save_model
    from fastgen.sampling.defaults import Sampling

    torch.set_num_threads(1)
    torch.manual_seed(1)
    unet: Any = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        class_embed_type="identity",
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    conditioner = LabelConditioner("class_embed", 24, 32)
    schedule = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "clip_sample": True,
    }
    model = Model(None, unet.eval(), schedule, Sampling("ddpm", 5, 1.5), conditioner.eval(), dict(ICLEVR_OBJECTS))
    return once("models-labels/labels", partial(save_model, model))


@pytest.fixture(scope="session")
def export_few() -> Callable[..., Any]:
    """`export.export` that stores solver tables at a few numbers of steps, for speed."""
    pytest.importorskip("onnxscript")
    from export import export

    logging.getLogger("torch.__trace").propagate = False  # pages of it would be shown beside a failed test

    def run(model: Path, out: Path, **options: Any) -> Any:
        with mock.patch("fastgen.sampling.compile.COMMON_STEPS", TABLE_STEPS):
            return export(model, out, **options)

    return run


@pytest.fixture(scope="session")
def graph_once(once) -> Callable[..., None]:
    """`export_onnx` that traces the same network once in a session, and copies its graph from then on, see traces.py."""
    pytest.importorskip("onnxscript")
    from traces import copying

    from export.onnx import export_onnx

    return copying(export_onnx, lambda name, fill: once(f"graphs/{name}", fill))


@pytest.fixture
def _graphs_once(graph_once, monkeypatch) -> None:
    """For tests that export models whose graphs other tests look at."""
    monkeypatch.setattr("export.onnx.export_onnx", graph_once)


@pytest.fixture(scope="session")
def exports(text_model, label_model, export_few, graph_once, once) -> Callable[[str], tuple[Path, list[Any]]]:
    """kind ("text", "labels") -> (bundle folder, certificates of ort and openvino); each exported when first asked for."""
    models = {"text": text_model, "labels": label_model}

    def get(kind: str) -> tuple[Path, list[Any]]:
        def fill(folder: Path) -> None:
            with mock.patch("export.onnx.export_onnx", graph_once):
                certificates = export_few(models[kind], folder / "bundle")
            (folder / "certificates").write_bytes(pickle.dumps(certificates))

        folder = once(f"export-{kind}", fill)
        return folder / "bundle", pickle.loads((folder / "certificates").read_bytes())

    return get


@pytest.fixture(scope="session")
def lowered_bundle(exports, text_model, label_model, export_few, graph_once, once) -> Callable[[str, str], Path]:
    """(kind, dtype) -> a copy of the bundle of that kind to which `--dtype` added its graphs."""
    models = {"text": text_model, "labels": label_model}

    def get(kind: str, dtype: str) -> Path:
        def fill(folder: Path) -> None:
            shutil.copytree(exports(kind)[0], folder)
            with mock.patch("export.onnx.export_onnx", graph_once):
                export_few(models[kind], folder, dtype=dtype, engines=["ort"])

        return once(f"{kind}-{dtype}", fill)

    return get


@pytest.fixture(scope="session")
def text_bundle(exports) -> Path:
    return exports("text")[0]


@pytest.fixture(scope="session")
def label_bundle(exports) -> Path:
    return exports("labels")[0]


@pytest.fixture(scope="session")
def requests_files(tmp_path_factory) -> dict[str, Path]:
    """Request files of both tasks' schemas: {"text": five prompts, "labels": four label lists}."""
    folder = tmp_path_factory.mktemp("requests")
    prompts = {f"{i}_main": {"image_name": f"{i}_main.png", "text_prompt": p} for i, p in enumerate(PROMPTS)}
    prompts["2_main"]["seed"] = 0  # type: ignore[assignment]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return {"text": folder / "prompts.json", "labels": folder / "labels.json"}


@pytest.fixture(scope="session")
def command(tmp_path_factory) -> Callable[..., tuple[list[str], dict[str, str]]]:
    """(arguments, blocked imports) -> command line and environment of a `fastgen` process that cannot import those."""
    folder = tmp_path_factory.mktemp("blocker")
    (folder / "sitecustomize.py").write_text(BLOCKER)

    def build(*arguments: object, blocked: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
        environment = os.environ | {"PYTHONPATH": f"{folder}:{REPO}", "BLOCKED_IMPORTS": " ".join(blocked)}
        return [sys.executable, "-m", "fastgen", *map(str, arguments)], environment

    return build


@pytest.fixture(scope="session")
def fastgen_process(command) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `fastgen ARGUMENTS` in a process of its own."""

    def run(*arguments: object, blocked: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
        line, environment = command(*arguments, blocked=blocked)
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, **options)

    return run


@pytest.fixture
def fastgen(capfd, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Run `fastgen ARGUMENTS` in this process -> (exit code, stdout, stderr)."""
    from fastgen.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgen", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ending:
            code = int(ending.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def rehash() -> Callable[[Path], None]:
    """Make bundle.json agree with the files again, after they were changed on purpose."""
    from fastgen.files.hashes import sha256_file
    from fastgen.models.bundle_record import sealed

    def run(bundle: Path) -> None:
        manifest = json.loads((bundle / "bundle.json").read_text())
        for name in manifest["files"]:
            file = bundle / name
            manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        (bundle / "bundle.json").write_text(json.dumps(sealed(manifest)))

    return run


@pytest.fixture
def scaled_weights(rehash) -> Callable[..., Path]:
    """(bundle, out, factor): a copy of a bundle whose UNet's last weight tensor is multiplied by `factor`, rehashed."""
    import numpy as np

    def run(bundle: Path, out: Path, factor: float) -> Path:
        onnx = pytest.importorskip("onnx")
        shutil.copytree(bundle, out)
        file = out / "unet" / "model.onnx"
        model = onnx.load(file, load_external_data=False)
        weight = next(t for t in model.graph.initializer if t.name.endswith("conv_out.weight"))
        if weight.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in weight.external_data}
            data = bytearray((file.parent / place["location"]).read_bytes())
            part = slice(int(place["offset"]), int(place["offset"]) + int(place["length"]))
            data[part] = (np.frombuffer(data[part], np.float32) * np.float32(factor)).tobytes()
            (file.parent / place["location"]).write_bytes(data)
        else:
            weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(factor)).tobytes()
            onnx.save(model, file)
        rehash(out)
        return out

    return run


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test for a GPU, before any of its fixtures is made, where something that it needs is not there."""
    for mark in item.iter_markers("gpu"):
        if reason := lacking(mark.args):
            pytest.skip(reason)


def pytest_collection_finish() -> None:
    """What the test files have imported stays: no collection looks at it again, which takes a tenth of a trace's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:diffusers")


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """Runs commands in forks of one process, see hostile/fork_server.py."""
    from attacks import ForkServer

    server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield server
    server.close()


@pytest.fixture
def refused(fork_server, tmp_path) -> Callable[..., None]:
    """(attack, name=folder, ...) -> copies the folders into a workspace under these names, and checks the attack there."""
    from attacks import check

    def run(attack: Any, **folders: Path) -> None:
        workspace = tmp_path / "workspace"
        workspace.mkdir()
        for name, folder in folders.items():
            copy = shutil.copytree if folder.is_dir() else shutil.copy2
            copy(folder, workspace / name)
        check(attack, workspace, fork_server, tmp_path / "cache")

    return run
