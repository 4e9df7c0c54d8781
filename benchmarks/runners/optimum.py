"""optimum's pipelines, exported by optimum itself, in the environments of benchmarks/environments.py."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.prompts import prompts

CALIBRATION_SAMPLES = 200  # optimum's default; a sample is one evaluation of the UNet
CALIBRATION_PROMPTS = CALIBRATION_SAMPLES // 50  # diffusers' default number of steps


class _Optimum:
    """Subclasses load `_pipeline`; `build_s` is what its export took, which is made once."""

    _pipeline: Any
    dtype: str
    build_s: float
    note: str | None = None
    exported_now_s = 0.0

    def __init__(self, opening: Mapping[str, Any], packages: tuple[str, ...]) -> None:
        if not (Path(opening["model"]) / "vae").is_dir():
            raise ValueError("optimum has no pipeline for label-conditional models")
        self._model, self._guidance = opening["model"], opening["guidance_scale"]
        self.versions = {p: importlib.metadata.version(p) for p in ("torch", "diffusers", "transformers", *packages)}
        quantised = "-int8" if opening["dtype"] == "int8" else ""
        self._folder = Path(opening["work"]) / f"{Path(self._model).name}-{opening['name']}{quantised}"

    def _exported(self, export: Callable[[], Any]) -> Path:
        """`self._folder`, filled by `export().save_pretrained` when it is not there yet."""
        record = self._folder / "export_seconds.json"
        if not record.is_file():
            start = time.perf_counter()
            export().save_pretrained(self._folder)
            self.exported_now_s = time.perf_counter() - start
            record.write_text(json.dumps(self.exported_now_s))
        self.build_s = float(json.loads(record.read_text()))
        return self._folder

    def generate(self, job: Mapping[str, Any], latents: np.ndarray) -> np.ndarray:
        """(count, H, W, 3) uint8, in batches of job["batch"]."""
        import torch

        parts = []
        for start in range(0, job["count"], job["batch"]):
            rows = slice(start, min(start + job["batch"], job["count"]))
            images = self._for_batch(rows.stop - rows.start)(
                prompt=list(job["prompts"][rows]),
                num_inference_steps=job["steps"],
                guidance_scale=self._guidance,
                latents=torch.from_numpy(latents[rows]),
                output_type="pil",
            ).images
            parts += [np.asarray(image) for image in images]
        return np.stack(parts)

    def _for_batch(self, batch: int) -> Any:
        return self._pipeline

    def _quiet(self) -> None:
        self._pipeline.set_progress_bar_config(disable=True)


class Onnx(_Optimum):
    dtype = "fp32"

    def __init__(self, opening: Mapping[str, Any]) -> None:
        import onnxruntime
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        super().__init__(opening, ("optimum-onnx", "onnxruntime"))
        if opening["dtype"] not in (None, "fp32"):
            raise ValueError(f"optimum-onnx is measured in fp32, not in {opening['dtype']}")
        options = onnxruntime.SessionOptions()
        if opening["threads"]:
            options.intra_op_num_threads = opening["threads"]
        cuda = opening["device"].startswith("cuda")
        settings = {
            "session_options": options,
            "provider": "CUDAExecutionProvider" if cuda else "CPUExecutionProvider",
        }
        folder = self._exported(lambda: ORTStableDiffusionPipeline.from_pretrained(self._model, export=True))
        self._pipeline = ORTStableDiffusionPipeline.from_pretrained(folder, export=False, **settings)
        self._quiet()


class Intel(_Optimum):
    """Reshaped to its batch and compiled, as its documentation advises for speed.

    int8 is optimum's full quantisation of a diffusion pipeline: weights and activations of the UNet, calibrated on images that
    the pipeline generates itself; of all other networks the weights only. What is not int8 runs in bf16 where the CPU has it.
    """

    def __init__(self, opening: Mapping[str, Any]) -> None:
        from openvino import Core
        from optimum.intel import OVStableDiffusionPipeline

        if opening["device"].startswith("cuda"):
            raise ValueError("optimum-intel runs on Intel's hardware and CPUs")
        super().__init__(opening, ("optimum-intel", "openvino", "nncf"))
        native = "bf16" if "BF16" in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "fp32"
        self.dtype = opening["dtype"] or native
        computed, options = self.dtype, {}
        if self.dtype == "int8":
            computed, options = native, {"quantization_config": self._quantisation()}
        config = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(computed, computed),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if opening["threads"]:
            config["INFERENCE_NUM_THREADS"] = str(opening["threads"])
        cls: Any = OVStableDiffusionPipeline
        folder = self._exported(lambda: cls.from_pretrained(self._model, export=True, compile=False, **options))
        self._pipeline = cls.from_pretrained(folder, export=False, compile=False, ov_config=config)
        self._quiet()
        self._size, self._batch = opening["image_size"], 0

    def _quantisation(self) -> Any:
        """optimum's configuration, with the benchmark's prompts in the place of its dataset, which would be downloaded."""
        from optimum.intel import OVQuantizationConfig

        self.note = (
            f"UNet in int8 by NNCF, calibrated on {CALIBRATION_SAMPLES} evaluations for {CALIBRATION_PROMPTS} made-up prompts; "
            "of the VAE and the text encoder the weights only, as optimum's pipelines do it"
        )
        dataset = prompts(1000 + CALIBRATION_PROMPTS)[1000:]  # not those that are measured
        return OVQuantizationConfig(bits=8, num_samples=CALIBRATION_SAMPLES, dataset=dataset)

    def _for_batch(self, batch: int) -> Any:
        if batch != self._batch:
            pipeline = self._pipeline
            pipeline.reshape(batch, self._size, self._size, num_images_per_prompt=1)
            decoder = pipeline.vae_decoder  # which reshape() leaves at num_images_per_prompt
            decoder.model = pipeline._reshape_vae_decoder(decoder.model, self._size, self._size, batch)
            pipeline.compile()
            self._batch = batch
        return self._pipeline


def open_runner(opening: Mapping[str, Any]) -> _Optimum:
    return Onnx(opening) if opening["name"] == "optimum-onnx" else Intel(opening)
