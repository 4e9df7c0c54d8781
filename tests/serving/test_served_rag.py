"""Requests that start from a training image, while others share their steps: the bytes of `fastgen generate --rag`."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
from PIL import Image
from served import ended, serving

from fastgen.generate.pipeline import load
from fastgen.retrieval.indexing import build_index
from fastgen.serving.jobs import GenerationRequest
from fastgen.serving.messages import ImageTask

pytest.importorskip("prometheus_client")
pytest.importorskip("onnxruntime")
PROMPTS = ("A red dragon with wings and horns.", "A small blue slime with one big eye.", "a robot")


@pytest.fixture(scope="module")
def index(text_bundle, tmp_path_factory):
    """Of twelve noisy images, each with a text."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"{PROMPTS[i % 3]} Number {i}.")
    return build_index(root, load(text_bundle, "ort"), tmp_path_factory.mktemp("index") / "index")[0].folder


def tasks(count):
    draw = random.Random(3)
    for seed in range(count):
        steps = draw.choice((2, 5, 10))
        late = draw.choice(({}, {"noise_steps": draw.randint(1, steps)}, {"strength": draw.choice((0.4, 0.8))}))
        rag = {"rag": True, "rag_top_k": draw.choice((None, 1, 3)), **late} if seed % 3 else {}
        yield ImageTask(
            seed=seed, prompt=draw.choice(PROMPTS), num_inference_steps=steps, scheduler=draw.choice(("ddim", "ddpm", "unipc")),
            guidance_scale=draw.choice((1.0, 2.0)), **rag,
        )  # fmt: skip


def options(task):
    """Those of `fastgen generate` for a task."""
    given = {
        "--seed": task.seed,
        "--num-inference-steps": task.num_inference_steps,
        "--scheduler": task.scheduler,
        "--guidance-scale": task.guidance_scale,
        "--noise-steps": task.noise_steps,
        "--strength": task.strength,
        "--rag-top-k": task.rag_top_k,
    }
    return [word for name, value in given.items() if value is not None for word in (name, value)]


def test_late_starts_have_the_bytes_of_generate(text_bundle, index, fastgen, tmp_path, monkeypatch):
    wanted = list(tasks(15))

    async def main():
        async with serving(("m", text_bundle), engine="ort", rag=index) as service:
            assert service.models["m"].info.rag
            jobs = [service.submit(GenerationRequest("m", task, n=1)) for task in wanted]
            return [(await ended(job)).images[0] for job in jobs]

    images = asyncio.run(main())
    monkeypatch.chdir(tmp_path)
    for task, image in zip(wanted, images, strict=True):
        assert image.error is None, image.error
        rag = ("--rag", index) if task.rag else ()
        words = ("generate", "--prompt", task.prompt, "--model", text_bundle, "--engine", "ort", *options(task), *rag)
        code, _, error = fastgen(*words)
        assert code == 0, error
        (file,) = (tmp_path / "generated").glob(f"*-{task.seed}.png")
        assert file.read_bytes() == image.data, task
    assert sum(task.rag for task in wanted) == 10
