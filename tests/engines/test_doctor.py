"""`fastgen doctor`: what it says about this machine, and about machines fed in as the outputs of their tools."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace

import numpy as np
import pytest

from fastgen.engines import doctor, engine_class, engine_names
from fastgen.engines.doctor import MachineReport, Verdict, libraries
from fastgen.engines.doctor.diagnosis import Cache, Machine, driver_too_old
from fastgen.engines.doctor.libraries import Library, inspect, loaded_nvinfer, read_answer
from fastgen.engines.machine import Cpu, Driver, Gpu, cpu, gpus, version
from fastgen.files.installing import hint

RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", 24564, "8.9")
H200 = Gpu("NVIDIA H200", 143771, "9.0")
T4 = Gpu("Tesla T4", 15360, "7.5")
A100 = Gpu("NVIDIA A100-SXM4-80GB", 81920, "8.0")
NEW = Driver("580.95.05", "13.0")
SEEN = {"gpus": [{"name": "NVIDIA H200", "memory_mib": 143771, "capability": "9.0"}], "available": True}
TOOLS = {"triton": True, "toolkit": "/usr/local/cuda"}
TORCH = {"cuda": "13.0", "failure": None, "architectures": ["sm_75", "sm_80", "sm_90"], **TOOLS, **SEEN}
NO_GPU_SEEN = {"gpus": [], "available": False}
ORT = {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda_loads": True}
RTX = {
    "tensorrt-rtx-cu13": "1.7.1.116",
    "tensorrt-rtx-cu13-bindings": "1.7.1.116",
    "tensorrt-rtx-cu13-libs": "1.7.1.116",
}
TRT = {"tensorrt-cu13": "11.4.0.106", "tensorrt-cu13-bindings": "11.4.0.106", "tensorrt-cu13-libs": "11.4.0.106"}
WHEEL = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/"


def machine(**changes) -> Machine:
    """An H200 with everything in order, apart from the changes; `torch`, `onnxruntime` and `tensorrt` change facts."""
    found = {
        "torch": Library("torch", "2.13.0", None, TORCH | changes.pop("torch", {})),
        "diffusers": Library("diffusers", "0.42.1"),
        "transformers": Library("transformers", "5.23.0"),
        "onnxruntime": Library("onnxruntime", "1.31.1", None, ORT | changes.pop("onnxruntime", {})),
        "openvino": Library("openvino", "2026.4.1-1-a", None, {"devices": ["CPU"], "dtypes": ["BF16", "FP32"]}),
        "tensorrt": Library(
            "tensorrt", "11.4.0.106", None, {"loaded": 11, "runtime": True} | changes.pop("tensorrt", {})
        ),
        "tensorrt_rtx": Library(
            "tensorrt_rtx", "1.7.1.116", None, {"loaded": None, "runtime": True} | changes.pop("tensorrt_rtx", {})
        ),
    } | changes.pop("libraries", {})
    whole = Machine(
        Cpu("AMD EPYC 9654", 16, ("avx2", "avx512f", "avx512_vnni", "avx512_bf16"), 128 * 2**30, 100 * 2**30),
        [H200],
        NEW,
        found,
        {"torch": "2.13.0", "onnxruntime-gpu": "1.31.1", **TRT, **RTX},
        Cache("/home/user/.cache/fastgen", 1_500_000_000, {"trt": 3}),
        "/usr/bin/g++",
        True,
    )
    return replace(whole, **changes)


def says(name: str, there: Machine) -> list[str]:
    """The lines about an engine on a machine."""
    verdict = Verdict(name, engine_class(name).problems(there))
    lines = MachineReport(there, [verdict]).lines()
    return [line.strip() for line in lines[lines.index("") + 1 :]]


def line(name: str, there: Machine) -> str:
    (only,) = says(name, there)
    return " ".join(only.split())


def answers(*replies):
    """An nvidia-smi that gives these replies, one per call."""
    left = list(replies)
    return lambda *arguments: left.pop(0)


@pytest.mark.parametrize("name", engine_names())
def test_every_engine_is_ready_where_everything_is_in_order(name):
    there = machine(gpus=[RTX_4090]) if name == "trt-rtx" else machine()
    assert line(name, there) == f"{name} ready"


def test_the_screen_of_a_gpu_machine():
    lines = MachineReport(machine(), [Verdict("trt", engine_class("trt").problems(machine()))]).lines()
    assert lines[1:] == [
        "GPU 0         NVIDIA H200, 140.4 GiB, compute capability 9.0, bf16 and fp16",
        "driver        580.95.05, CUDA up to 13.0",
        "CPU           AMD EPYC 9654, 16 cores, avx2 avx512f avx512_vnni avx512_bf16",
        "memory        128.0 GiB, 100.0 GiB free",
        "torch         2.13.0, CUDA 13.0, 1 GPU",
        "diffusers     0.42.1",
        "transformers  5.23.0",
        "onnxruntime   1.31.1, CUDA, CPU",
        "openvino      2026.4.1, CPU BF16, FP32",
        "tensorrt      11.4.0.106 (CUDA 13, libnvinfer.so.11, tensorrt-cu13, tensorrt-cu13-bindings, tensorrt-cu13-libs)",
        "tensorrt_rtx  1.7.1.116 (CUDA 13, tensorrt-rtx-cu13, tensorrt-rtx-cu13-bindings, tensorrt-rtx-cu13-libs)",
        "compiler      /usr/bin/g++",
        "cache         /home/user/.cache/fastgen: private, 1.5 GB, compiled engines: 3 trt",
        "",
        "trt           ready",
    ]


@pytest.mark.parametrize(
    ("isa", "lacking"),
    [
        (("avx2",), ["bf16", "int8"]),
        (("avx2", "avx512f"), ["int8"]),
        (("avx2", "avx512f", "avx512_vnni"), []),
        (("avx2", "avx_vnni"), ["bf16"]),
        (("asimd", "asimddp", "bf16"), []),
        ((), []),  # nothing is known
    ],
)
def test_precisions_that_the_cpu_has_no_instructions_for_are_named(isa, lacking):
    lines = MachineReport(machine(cpu=Cpu("A CPU", 2, isa, None, None)), []).lines()
    place = next(i for i, line in enumerate(lines) if line.startswith("CPU  "))
    assert [line.split()[3].rstrip(":") for line in lines if "no instructions for" in line] == lacking
    assert all(line.startswith("              no instructions") for line in lines[place + 1 : place + 1 + len(lacking)])


def test_a_driver_too_old_for_torch_is_named_with_both_versions():
    there = machine(gpus=[A100], driver=Driver("535.104.05", "12.2"), torch=NO_GPU_SEEN)
    assert line("eager", there) == (
        "eager ready on the CPU only: the driver 535.104.05 (CUDA up to 12.2) is too old: CUDA 13 needs 580 or "
        f"newer; torch 2.13.0 is built for CUDA 13.0: update the NVIDIA driver, or {WHEEL}cu126"
    )
    there = machine(gpus=[A100], driver=Driver("470.82.01", "11.4"), torch=NO_GPU_SEEN)
    assert line("eager", there).endswith("torch 2.13.0 is built for CUDA 13.0: update the NVIDIA driver")


@pytest.mark.parametrize(
    ("driver", "cuda", "old"),
    [
        (Driver("580.65.06", "13.0"), "13.1", False),  # newer minors run on any driver of their major
        (Driver("575.57.08", "12.9"), "13.0", True),
        (Driver("535.104.05", None), "13.0", True),
        (Driver("580.65.06", None), "13.0", False),
        (Driver(None, None, "no driver"), "13.0", False),
        (Driver("450.80.02", "11.0"), "11.8", False),
    ],
)
def test_which_drivers_are_too_old(driver, cuda, old):
    assert (driver_too_old(driver, cuda) is not None) is old


def test_a_cpu_build_of_torch_beside_a_gpu():
    there = machine(gpus=[T4], torch={"cuda": None, **NO_GPU_SEEN})
    what = "torch 2.13.0 is built without CUDA, although there is a GPU here (Tesla T4)"
    assert line("eager", there) == f"eager ready on the CPU only: {what}: {WHEEL}cu130"
    assert line("trt", there) == f"trt not ready: {what}: {WHEEL}cu130"  # it has no CPU to run on
    assert line("openvino", there) == "openvino ready"
    there = replace(there, driver=Driver("550.54.15", "12.4"))
    assert line("eager", there).endswith("/cu126")


def test_a_gpu_that_torch_has_no_kernels_for():
    v100 = Gpu("Tesla V100-SXM2-16GB", 16384, "7.0")
    there = machine(gpus=[v100], torch={"failure": "CUDA error: no kernel image is available for execution"})
    assert line("eager", there) == (
        "eager ready on the CPU only: torch 2.13.0 sees the GPU but cannot use it: the Tesla V100-SXM2-16GB has compute "
        f"capability 7.0, its kernels are for sm_75, sm_80, sm_90: {WHEEL}cu126"
    )
    there = machine(gpus=[T4], torch={"failure": "CUDA error: out of memory"})
    assert "cannot use it: CUDA error: out of memory" in line("eager", there)


@pytest.mark.parametrize(("visible", "hidden"), [("", True), ("-1", True), ("0,1", False), ("GPU-8f1b", False)])
def test_gpus_hidden_by_the_environment(visible, hidden):
    there = machine(torch=NO_GPU_SEEN, visible=visible)
    assert ("hides the GPU (NVIDIA H200): unset it" in line("eager", there)) is hidden


def test_two_onnxruntimes_in_one_directory():
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    fix = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime"
    what = "onnxruntime and onnxruntime-gpu are installed together and overwrite each other's files"
    no_cuda = {"providers": ["CPUExecutionProvider"]}
    assert line("ort", machine(distributions=both)) == f"ort ready, but {what}: {fix}-gpu"
    assert (
        line("ort", machine(distributions=both, onnxruntime=no_cuda)) == f"ort ready on the CPU only: {what}: {fix}-gpu"
    )
    alone = {"gpus": [], "driver": Driver(None, None, "no driver"), "onnxruntime": no_cuda}
    assert line("ort", machine(distributions=both, **alone)) == f"ort ready, but {what}: {fix}"
    broken = {"onnxruntime": Library("onnxruntime", "?", "import onnxruntime fails: ImportError: no symbol")}
    assert says("ort", machine(distributions=both, libraries=broken)) == [
        "ort           not ready",
        f"- {what}: {fix}-gpu",
        "- import onnxruntime fails: ImportError: no symbol: pip install --force-reinstall onnxruntime",
    ]


def test_onnxruntime_without_its_cuda_provider_or_the_libraries_of_it():
    cpu_only = machine(onnxruntime={"providers": ["CPUExecutionProvider"]}, distributions={"onnxruntime": "1.31.1"})
    assert line("ort", cpu_only) == (
        "ort ready on the CPU only: onnxruntime 1.31.1 has no CUDA provider, although there is a GPU here (NVIDIA H200): "
        "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    )
    lacking = machine(onnxruntime={"cuda_loads": False, "missing_library": "libcudnn.so.9"})
    assert line("ort", lacking) == (
        "ort ready on the CPU only: onnxruntime 1.31.1 cannot load its CUDA provider: libcudnn.so.9 is missing: "
        'pip install "onnxruntime-gpu[cuda,cudnn]"'
    )


def test_tensorrt_s_bindings_without_its_libraries():
    missing = "libnvinfer.so.11: cannot open shared object file: No such file or directory"
    stub = {"tensorrt": Library("tensorrt", "?", f"import tensorrt fails: ImportError: {missing}")}
    parts = {"tensorrt-cu13-bindings": "11.4.0.106"}
    fix = "pip install --force-reinstall tensorrt-cu13==11.4.0.106"
    assert line("trt", machine(libraries=stub, distributions=parts)) == (
        "trt not ready: TensorRT is incomplete (tensorrt-cu13-bindings 11.4.0.106): "
        f"import tensorrt fails: ImportError: {missing}: {fix}"
    )
    nothing = {"tensorrt": Library("tensorrt")}
    assert line("trt", machine(libraries=nothing, distributions=parts)) == (
        "trt not ready: TensorRT is incomplete (tensorrt-cu13-bindings 11.4.0.106): `import tensorrt` finds nothing: "
        f"{fix}"
    )
    assert line("trt", machine(tensorrt={"runtime": False})) == (
        "trt not ready: TensorRT 11.4.0.106 cannot make a runtime: its libraries are stubs, or do not fit the driver: "
        f"{fix}"
    )


def test_tensorrt_for_another_cuda_than_the_driver_s():
    there = machine(driver=Driver("550.54.15", "12.4"), torch={"cuda": "12.8"})
    assert line("trt", there) == (
        "trt not ready: the driver 550.54.15 (CUDA up to 12.4) is too old: CUDA 13 needs 580 or newer; "
        "TensorRT 11.4.0.106 is built for CUDA 13: update the NVIDIA driver, or "
        "pip uninstall -y tensorrt-cu13 tensorrt-cu13-bindings tensorrt-cu13-libs && pip install tensorrt-cu12"
    )


def test_parts_of_tensorrt_that_do_not_belong_together():
    two = TRT | {"tensorrt-cu12": "11.4.0.106"}
    assert "builds for CUDA 12 and 13 are installed together: tensorrt-cu12, " in line(
        "trt", machine(distributions=two)
    )
    mixed = TRT | {"tensorrt-cu13-libs": "10.16.1.11"}
    assert line("trt", machine(distributions=mixed)).startswith(
        "trt not ready: TensorRT's parts are of different versions: tensorrt-cu13 11.4.0.106, "
        "tensorrt-cu13-bindings 11.4.0.106, tensorrt-cu13-libs 10.16.1.11: pip install tensorrt-cu13==11.4.0.106"
    )
    assert "TensorRT 11.4.0.106 has loaded libnvinfer.so.10, of another major version" in line(
        "trt", machine(tensorrt={"loaded": 10})
    )
    old = {"tensorrt": Library("tensorrt", "10.3.0", None, {"loaded": 10, "runtime": True})}
    assert "TensorRT 10.3.0 is too old, 10.13 or newer is needed: pip install --upgrade tensorrt-cu13" in line(
        "trt", machine(libraries=old)
    )


@pytest.mark.parametrize(("card", "kind"), [(T4, "7.5 (Turing)"), (H200, "9.0 (Hopper)")])
def test_cards_that_tensorrt_for_rtx_does_not_know_are_sent_to_trt(card, kind):
    lacking = {"tensorrt_rtx": Library("tensorrt_rtx")}
    for there in (machine(gpus=[card]), machine(gpus=[card], libraries=lacking)):
        assert line("trt-rtx", there) == (
            f"trt-rtx not ready: {card.name}: TensorRT for RTX compiles for 8.0, 8.6, 8.9, 12.0, 12.1, not for {kind}: "
            "use engine trt"
        )
    assert line("trt-rtx", machine(gpus=[card, RTX_4090])) == "trt-rtx ready"


def test_tensorrt_for_rtx_that_is_missing_too_old_or_for_another_driver():
    missing = machine(gpus=[RTX_4090], libraries={"tensorrt_rtx": Library("tensorrt_rtx")}, distributions={})
    fix = engine_class("trt-rtx").install
    assert line("trt-rtx", missing) == f"trt-rtx not ready: tensorrt_rtx is not installed: {fix}"
    old = {"tensorrt_rtx": Library("tensorrt_rtx", "1.3.0.9", None, {"loaded": None, "runtime": True})}
    assert (
        "TensorRT for RTX 1.3.0.9 is too old, 1.7 or newer is needed: pip install --upgrade tensorrt-rtx-cu13"
        in line("trt-rtx", machine(gpus=[RTX_4090], libraries=old))
    )
    driver = machine(gpus=[RTX_4090], driver=Driver("550.54.15", "12.4"), torch={"cuda": "12.8"})
    assert line("trt-rtx", driver) == (
        "trt-rtx not ready: the driver 550.54.15 (CUDA up to 12.4) is too old: CUDA 13 needs 580 or newer; TensorRT for RTX "
        "1.7.1.116 is built for CUDA 13: update the NVIDIA driver, or pip uninstall -y tensorrt-rtx-cu13 "
        "tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs && pip install tensorrt-rtx-cu12"
    )


def test_no_gpu_is_the_one_reason_for_trt_and_none_for_the_others():
    none = machine(gpus=[], driver=Driver(None, None, "no NVIDIA driver (nvidia-smi is not there)"), torch=NO_GPU_SEEN)
    assert line("trt", none) == (
        "trt not ready: TensorRT needs an NVIDIA GPU: no NVIDIA driver (nvidia-smi is not there): use a machine that has one"
    )
    assert line("trt-rtx", none) == (
        "trt-rtx not ready: TensorRT for RTX needs an NVIDIA GPU: no NVIDIA driver (nvidia-smi is not there): "
        "use a machine that has one; `fastgen export --rtx` builds plans for one here all the same"
    )
    assert line("eager", none) == "eager ready"
    assert line("ort", none) == "ort ready"


def test_a_driver_that_does_not_answer_leaves_torch_the_cpu():
    error = "nvidia-smi fails with status 18: Failed to initialize NVML: Driver/library version mismatch"
    there = machine(gpus=[], driver=Driver(None, None, error), torch=NO_GPU_SEEN)
    assert line("eager", there) == f"eager ready on the CPU only: {error}: reboot, or install the NVIDIA driver again"


def test_missing_packages_and_broken_ones():
    there = machine(
        libraries={
            "diffusers": Library("diffusers"),
            "transformers": Library("transformers"),
            "torch": Library(
                "torch", "?", "import torch fails: OSError: libcudart.so.13: cannot open shared object file"
            ),
        }
    )
    assert says("eager", there) == [
        "eager         not ready",
        f"- diffusers, transformers are not installed: {hint('train')}",
        "- import torch fails: OSError: libcudart.so.13: cannot open shared object file: "
        "pip install --force-reinstall torch",
    ]
    gone = machine(libraries={"openvino": Library("openvino")})
    assert (
        line("openvino", gone) == f"openvino not ready: openvino is not installed: {engine_class('openvino').install}"
    )


def test_what_torch_compile_needs_beside_torch(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    there = machine(compiler=None, headers=False, torch={"triton": False, "toolkit": None})
    verdict = Verdict("compile", engine_class("compile").problems(there))
    assert verdict.state == "not ready"
    assert list(map(str, verdict.problems)) == [
        "no C++ compiler (g++ is not on the PATH): apt-get install g++, or set CXX to yours",
        "no Python headers (Python.h), which compiled kernels include: apt-get install python3-dev",
        "triton, which compiles GPU kernels, is not installed: pip install triton",
        "no CUDA toolkit, whose headers compiled networks include: install one, or set CUDA_HOME to yours",
    ]
    assert line("eager", there) == "eager ready"


def test_gpus_as_nvidia_smi_lists_them():
    rows = "NVIDIA H200, 143771 MiB, 580.95.05, 9.0\nNVIDIA GB10, [N/A], 580.95.05, 12.1\n"
    header = "| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |"
    found, driver = gpus(answers((0, rows), (0, header)))
    assert found == [H200, Gpu("NVIDIA GB10", None, "12.1")]
    assert driver == NEW


def test_a_driver_that_does_not_know_compute_cap_is_asked_without():
    refusal = (2, 'Field "compute_cap" is not a valid field to query.\n')
    table = "NVIDIA A100-SXM4-80GB, 81920 MiB, 450.80.02\n"
    found, driver = gpus(answers(refusal, (0, table), (0, "CUDA Version: 11.0")))
    assert found == [replace(A100, compute_capability=None)]
    assert driver == Driver("450.80.02", "11.0")


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (9, "\nNVIDIA-SMI has failed because it couldn't communicate.\n", "status 9: NVIDIA-SMI has failed because"),
        (124, "no answer within 20 s", "nvidia-smi fails with status 124: no answer within 20 s"),
        (0, "No devices were found\n", "nvidia-smi lists no GPU: No devices were found"),
        (0, "", "nvidia-smi lists no GPU: no output"),
    ],
)
def test_an_nvidia_smi_that_fails_is_one_line(status, text, error):
    found, driver = gpus(lambda *arguments: (status, text))
    assert found == []
    assert driver.version is None
    assert error in str(driver.error)


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_nvidia_smi_is_run_as_a_process(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\n[ $# = 0 ] && echo "CUDA Version: 12.4" || echo "Tesla T4, 15360 MiB, 550.54.15, 7.5"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpus() == ([T4], Driver("550.54.15", "12.4"))
    script.write_text("not a program")
    assert gpus()[0] == []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpus() == ([], Driver(None, None, "no NVIDIA driver (nvidia-smi is not there)"))


def test_cpus_as_linux_describes_them():
    x86 = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) 6972P\nflags\t\t: fpu avx2 avx512f amx_bf16\nprocessor\t: 1\n"
    found = cpu(x86, "MemTotal:       131072 kB\nMemAvailable:    65536 kB\n")
    assert (found.name, found.isa) == ("Intel(R) Xeon(R) 6972P", ("avx2", "avx512f", "amx_bf16"))
    assert (found.memory, found.memory_free) == (128 * 2**20, 64 * 2**20)
    arm = cpu("processor\t: 0\nFeatures\t: fp asimd bf16 sve2\n", "")
    assert arm.isa == ("asimd", "bf16", "sve2")
    assert arm.memory is None
    assert cpu("", "").name  # not Linux
    assert version("2.13.0+cu130") == (2, 13, 0)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise ImportError('undefined symbol: x\\ny')", "import broken fails: ImportError: undefined symbol: x y"),
        ("raise OSError('libcudart.so.13: cannot open')", "import broken fails: OSError: libcudart.so.13: cannot open"),
        ("raise AttributeError('NumPy 2')", "import broken fails: AttributeError: NumPy 2"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "import broken fails: killed by SIGILL"),
        ("import sys; sys.exit('no licence')", "import broken fails: no licence"),
        ("print('hello'); __version__ = '1.2'", None),
        ("", None),
    ],
)
def test_a_library_that_breaks_at_import_is_one_line(tmp_path, monkeypatch, source, error):
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = inspect("broken")
    assert found.error == error
    assert found.works is (error is None)


def test_a_library_that_hangs_or_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "hanging.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(libraries, "TIMEOUT", 1.0)
    assert inspect("hanging").error == "import hanging hangs: no answer within 1 s"
    assert inspect("not_a_library") == Library("not_a_library")


def test_the_library_that_a_provider_lacks_is_read_from_its_messages():
    answer = '{"version": "1.31.1", "error": null, "facts": {"cuda_loads": false}}'
    message = (
        "[E] Failed to load libonnxruntime_providers_cuda.so: libcudnn.so.9: cannot open shared object file: No such"
    )
    assert read_answer("onnxruntime", 0, answer, message).facts["missing_library"] == "libcudnn.so.9"


def test_the_tensorrt_library_that_a_process_has_loaded():
    maps = "7f00-7f01 r-xp 00000000 08:01 42 /opt/tensorrt_libs/libnvinfer.so.10\n7f02 /opt/libnvinfer_plugin.so.11\n"
    assert loaded_nvinfer(maps) == 10
    assert loaded_nvinfer("") is None


def test_torch_s_facts_agree_with_torch():
    torch = pytest.importorskip("torch")
    facts = libraries.torch_facts(torch)
    assert (facts["cuda"], facts["available"]) == (torch.version.cuda, torch.cuda.is_available())
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["failure"] is None


@pytest.mark.gpu
def test_nvidia_smi_and_torch_see_the_same_gpus_and_torch_can_use_them():
    import torch

    found, driver = gpus()
    facts = inspect("torch").facts
    assert facts["failure"] is None
    assert len(facts["gpus"]) == torch.cuda.device_count() > 0
    listed = [(gpu.name, gpu.compute_capability) for gpu in found]
    assert {(one["name"], one["capability"]) for one in facts["gpus"]} <= set(listed)
    assert driver.cuda is not None
    assert driver_too_old(driver, str(torch.version.cuda)) is None


def test_the_model_that_tries_a_provider_runs():
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(libraries.IDENTITY, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.array([3.0], np.float32)})
    assert y == [3.0]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_cache_that_others_can_write_to_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    assert doctor.cache() == Cache(str(tmp_path / "cache"))
    (tmp_path / "cache").chmod(stat.S_IRWXU | stat.S_IRWXO)
    held = doctor.cache()
    assert f"{tmp_path / 'cache'}: other users can write to this cache; run `chmod go-w" in str(held.error)
    there = machine(cache=held)
    lines = MachineReport(there, []).lines()
    assert f"cache         {held.error}" in lines


@pytest.mark.parametrize("name", [n for n in engine_names() if "recipe" in vars(engine_class(n))])
def test_engines_that_keep_files_need_a_private_cache(name):
    there = machine(cache=Cache(None, error="/tmp/c: other users can write to this cache; run `chmod 700 /tmp/c`"))
    assert line(name, there) == (
        f"{name} not ready: its compiled networks have no place: "
        "/tmp/c: other users can write to this cache; run `chmod 700 /tmp/c`"
    )


def test_the_command_tells_about_every_engine_here(fastgen_process):
    done = fastgen_process("doctor", blocked=["diffusers", "tensorrt"])
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"fastgen       0.1.0, Python {sys.version_info.major}.")
    assert "ort           ready" in lines
    assert f"eager         not ready: diffusers is not installed: {hint('train')}" in lines
    assert [line.split()[0] for line in lines[lines.index("") + 1 :] if line[0] != " "] == engine_names()


def test_without_any_engine_the_command_fails_after_the_screen(fastgen_process):
    done = fastgen_process("doctor", "--json", blocked=["torch", "onnxruntime", "openvino", "tensorrt"])
    assert (done.returncode, done.stderr) == (1, "fastgen: error: no engine can run here (see above)\n")
    report = json.loads(done.stdout)
    assert not any(engine["ready"] for engine in report["engines"].values())
    assert report["engines"]["openvino"]["problems"][0]["what"] == "openvino is not installed"
    assert {"cpu", "gpus", "driver", "libraries", "distributions", "cache", "compiler"} <= set(report)
