"""A copied graph stands for the graph of the same network only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import UNet2DConditionModel  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor  # noqa: E402
from gallery import text_unet  # noqa: E402
from traces import copying, digest  # noqa: E402

from fastgen.models.condition import STATES  # noqa: E402
from fastgen.models.networks.denoiser import Denoiser  # noqa: E402
from fastgen.models.signatures import Signature, TensorSpec  # noqa: E402

SIGNATURE = Signature((TensorSpec("sample", "float32", ("batch", 4, 8, 8)),), ())
ANOTHER = f"""
import sys
from diffusers import UNet2DConditionModel
from fastgen.models.condition import STATES
from fastgen.models.networks.denoiser import Denoiser
from fastgen.models.signatures import Signature, TensorSpec
from traces import digest

network = Denoiser(UNet2DConditionModel.from_pretrained(sys.argv[1]), [STATES]).eval()
print(digest(network, {SIGNATURE}, "model.onnx", "fp32"))
"""


def denoiser():
    return Denoiser(text_unet(), [STATES]).eval()


def read(folder):
    return Denoiser(UNet2DConditionModel.from_pretrained(folder), [STATES]).eval()


def of(module, signature=SIGNATURE, name="model.onnx", dtype="fp32"):
    return digest(module, signature, name, dtype)


def test_the_same_network_has_the_same_digest_in_every_process(tmp_path):
    for name in ("one", "two"):
        text_unet().save_pretrained(tmp_path / name)
    line, environment = [sys.executable, "-c", ANOTHER, tmp_path / "two"], {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert of(read(tmp_path / "one")) == done.stdout.strip()


def doubled(x):
    return 2 * x


def tripled(x):
    return 3 * x


class Half(Denoiser):
    def forward(self, *tensors):
        return super().forward(*tensors) / 2


CHANGES = {
    "one weight": lambda m: m.unet.conv_out.bias.data[0].add_(1e-7),
    "a number that no layer shows": lambda m: setattr(m.unet.time_proj, "downscale_freq_shift", 1),
    "a number in the config": lambda m: m.unet.register_to_config(center_input_sample=True),
    "the mode": lambda m: m.train(),
    "an input": lambda m: setattr(m, "inputs", ("class_labels",)),
    "a buffer that is not saved": lambda m: setattr(m, "time_ids", torch.zeros(6)),
    "a network's own code": lambda m: setattr(m, "__class__", Half),
    "a function": lambda m: setattr(m.unet.conv_norm_out, "forward", doubled),
    "a hook": lambda m: m.unet.conv_in.register_forward_pre_hook(doubled),
    "how attention is computed": lambda m: m.unet.set_attn_processor(AttnProcessor()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_graph_depends_on_changes_the_digest(change):
    other = denoiser()
    CHANGES[change](other)
    assert of(other) != of(denoiser())


def test_two_functions_differ_by_their_constants():
    hooked = denoiser(), denoiser()
    for module, hook in zip(hooked, (doubled, tripled), strict=True):
        hook.__qualname__ = "hook"
        module.unet.conv_norm_out.forward = hook
    assert of(hooked[0]) != of(hooked[1])


def test_another_signature_name_or_precision_has_another_digest():
    module = denoiser()
    larger = Signature((TensorSpec("sample", "float32", ("batch", 4, 8, 12)),), ())
    found = [of(module), of(module, larger), of(module, name="other.onnx"), of(module, dtype="fp16")]
    assert len(set(found)) == 4


def test_a_graph_is_traced_once_and_copied_from_then_on(tmp_path):
    def trace(module: object, signature: object, path: Path, dtype: str) -> None:
        traced.append(dtype)
        path.parent.mkdir(parents=True)
        path.write_text(dtype)

    def kept(name, fill):
        folder = tmp_path / name
        if not folder.exists():
            fill(folder)
        return folder

    traced: list[str] = []
    export_onnx = copying(trace, kept)
    for number, dtype in enumerate(["fp32", "fp32", "fp16"]):
        path = tmp_path / f"{number}" / "unet" / "model.onnx"
        export_onnx(denoiser(), SIGNATURE, path, dtype)
        assert path.read_text() == dtype
    assert traced == ["fp32", "fp16"]
