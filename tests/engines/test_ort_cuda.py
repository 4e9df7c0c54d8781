"""onnxruntime on CUDA: results in buffers of the caller's own, every name one that onnxruntime has, and no silent CPU.

Without a GPU the runner is driven on CPU tensors through onnxruntime's real IO binding, with a recording double for streams.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

from wrong_inputs import refuses_wrong_inputs  # noqa: E402

from fastgen.engines import create_engine  # noqa: E402
from fastgen.engines.ort import cuda  # noqa: E402
from fastgen.engines.ort.cuda import PROVIDER, Runner, open_session, provider_options  # noqa: E402
from fastgen.errors import FastgenError, InputError  # noqa: E402
from fastgen.models.bundle import read_bundle  # noqa: E402
from fastgen.sampling import streams  # noqa: E402

OWN, CALLER = "network's", "caller's"


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Session:
    """onnxruntime's session, and a log of its runs: (addresses of what is bound, run options)."""

    def __init__(self, real, log):
        self.real, self.log, self.runs = real, log, []

    def io_binding(self):
        return self.real.io_binding()

    def run_with_iobinding(self, binding, options):
        self.log.append("run")
        keys = ("gpu_graph_id", "disable_synchronize_execution_providers")
        self.runs.append((id(binding), *(options.get_run_config_entry(key) for key in keys)))
        self.real.run_with_iobinding(binding, options)


@pytest.fixture
def runner(label_bundle):
    bundle = read_bundle(label_bundle)
    log: list[str] = []
    real = ort.InferenceSession(bundle.network("unet"), providers=["CPUExecutionProvider"])
    session = Session(real, log)
    own, caller = Stream(OWN, log), Stream(CALLER, log)
    return Runner(session, bundle.spec.signatures["unet"], "cpu", own, lambda: caller), session, log, bundle


def inputs(bundle, rows, seed=0):
    signature = bundle.spec.signatures["unet"]
    return [torch.from_numpy(x) for x in signature.sample_inputs(rows, np.random.default_rng(seed)).values()]


def expected(bundle, tensors):
    return create_engine("ort", bundle).run("unet", *(t.numpy() for t in tensors))[0]


def test_a_runner_computes_what_the_session_computes_at_every_number_of_rows(runner):
    run, _, _, bundle = runner
    for rows in (2, 1, 5, 2):
        tensors = inputs(bundle, rows, seed=rows)
        (found,) = run.run(*tensors)
        assert found.shape == tensors[0].shape
        assert np.abs(found.numpy() - expected(bundle, tensors)).max() < 1e-6


def test_a_result_is_not_overwritten_by_the_next_run(runner):
    run, _, _, bundle = runner
    (first,) = run.run(*inputs(bundle, 2, seed=0))
    kept = first.clone()
    (second,) = run.run(*inputs(bundle, 2, seed=1))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_each_number_of_rows_has_one_binding_and_one_graph_and_the_host_never_waits(runner):
    run, session, _, bundle = runner
    for rows in (2, 3, 2, 3, 2):
        run.run(*inputs(bundle, rows))
    two, three = session.runs[0], session.runs[1]
    assert session.runs == [two, three, two, three, two]
    assert two[0] != three[0]
    assert (two[1:], three[1:]) == (("1", "1"), ("2", "1"))


def test_streams_wait_for_each_other_around_a_run(runner):
    run, _, log, bundle = runner
    run.run(*inputs(bundle, 2))
    around = [f"{CALLER} waits for {OWN}", f"{OWN} waits for {CALLER}"]
    assert log == [*around, "run", *around]


def test_the_provider_is_asked_for_graphs_on_our_stream_and_for_exact_fp32():
    options = provider_options(1, 0x7F00, graphs=True)
    assert (options["device_id"], options["user_compute_stream"]) == ("1", str(0x7F00))
    assert (options["enable_cuda_graph"], options["use_tf32"]) == ("1", "0")
    assert provider_options(0, 1, graphs=False)["enable_cuda_graph"] == "0"
    assert all(isinstance(value, str) for value in options.values())


@pytest.mark.parametrize(("whole", "words"), [(True, "fallback to CPU EP has been"), (False, "cannot load its CUDA")])
@pytest.mark.skipif(PROVIDER in ort.get_available_providers(), reason="the CUDA provider is here")
def test_nodes_on_the_cpu_are_an_error(label_bundle, whole, words):
    """Where CUDA libraries are missing, onnxruntime warns and runs on the CPU."""
    path = str(read_bundle(label_bundle).network("unet"))
    with pytest.warns(UserWarning, match=PROVIDER), pytest.raises(FastgenError, match=words):
        open_session(path, ort.SessionOptions(), provider_options(0, 1, graphs=True), whole=whole)


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ({"torch", "onnxruntime"}, "built for the CPU alone: pip uninstall -y onnxruntime"),
        ({"torch", "onnxruntime", "onnxruntime-gpu"}, "both installed and share one folder"),
        ({"onnxruntime"}, "on CUDA needs torch"),
    ],
)
def test_cuda_without_its_packages_is_one_line_with_the_command(label_bundle, monkeypatch, installed, words):
    monkeypatch.setattr(cuda, "has_distribution", installed.__contains__)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError) as error:
        create_engine("ort", read_bundle(label_bundle), device="cuda")
    assert words in str(error.value)
    assert "pip install" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_cuda_build_of_onnxruntime_without_a_gpu_runs_on_the_cpu_by_default(label_bundle, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    assert create_engine("ort", read_bundle(label_bundle)).device == "cpu"
    with pytest.raises(InputError, match="sees no CUDA GPU here"):
        create_engine("ort", read_bundle(label_bundle), device="cuda")


@pytest.fixture
def cuda_engine(monkeypatch, text_bundle):
    """(bundle, dtype) -> engine ort as it is on CUDA, but on CPU tensors; which sessions it opened."""
    opened = {}

    def open_on_cpu(path, options, provider, *, whole):
        opened[path.rpartition("/")[0].rpartition("/")[2]] = (
            path.rpartition("/")[2],
            provider["enable_cuda_graph"],
            whole,
        )
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    class CpuStream(Stream):
        cuda_stream = 7

        def __init__(self, device=None):
            super().__init__("stream", [])

    def make(bundle, dtype=None):
        monkeypatch.setattr(cuda, "open_session", open_on_cpu)
        monkeypatch.setattr(cuda, "_check_gpu_build", lambda: None)
        monkeypatch.setattr(torch.cuda, "Stream", CpuStream)
        monkeypatch.setattr(torch.cuda, "current_stream", CpuStream)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

        def open_device(self, device, threads, kinds):
            self._torch, self.xp, self.device = torch, torch, "cpu"

        monkeypatch.setattr(cuda.CudaEngine, "open_device", open_device)
        return create_engine("ort", bundle, device="cuda", dtype=dtype), opened

    streams._streams.cache_clear()
    yield make
    streams._streams.cache_clear()


def test_on_cuda_it_runs_the_fp16_graphs_and_the_text_encoder_in_fp32(lowered_bundle, cuda_engine):
    bundle = read_bundle(lowered_bundle("text", "fp16"))
    engine, opened = cuda_engine(bundle)
    assert (engine.dtype, engine.static_shapes, engine.capturable) == ("fp16", True, False)
    for name, signature in bundle.spec.signatures.items():
        tensors = [torch.from_numpy(x) for x in signature.sample_inputs(2, np.random.default_rng(0)).values()]
        outputs = engine.run(name, *tensors)
        exact = create_engine("ort", bundle, device="cpu").run(name, *(t.numpy() for t in tensors))
        for found, reference in zip(outputs, exact, strict=True):
            distance = np.linalg.norm(found.numpy() - reference) / np.linalg.norm(reference)
            assert distance < (1e-5 if name == "text_encoder" else 5e-3)
    assert opened["unet"] == ("model.fp16.ort.onnx", "1", True)
    assert opened["text_encoder"] == ("model.ort.onnx", "0", False) or opened["text_encoder"][0] == "model.onnx"
    assert [engine.executed(name) for name in ("unet", "text_encoder")] == ["fp16", "fp32"]
    for text in ("Failed to allocate memory for requested buffer", "CUDNN_STATUS_ALLOC_FAILED", "CUDA out of memory"):
        assert engine.is_out_of_memory(Exception(text))  # onnxruntime's errors are of no common class
    assert not engine.is_out_of_memory(Exception("a bug"))


def test_a_bundle_without_fp16_graphs_runs_in_fp32_by_default_and_this_is_told(label_bundle, cuda_engine, capsys):
    engine, _ = cuda_engine(read_bundle(label_bundle))
    assert engine.dtype == "fp32"
    assert "engine ort runs in fp32: the bundle has no fp16 graphs" in capsys.readouterr().err


def test_inputs_of_another_shape_are_refused_rather_than_broadcast(label_bundle, cuda_engine):
    engine, opened = cuda_engine(read_bundle(label_bundle))
    refuses_wrong_inputs(engine)
    assert opened == {}


def test_a_bundle_without_fp16_graphs_names_the_command(label_bundle, cuda_engine):
    engine, _ = cuda_engine(read_bundle(label_bundle), "fp16")
    with pytest.raises(InputError, match=r"has no fp16 graph of unet; `fastgen export MODEL --out \S+ --dtype fp16`"):
        engine.run("unet", torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, 24))


def test_bf16_is_refused(label_bundle, cuda_engine):
    with pytest.raises(InputError, match="engine ort executes fp16, fp32 on cuda, not bf16"):
        cuda_engine(read_bundle(label_bundle), "bf16")


def test_out_of_memory_is_recognised(label_bundle, cuda_engine):
    engine, _ = cuda_engine(read_bundle(label_bundle))
    message = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 8"
    assert engine.is_out_of_memory(RuntimeError(message))
    assert not engine.is_out_of_memory(RuntimeError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT"))


@pytest.mark.gpu("onnxruntime-gpu")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_cuda_computes_what_the_cpu_computes_between_recorded_graphs(lowered_bundle, dtype):
    bundle = read_bundle(lowered_bundle("text", "fp16"))
    engine, exact = create_engine("ort", bundle, device="cuda", dtype=dtype), create_engine("ort", bundle, device="cpu")
    for name, signature in bundle.spec.signatures.items():
        for rows in (2, 3, 2, 2):
            values = list(signature.sample_inputs(rows, np.random.default_rng(rows)).values())
            outputs = engine.run(name, *map(engine.array, values))
            for found, reference in zip(outputs, exact.run(name, *values), strict=True):
                distance = np.linalg.norm(engine.numpy(found) - reference) / np.linalg.norm(reference)
                assert distance < (1e-4 if engine.executed(name) == "fp32" else 5e-3), (name, rows)


@pytest.mark.gpu("onnxruntime-gpu")
def test_cuda_is_certified(lowered_bundle):
    from export.certificate import certify

    bundle = read_bundle(lowered_bundle("text", "fp16"))
    for dtype in ("fp32", "fp16"):
        certificate = certify(create_engine("ort", bundle, device="cuda", dtype=dtype), bundle)
        assert certificate.passed, certificate.table()


def test_names_and_signatures_are_onnxruntime_s():
    assert cuda.PROVIDER in ort.get_all_providers()
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "1")
    assert options.get_run_config_entry("gpu_graph_id") == "1"
