"""People's folders work as they are: every entry of the gallery gives the pictures of its own pipeline, on every engine
here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from gallery import ENTRIES, Piece  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def psnr(piece: Piece, folder: Path, out: Path, expected: np.ndarray) -> float:
    """Of all pictures together, in dB: for a codebook, which turns a last bit into another code."""
    assert differences(piece, folder, out, expected)
    pictures = [np.asarray(Image.open(out / f"{i}.png")).astype(float) for i in range(len(expected))]
    return float(10 * np.log10(255**2 / max(np.mean((np.stack(pictures) - expected) ** 2), 1e-9)))


def differences(piece: Piece, folder: Path, out: Path, expected: np.ndarray) -> list[int]:
    pictures = [np.asarray(Image.open(out / f"{i}.png")).astype(int) for i in range(len(expected))]
    pictures = [picture if picture.ndim == 3 else picture[..., None] for picture in pictures]
    assert [picture.shape for picture in pictures] == [image.shape for image in expected]
    assert all(np.ptp(image) > 8 for image in expected)  # equal grey would prove nothing
    return [int(np.abs(a - b).max()) for a, b in zip(pictures, expected.astype(int), strict=True)]


def generate(fastgen, piece: Piece, model: Path, out: Path, *options: object) -> tuple[int, str]:
    requests = out.with_suffix(".json")
    requests.write_text(json.dumps(piece.requests))
    numbers = ["--num-inference-steps", piece.steps, "--guidance-scale", piece.guidance]
    code, _, err = fastgen("generate", requests, "--model", model, "--out", out, *numbers, *options)
    return code, err


@pytest.mark.parametrize("name", ENTRIES)
def test_a_folder_gives_the_pictures_of_its_own_pipeline(name, fastgen, tmp_path):
    piece = ENTRIES[name](tmp_path / name)
    code, err = generate(fastgen, piece, tmp_path / name, tmp_path / "out", "--engine", "eager", *piece.options)
    assert (code, err.count("Traceback")) == (0, 0), err
    assert max(differences(piece, tmp_path / name, tmp_path / "out", piece.images())) <= piece.tolerance


def refused(fastgen, folder: Path, out: Path, *options: object) -> str:
    """The one line of `generate`; nothing is written."""
    code, err = generate(fastgen, Piece(lambda: np.zeros(0), [{"prompt": "a", "seed": 0}]), folder, out, *options)
    assert (code, out.exists()) == (2, False), err
    assert len(err.strip().splitlines()) == 1, err
    return err


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"in_channels": 9}, "inpainting"),
        ({"in_channels": 8}, "InstructPix2Pix"),
        ({"in_channels": 7}, "further images"),
        ({"out_channels": 3}, "out_channels = 3"),
        ({"cross_attention_dim": 48}, "cross_attention_dim = 48"),
        ({"addition_embed_type": "image", "encoder_hid_dim": 32}, "image embeddings"),
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 32}, "image embeddings"),
        ({"attention_type": "gated"}, "GLIGEN"),
    ],
)
def test_a_unet_that_takes_more_is_refused_by_name(config, word, fastgen, tmp_path):
    from gallery import clip, kl, save_sd, text_unet, tokenizer

    tokens = tokenizer()
    save_sd(tmp_path / "model", tokens, clip(tokens), text_unet(**config), kl())
    assert word in refused(fastgen, tmp_path / "model", tmp_path / "out")


def test_what_would_be_left_out_is_refused_by_name(fastgen, tmp_path):
    from gallery import stable_diffusion

    model, out = tmp_path / "model", tmp_path / "out"
    stable_diffusion(model)
    for name, word in (
        ("pytorch_lora_weights.safetensors", "--lora"),
        ("ip-adapter_sd15.safetensors", "IP-Adapter"),
        ("learned_embeds.safetensors", "textual inversion"),
    ):
        (model / name).write_bytes(b"x")
        assert word in refused(fastgen, model, out)
        (model / name).unlink()
    edit(model / "unet" / "config.json", special_attention=True)
    assert "special_attention = True" in refused(fastgen, model, out)
    edit(model / "unet" / "config.json", special_attention=None)
    edit(model / "model_index.json", controlnet=["diffusers", "ControlNetModel"])
    assert "controlnet" in refused(fastgen, model, out)
    edit(model / "model_index.json", controlnet=[None, None], text_encoder=["transformers", "BertModel"])
    edit(model / "text_encoder" / "config.json", architectures=["BertModel"])
    assert "architectures: found 'BertModel'" in refused(fastgen, model, out)


def test_sizes_and_conditions_that_cannot_be_are_one_line(fastgen, tmp_path):
    from gallery import class_ids, dit_classes, stable_diffusion

    dit_classes(tmp_path / "dit")  # it takes squares alone
    assert "unet does not run at 40 x 24 px" in refused(
        fastgen, tmp_path / "dit", tmp_path / "o", "--height", 24, "--width", 40
    )
    stable_diffusion(tmp_path / "text")
    class_ids(tmp_path / "classes")
    model, out = tmp_path / "text", tmp_path / "out"
    assert "multiples of 2 px" in refused(fastgen, model, out, "--height", 17, "--width", 16)
    assert "give both" in refused(fastgen, model, out, "--height", 16)
    assert "this model takes one class" in refused(fastgen, tmp_path / "classes", out)
    piece = Piece(lambda: np.zeros(0), [{"class": "eleven"}])
    code, err = generate(fastgen, piece, tmp_path / "classes", out)
    assert (code, "unknown class 'eleven'" in err) == (2, True)
    piece = Piece(lambda: np.zeros(0), [{"class": 3}], guidance=3.0)
    code, err = generate(fastgen, piece, tmp_path / "classes", out)
    assert (code, "trained without an unconditional class" in err) == (2, True)


@pytest.mark.parametrize("kind", ["fp16", "shards", "pickle", "ema"])
def test_weights_as_people_have_them(kind, fastgen, tmp_path):
    """Half precision under its own name, shards, pickles with permission, and averages beside the raw weights."""
    import gallery

    model, options = tmp_path / "model", []
    piece = gallery.stable_diffusion(model)
    unet = gallery.text_unet()
    if kind == "fp16":
        (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        unet.half().save_pretrained(model / "unet", variant="fp16")
        unet.float().save_pretrained(tmp_path / "rounded")
    elif kind == "shards":
        (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        unet.save_pretrained(model / "unet", max_shard_size="100KB")
    elif kind == "pickle":
        (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        unet.save_pretrained(model / "unet", safe_serialization=False)
        assert "--allow-pickle" in refused(fastgen, model, tmp_path / "out")
        options = ["--allow-pickle"]
    else:
        torch.nn.init.normal_(unet.conv_in.weight, std=0.1)
        unet.save_pretrained(model / "unet_ema")
        edit(model / "unet_ema" / "config.json", decay=0.9999, inv_gamma=1.0, power=0.75, optimization_step=5)
        options = ["--checkpoint", "ema"]
    code, err = generate(fastgen, piece, model, tmp_path / "out", "--engine", "eager", *options)
    assert code == 0, err
    if kind in ("fp16", "ema"):
        tokens = gallery.tokenizer()
        gallery.save_sd(tmp_path / "same", tokens, gallery.clip(tokens), unet, gallery.kl())
        piece = Piece(
            lambda: gallery.pipeline_images(gallery.StableDiffusionPipeline, tmp_path / "same", (4, 8, 8)), []
        )
    assert max(differences(piece, model, tmp_path / "out", piece.images())) <= 1


def test_lora_weights_are_fused_when_asked_and_only_then(fastgen, tmp_path):
    import gallery
    from safetensors.torch import save_file

    model, unet = tmp_path / "model", gallery.text_unet()
    piece = gallery.stable_diffusion(model)
    plain, lora = piece.images(), {}
    generator = torch.Generator().manual_seed(6)
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            rows, columns = module.weight.shape
            down, up = (0.3 * torch.randn(*shape, generator=generator) for shape in ((4, columns), (rows, 4)))
            lora |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            module.weight.data += 0.5 * up @ down
    file = model / "pytorch_lora_weights.safetensors"
    save_file(lora, file)
    tokens = gallery.tokenizer()
    gallery.save_sd(tmp_path / "fused", tokens, gallery.clip(tokens), unet, gallery.kl())
    fused = gallery.pipeline_images(gallery.StableDiffusionPipeline, tmp_path / "fused", (4, 8, 8))
    assert np.abs(fused.astype(int) - plain.astype(int)).max() > 3
    assert "--lora" in refused(fastgen, model, tmp_path / "out")
    for words, expected in (((f"{file}:0.5",), fused), (("none",), plain)):
        out = tmp_path / words[0][-4:].strip(":.")
        code, err = generate(fastgen, piece, model, out, "--engine", "eager", "--lora", *words)
        assert code == 0, err
        assert max(differences(piece, model, out, expected)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.usefixtures("_graphs_once")  # entries share networks
def test_its_bundle_gives_them_on_every_engine(name, fastgen, export_few, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    from export.certificate import MIN_CODEBOOK_PSNR_DB

    piece, options = ENTRIES[name](tmp_path / name), {}
    if piece.options:
        options["size"] = (piece.options[1], piece.options[3])
    certificates = export_few(tmp_path / name, tmp_path / "bundle", engines=["ort", "openvino:fp32"], **options)
    assert all(certificate.passed for certificate in certificates)
    expected = piece.images()
    for engine, *words in (("ort",), ("openvino", "--dtype", "fp32")):
        out = tmp_path / engine
        code, err = generate(fastgen, piece, tmp_path / "bundle", out, "--engine", engine, *words)
        assert code == 0, err
        if name == "quantised_latents":
            assert psnr(piece, tmp_path / name, out, expected) >= MIN_CODEBOOK_PSNR_DB, engine
        else:
            assert max(differences(piece, tmp_path / name, out, expected)) <= 2, engine


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion", "consistency", "dit_classes", "text_to_pixels"])
@pytest.mark.usefixtures("_graphs_once")
def test_it_is_certified_in_eight_bits(name, export_few, tmp_path):
    """Latents of these random networks have a deviation of 5 or so, as those of an autoencoder without a scaling factor."""
    pytest.importorskip("onnxruntime")
    ENTRIES[name](tmp_path / name)
    (certificate,) = export_few(tmp_path / name, tmp_path / "bundle", engines=["ort:int8"], dtype="int8")
    assert certificate.dtype == "int8"
    assert certificate.passed, certificate.table()


def broken(folder: Path, file: str, **values: object) -> Path:
    from gallery import stable_diffusion

    stable_diffusion(folder)
    edit(folder / file, **values)
    return folder


@pytest.mark.parametrize(
    ("file", "values", "word"),
    [
        ("unet/config.json", {"sample_size": "8"}, "sample_size: found '8'"),
        ("unet/config.json", {"sample_size": [8, 8, 8]}, "sample_size: found [8, 8, 8]"),
        ("unet/config.json", {"sample_size": True}, "sample_size: found True"),
        ("unet/config.json", {"norm_num_groups": 0}, "norm_num_groups: found 0"),
        ("unet/config.json", {"dual_cross_attention": True}, "config.json describes 346,164 weights"),
        ("unet/config.json", {"class_embed_type": "other"}, "class_embed_type = 'other'"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor: found 'x'"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor = 0"),
        ("text_encoder/config.json", {"hidden_size": "32"}, "hidden_size: found '32'"),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}, "pad"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -5}, "model_max_length: found -5"),
        ("model_index.json", {"text_encoder": []}, "text_encoder"),
        ("model_index.json", {"_class_name": "StableDiffusionPAGPipeline"}, "is a StableDiffusionPAGPipeline"),
        ("model_index.json", {"scheduler": ["diffusers", "PNDMScheduler"]}, "make both say the same"),
        ("model_index.json", {"vae": [None, None]}, "vae/ is there"),
    ],
)
def test_a_wrong_value_in_a_config_is_one_line_before_anything_is_written(file, values, word, fastgen, tmp_path):
    assert word in refused(fastgen, broken(tmp_path / "model", file, **values), tmp_path / "out")


def test_a_folder_is_sampled_as_its_own_pipeline_does_it(fastgen, tmp_path):
    """Stable Diffusion's pipeline repairs schedulers that clip; tokenizers may pad and cut on the left."""
    import gallery

    long = " ".join([gallery.PROMPTS[0]] * 12)
    for i, (file, values) in enumerate(
        (
            ("scheduler/scheduler_config.json", {"clip_sample": True, "steps_offset": 0}),
            ("tokenizer/tokenizer_config.json", {"padding_side": "left"}),
            ("tokenizer/tokenizer_config.json", {"truncation_side": "left"}),
        )
    ):
        model = broken(tmp_path / f"model{i}", file, **values)
        requests = [{"prompt": text, "seed": seed} for text, seed in ((long, 0), (gallery.PROMPTS[1], 1))]
        piece = Piece(
            lambda model=model: gallery.pipeline_images(
                gallery.StableDiffusionPipeline, model, (4, 8, 8), [long, gallery.PROMPTS[1]]
            ),
            requests,
        )
        code, err = generate(fastgen, piece, model, tmp_path / f"out{i}", "--engine", "eager")
        assert code == 0, err
        assert max(differences(piece, model, tmp_path / f"out{i}", piece.images())) <= 1, values
