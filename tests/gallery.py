"""A gallery of people's folders: tiny random models of every combination, saved by diffusers, each with the pictures that its
own pipeline makes, or a loop written by hand on diffusers' scheduler where there is no pipeline.

An entry is a function (folder) -> Piece: it writes the folder, and says how its pictures come about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from fastgen.sampling.noise import normal
from fastgen.training.bpe import train_tokenizer

PROMPTS = ["A small purple monster with one big eye.", "Green robot with a sword."]
SEEDS = [0, 1]
STEPS, GUIDANCE = 4, 3.0
BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
CROSS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}
SELF: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


@dataclass
class Piece:
    """A folder's pictures: `images()` (2, H, W, C) uint8 for `requests` at STEPS steps and `guidance`."""

    images: Callable[[], np.ndarray]
    requests: list[dict[str, Any]]
    guidance: float = GUIDANCE
    steps: int = STEPS
    options: tuple[Any, ...] = ()  # of `fastgen generate` and `export`
    tolerance: int = 1


def prompts() -> list[dict[str, Any]]:
    return [{"prompt": text, "seed": seed} for text, seed in zip(PROMPTS, SEEDS, strict=True)]


def classes(*names: Any) -> list[dict[str, Any]]:
    return [{"class": name, "seed": seed} for name, seed in zip(names, SEEDS, strict=True)]


def seeds_only() -> list[dict[str, Any]]:
    return [{"seed": seed} for seed in SEEDS]


# Networks


def tokenizer(length: int = 77) -> Any:
    made = train_tokenizer(PROMPTS * 2, vocab_size=600)
    made.model_max_length = length
    return made


def clip(tokens: Any, width: int = 32, cls: Any = CLIPTextModel, **config: Any) -> Any:
    special = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(1)
    return cls(CLIPTextConfig(vocab_size=len(tokens), **sizes, **special, **config)).eval()


def t5() -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({word for text in PROMPTS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=12, **marks)
    torch.manual_seed(1)
    config = T5Config(vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    return tokens, T5EncoderModel(config).eval()


def text_unet(**config: Any) -> Any:
    torch.manual_seed(2)
    return UNet2DConditionModel(**{"sample_size": 8, "cross_attention_dim": 32, **BLOCKS, **CROSS, **config}).eval()


def unet(**config: Any) -> Any:
    torch.manual_seed(2)
    return UNet2DModel(**{"sample_size": 16, **BLOCKS, **SELF, **config}).eval()


def kl(**config: Any) -> Any:
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        **{**BLOCKS, **blocks, "latent_channels": 4, "sample_size": 16, "scaling_factor": 0.5, **config}
    ).eval()


def vq() -> Any:
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VQModel(**BLOCKS, **blocks, latent_channels=3, num_vq_embeddings=16, sample_size=16).eval()


def dit(channels: int) -> Any:
    torch.manual_seed(2)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": channels}
    network = DiTTransformer2DModel(**sizes, num_layers=2, sample_size=8, num_embeds_ada_norm=10).eval()
    for parameter in network.parameters():  # its last layers are zero at first, and everything would be grey
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def ddim(**config: Any) -> Any:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**{**betas, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **config})


def pixel_scheduler(**config: Any) -> Any:
    """It clips the clean sample; with velocities the rounding errors of a random network do not grow."""
    return DDIMScheduler(**{"prediction_type": "v_prediction", **config})


# Saving


def save_sd(
    folder: Path, tokens: Any, encoder: Any, denoiser: Any, vae: Any, scheduler: Any = None, **options: Any
) -> None:
    networks = {"tokenizer": tokens, "text_encoder": encoder, "unet": denoiser, "vae": vae}
    StableDiffusionPipeline(
        **networks,
        scheduler=scheduler or ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, **options)


def save_parts(folder: Path, kind: str, **components: Any) -> None:
    """A folder of components that no pipeline of diffusers takes together."""
    index: dict[str, Any] = {"_class_name": kind}
    for name, component in components.items():
        component.save_pretrained(folder / name)
        package = type(component).__module__.partition(".")[0]
        index[name] = [package, type(component).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


# Pictures


def noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(normal(SEEDS, 0, shape))


def pipeline_images(cls: Any, folder: Path, shape: tuple[int, int, int], *arguments: Any, **options: Any) -> np.ndarray:
    pipe = (
        cls.from_pretrained(folder, safety_checker=None)
        if "safety" in str(cls.__init__.__code__.co_varnames)
        else (cls.from_pretrained(folder))
    )
    pipe.set_progress_bar_config(disable=True)
    words = {"latents": noise(*shape), "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    images = pipe(*(arguments or (PROMPTS,)), **words | options).images
    return to_uint8(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2) * 2 - 1)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)


@torch.no_grad()
def loop(
    scheduler: Any, predict: Callable[..., torch.Tensor], shape: tuple[int, ...], steps: int = STEPS
) -> torch.Tensor:
    """The loop of every pipeline: scale_model_input, predict, step. `predict(x, t)` is guided already."""
    scheduler.set_timesteps(steps)
    x = noise(*shape) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(scaled, t), t, x).prev_sample
    return x


def guided(
    network: Callable[..., torch.Tensor], uncond: Sequence[Any], cond: Sequence[Any], scale: float = GUIDANCE
) -> Any:
    """`network(x, t, *conditions)` under classifier-free guidance."""

    def predict(x: torch.Tensor, t: Any) -> torch.Tensor:
        t = torch.as_tensor(t).expand(len(x))
        none, some = network(x, t, *uncond), network(x, t, *cond)
        return none + scale * (some - none)

    return predict


@torch.no_grad()
def states(tokens: Any, encoder: Any, texts: Sequence[str]) -> torch.Tensor:
    ids = tokens(
        list(texts), padding="max_length", max_length=tokens.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return encoder(ids).last_hidden_state


def text_loop(tokens: Any, encoder: Any, denoiser: Any, vae: Any, scheduler: Any = None, **words: Any) -> np.ndarray:
    """Text under guidance, the other conditions `words` the same in both halves, by hand."""
    scheduler = scheduler or ddim()
    channels = denoiser.config.in_channels

    def network(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return denoiser(x, t, condition, **words).sample[:, :channels]

    predict = guided(network, [states(tokens, encoder, [""] * 2)], [states(tokens, encoder, PROMPTS)])
    return decoded(vae, loop(scheduler, predict, (channels, 8, 8) if vae is not None else (channels, 16, 16)))


@torch.no_grad()
def decoded(vae: Any, x: torch.Tensor) -> np.ndarray:
    if vae is None:
        return to_uint8(x)
    latents = x / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return to_uint8(vae.decode(latents).sample)


# The gallery: text -> latents


def stable_diffusion(folder: Path, length: int = 77, cls: Any = StableDiffusionPipeline, **parts: Any) -> Piece:
    tokens = tokenizer(length)
    denoiser, vae = parts.get("unet") or text_unet(), parts.get("vae") or kl()
    save_sd(folder, tokens, parts.get("text_encoder") or clip(tokens), denoiser, vae, parts.get("scheduler"))
    size = denoiser.config.sample_size
    shape = (denoiser.config.in_channels, *((size, size) if isinstance(size, int) else size))
    return Piece(lambda: pipeline_images(cls, folder, shape), prompts())


def grey_vae(folder: Path) -> Piece:
    return stable_diffusion(folder, vae=kl(in_channels=1, out_channels=1))


def not_square(folder: Path) -> Piece:
    return stable_diffusion(folder, unet=text_unet(sample_size=(8, 12)))


def other_size(folder: Path) -> Piece:
    piece = stable_diffusion(folder)
    images = lambda: pipeline_images(StableDiffusionPipeline, folder, (4, 12, 20), height=24, width=40)  # noqa: E731
    return Piece(images, prompts(), options=("--height", 24, "--width", 40), tolerance=piece.tolerance)


def short_tokenizer(folder: Path) -> Piece:
    return stable_diffusion(folder, length=32)


def tiny_autoencoder(folder: Path) -> Piece:
    torch.manual_seed(3)
    widths = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return stable_diffusion(folder, vae=AutoencoderTiny(**widths, **blocks, scaling_factor=0.8).eval())


def odd_unet(folder: Path) -> Piece:
    odd = {
        "encoder_hid_dim": 32,
        "encoder_hid_dim_type": "text_proj",
        "cross_attention_dim": 48,
        "only_cross_attention": (False, True),
        "mid_block_only_cross_attention": True,
        "time_embedding_dim": 96,
        "time_embedding_act_fn": "silu",
        "timestep_post_act": "silu",
        "conv_in_kernel": 5,
        "conv_out_kernel": 5,
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "addition_embed_type": "text",
    }
    return stable_diffusion(folder, unet=text_unet(**odd, addition_embed_type_num_heads=4))


def fourier_time(folder: Path) -> Piece:
    return stable_diffusion(folder, unet=text_unet(time_embedding_type="fourier", time_embedding_dim=32))


def textual_inversion(folder: Path) -> Piece:
    tokens = tokenizer()
    words = {"tokenizer": tokens, "text_encoder": clip(tokens), "unet": text_unet(), "vae": kl(), "scheduler": ddim()}
    pipe = StableDiffusionPipeline(**words, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    torch.manual_seed(5)
    pipe.load_textual_inversion({"<toy>": torch.randn(3, 32)}, token="<toy>")
    pipe.save_pretrained(folder)
    texts = ["a small purple <toy> with one big eye", PROMPTS[1]]
    asked = [{"prompt": text, "seed": seed} for text, seed in zip(texts, SEEDS, strict=True)]
    return Piece(lambda: pipeline_images(StableDiffusionPipeline, folder, (4, 8, 8), texts), asked)


def consistency(folder: Path) -> Piece:
    tokens = tokenizer()
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = LCMScheduler(**betas, clip_sample=False, set_alpha_to_one=True, steps_offset=1)
    denoiser = text_unet(time_cond_proj_dim=32)
    parts = {"tokenizer": tokens, "text_encoder": clip(tokens), "unet": denoiser, "vae": kl(), "scheduler": scheduler}
    LatentConsistencyModelPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)
    words = {"num_inference_steps": 1, "guidance_scale": 8.0}
    images = lambda: pipeline_images(LatentConsistencyModelPipeline, folder, (4, 8, 8), **words)  # noqa: E731
    return Piece(images, prompts(), guidance=8.0, steps=1)


def projected_clip(folder: Path) -> Piece:
    tokens = tokenizer()
    encoder = clip(tokens, cls=CLIPTextModelWithProjection, projection_dim=16)
    denoiser, vae = text_unet(), kl()
    save_parts(folder, "Mine", tokenizer=tokens, text_encoder=encoder, unet=denoiser, vae=vae, scheduler=ddim())
    return Piece(lambda: text_loop(tokens, encoder, denoiser, vae), prompts())


def t5_encoder(folder: Path) -> Piece:
    tokens, encoder = t5()
    denoiser, vae = text_unet(), kl()
    save_parts(folder, "Mine", tokenizer=tokens, text_encoder=encoder, unet=denoiser, vae=vae, scheduler=ddim())
    return Piece(lambda: text_loop(tokens, encoder, denoiser, vae), prompts())


def shifted_latents(folder: Path) -> Piece:
    tokens, denoiser, vae = tokenizer(), text_unet(), kl(shift_factor=0.3)
    encoder = clip(tokens)  # in no pipeline of diffusers: Stable Diffusion's would leave the shift out
    save_parts(folder, "Mine", tokenizer=tokens, text_encoder=encoder, unet=denoiser, vae=vae, scheduler=ddim())
    return Piece(lambda: text_loop(tokens, encoder, denoiser, vae), prompts())


def edm(folder: Path) -> Piece:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    return stable_diffusion(folder, scheduler=scheduler)


def flow_matching(folder: Path) -> Piece:
    tokens, denoiser, vae = tokenizer(), text_unet(), kl()
    encoder, scheduler = clip(tokens), FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"tokenizer": tokens, "text_encoder": encoder, "unet": denoiser, "vae": vae, "scheduler": scheduler}
    save_parts(folder, "Mine", **parts)
    return Piece(lambda: text_loop(tokens, encoder, denoiser, vae, scheduler), prompts())


def xl(folder: Path, zeros: bool = True, **vae: Any) -> Piece:
    tokens, second = tokenizer(), tokenizer()
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24}
    denoiser = text_unet(cross_attention_dim=64, addition_embed_type="text_time", use_linear_projection=True, **sizes)
    encoders = clip(tokens), clip(second, cls=CLIPTextModelWithProjection, projection_dim=24)
    StableDiffusionXLPipeline(
        kl(**vae), *encoders, tokens, second, denoiser, ddim(), force_zeros_for_empty_prompt=zeros
    ).save_pretrained(folder)
    return Piece(lambda: pipeline_images(StableDiffusionXLPipeline, folder, (4, 8, 8)), prompts())


def xl_empty_prompt(folder: Path) -> Piece:
    return xl(folder, zeros=False)


def xl_channel_statistics(folder: Path) -> Piece:
    return xl(folder, latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.5, 0.8, 1.0, 2.0))


# Text, and something else at once


def text_and(folder: Path, asked: Sequence[Any], condition: torch.Tensor, names: Any = None, **config: Any) -> Piece:
    tokens, denoiser, vae = tokenizer(), text_unet(**config), kl()
    encoder = clip(tokens)
    save_sd(folder, tokens, encoder, denoiser, vae)
    if names:
        (folder / "labels.json").write_text(json.dumps(names))
    key = "labels" if isinstance(asked[0], list) else "class"
    requests = [request | {key: value} for request, value in zip(prompts(), asked, strict=True)]
    images = lambda: text_loop(tokens, encoder, denoiser, vae, class_labels=condition)  # noqa: E731
    return Piece(images, requests)


def text_and_class(folder: Path) -> Piece:
    return text_and(folder, [3, "7"], torch.tensor([3, 7]), num_class_embeds=10)


def text_and_number(folder: Path) -> Piece:
    return text_and(folder, [0.25, 900], torch.tensor([0.25, 900.0]), class_embed_type="timestep")


def by_text_alone(folder: Path, **config: Any) -> Piece:
    """Labels as a vector that the UNet projects itself; guidance drops the prompt and the labels."""
    tokens, denoiser, vae = tokenizer(), text_unet(**config), kl()
    encoder = clip(tokens)
    save_sd(folder, tokens, encoder, denoiser, vae)
    (folder / "labels.json").write_text(json.dumps({"red": 0, "big": 1, "wet": 2}))
    labels = torch.tensor([[1.0, 0, 1], [0, 1.0, 0]])
    asked = [request | {"labels": names} for request, names in zip(prompts(), (["wet", "red"], ["big"]), strict=True)]

    def images() -> np.ndarray:
        def network(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
            return denoiser(x, t, text, class_labels=vector).sample

        none = [states(tokens, encoder, [""] * 2), torch.zeros_like(labels)]
        predict = guided(network, none, [states(tokens, encoder, PROMPTS), labels])
        return decoded(vae, loop(ddim(), predict, (4, 8, 8)))

    return Piece(images, asked)


def text_and_projected_labels(folder: Path) -> Piece:
    return by_text_alone(folder, class_embed_type="projection", projection_class_embeddings_input_dim=3)


def text_and_simply_projected_labels(folder: Path) -> Piece:
    return by_text_alone(folder, class_embed_type="simple_projection", projection_class_embeddings_input_dim=3)


# Pixels


def text_to_pixels(folder: Path) -> Piece:
    tokens, encoder = t5()
    denoiser = text_unet(sample_size=16, in_channels=3, out_channels=6)  # with a learned variance, as DeepFloyd's IF
    save_parts(folder, "Mine", tokenizer=tokens, text_encoder=encoder, unet=denoiser, scheduler=ddim())
    return Piece(lambda: text_loop(tokens, encoder, denoiser, None), prompts())


def unconditional(folder: Path, steps_offset: int = 0, **config: Any) -> Piece:
    denoiser, scheduler = unet(**config), pixel_scheduler(steps_offset=steps_offset)
    DDIMPipeline(denoiser, scheduler).save_pretrained(folder)
    channels = denoiser.config.in_channels
    shape = (channels, 16, 16)

    def images() -> np.ndarray:
        return to_uint8(loop(scheduler, lambda x, t: denoiser(x, t).sample[:, :channels], shape))

    return Piece(images, seeds_only(), guidance=1.0)


def grey_pixels(folder: Path) -> Piece:
    return unconditional(folder, in_channels=1, out_channels=1)


def learned_variance(folder: Path) -> Piece:
    return unconditional(folder, out_channels=6)


def fourier_pixels(folder: Path) -> Piece:
    return unconditional(
        folder, steps_offset=1, time_embedding_type="fourier"
    )  # it takes the logarithm of the timestep


def learned_time(folder: Path) -> Piece:
    return unconditional(folder, time_embedding_type="learned", num_train_timesteps=1000)


def skip_blocks(folder: Path) -> Piece:
    blocks = {"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D")}
    blocks |= {"up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D")}
    return unconditional(folder, **blocks, block_out_channels=(32, 64), norm_num_groups=None)


def class_ids(folder: Path) -> Piece:
    denoiser = unet(num_class_embeds=10)
    DDIMPipeline(denoiser, pixel_scheduler()).save_pretrained(folder)
    ids = torch.tensor([3, 7])
    predict = lambda x, t: denoiser(x, t, class_labels=ids).sample  # noqa: E731
    return Piece(lambda: to_uint8(loop(pixel_scheduler(), predict, (3, 16, 16))), classes(3, "7"), guidance=1.0)


def class_number(folder: Path) -> Piece:
    denoiser = unet(class_embed_type="timestep")
    DDIMPipeline(denoiser, pixel_scheduler()).save_pretrained(folder)
    numbers = torch.tensor([0.5, 900.0])
    predict = lambda x, t: denoiser(x, t, class_labels=numbers).sample  # noqa: E731
    return Piece(lambda: to_uint8(loop(pixel_scheduler(), predict, (3, 16, 16))), classes(0.5, 900), guidance=1.0)


# Latents without text


def quantised_latents(folder: Path) -> Piece:
    denoiser, vae = unet(sample_size=8), vq()
    LDMPipeline(vae, denoiser, DDIMScheduler(clip_sample=False)).save_pretrained(folder)

    def images() -> np.ndarray:
        return decoded(vae, loop(DDIMScheduler(clip_sample=False), lambda x, t: denoiser(x, t).sample, (3, 8, 8)))

    return Piece(images, seeds_only(), guidance=1.0)


def dit_classes(folder: Path, channels: int = 8) -> Piece:
    denoiser, vae = dit(channels), kl()
    names = {i: f"class {i}, number {i}" for i in range(10)}
    DiTPipeline(denoiser, vae, ddim()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"id2label": names})
    )  # as DiT's folders on the hub have it

    def images() -> np.ndarray:
        def network(x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return denoiser(x, timestep=t, class_labels=ids).sample[:, :4]

        predict = guided(network, [torch.tensor([10, 10])], [torch.tensor([3, 7])])
        return decoded(vae, loop(ddim(), predict, (4, 8, 8)))

    return Piece(images, classes("class 3", "number 7"))


def dit_without_variance(folder: Path) -> Piece:
    return dit_classes(folder, channels=4)


# Conditioners of fastgen's own, on both spaces


def conditioned(folder: Path, kind: str, embed: str, latent: bool, dim: int) -> Piece:
    """Labels, or a class with one more that stands for none, through a conditioner."""
    from fastgen.models.folder import Model
    from fastgen.models.networks.labels import LabelConditioner, label_words
    from fastgen.models.saving import save_model
    from fastgen.sampling.defaults import Sampling

    count, classes_ = (11, True) if embed == "embedding" else (dim if embed == "identity" else 5, False)
    channels, size = (4, 8) if latent else (3, 16)
    inside = {"sample_size": size, "in_channels": channels + (dim if kind == "concat" else 0), "out_channels": channels}
    denoiser = (
        text_unet(**inside)
        if kind == "tokens"
        else unet(**inside, class_embed_type="identity" if kind == "class_embed" else None)
    )
    torch.manual_seed(4)
    names = {f"label {i}": i for i in range(count - classes_)}
    words = label_words(names) if embed == "words" else None
    conditioner = LabelConditioner(kind, count, dim, embed=embed, words=words).eval()
    scheduler, vae = pixel_scheduler(clip_sample=not latent), kl() if latent else None
    model = Model(
        None, denoiser, json.loads(scheduler.to_json_string()), Sampling("ddim", STEPS, GUIDANCE), conditioner
    )
    model.names, model.vae = names, vae
    model.null_class = count - 1 if classes_ else None
    save_model(model, folder)
    if classes_:
        some, none = torch.tensor([3, 7]), torch.tensor([10, 10])
        asked = classes("label 3", 7)
    else:
        some, none = torch.zeros(2, count), torch.zeros(2, count)
        some[0, :2] = some[1, 2] = 1
        asked = [{"labels": names} for names in (["label 0", "label 1"], ["label 2"])]
        asked = [request | {"seed": seed} for request, seed in zip(asked, SEEDS, strict=True)]

    def network(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        embedding = conditioner(labels)
        if kind == "concat":
            planes = embedding[:, :, None, None].repeat(1, 1, *x.shape[2:])
            return denoiser(torch.cat([x, planes], 1), t).sample
        return (denoiser(x, t, embedding) if kind == "tokens" else denoiser(x, t, class_labels=embedding)).sample

    return Piece(lambda: decoded(vae, loop(scheduler, guided(network, [none], [some]), (channels, size, size))), asked)


def label_tokens_on_latents(folder: Path) -> Piece:
    return conditioned(folder, "tokens", "tokens", latent=True, dim=32)


def label_words_on_latents(folder: Path) -> Piece:
    return conditioned(folder, "tokens", "words", latent=True, dim=32)


def labels_on_latents(folder: Path) -> Piece:
    return conditioned(folder, "class_embed", "linear", latent=True, dim=64)


def label_planes(folder: Path) -> Piece:
    return conditioned(folder, "concat", "identity", latent=False, dim=5)


def class_planes(folder: Path) -> Piece:
    return conditioned(folder, "concat", "embedding", latent=False, dim=4)


def class_token_on_latents(folder: Path) -> Piece:
    return conditioned(folder, "tokens", "embedding", latent=True, dim=32)


ENTRIES: dict[str, Callable[[Path], Piece]] = {
    entry.__name__: entry
    for entry in (
        *(
            stable_diffusion,
            grey_vae,
            not_square,
            other_size,
            short_tokenizer,
            tiny_autoencoder,
            odd_unet,
            fourier_time,
        ),
        *(textual_inversion, consistency, projected_clip, t5_encoder, shifted_latents, edm, flow_matching),
        *(xl, xl_empty_prompt, xl_channel_statistics, text_and_class, text_and_number, text_and_projected_labels),
        *(text_and_simply_projected_labels, text_to_pixels, unconditional, grey_pixels, learned_variance),
        *(fourier_pixels, learned_time, skip_blocks, class_ids, class_number, quantised_latents, dit_classes),
        *(dit_without_variance, label_tokens_on_latents, label_words_on_latents),
        *(labels_on_latents, label_planes, class_planes),
        *(class_token_on_latents,),
    )
}
