"""Model folders whose records lie: every one is refused in one line before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attacks import REMOVE, json_attacks

OPTIONS = ["--model", "model", "--engine", "eager", "--out", "out.png", "--num-inference-steps", "1"]
PROMPT = ["generate", *OPTIONS, "--prompt", "a red dragon"]
LABEL = ["generate", *OPTIONS, "--labels", "red cube"]
CLASS = ["generate", *OPTIONS, "--labels", "1"]
DEFAULTS = [*PROMPT[:-4], *PROMPT[-2:]]  # with the steps that the folder says

HUGE = 10**9
NOT_WHOLE = ("8", -1, 0, HUGE, 10**30, 2.5, [], {}, True)
NOT_NUMBER = ("0.5", [], {}, True, 10**30, None)
NOT_TEXT = (3, [], {}, True)
NOT_LIST = ("8", 8, {}, [], [0], [-4, 8], ["8", "8"], [HUGE, HUGE], [8] * 2000, [[8], [8]])
NOT_BOOL = ("yes", 2, [], {})


def rows(file: str, fields: Mapping[str, Sequence[Any]], most: int = 3) -> list[tuple[str, str, Any, str]]:
    """A row for values of each field, whose refusal must name its first part; of many values `most`, other ones for each."""
    return [
        (f"model/{file}", field, values[(i * most + k) % len(values)], field.split(".")[0])
        for i, (field, values) in enumerate(fields.items())
        for k in range(min(most, len(values)))
    ]


UNET = rows(
    "unet/config.json",
    {
        "sample_size": ("8", -8, 0, HUGE, 8.5, True, [8], [8, "8"], {}, [0, 8]),
        "in_channels": NOT_WHOLE,
        "out_channels": ("4", -4, HUGE, 4.5, [], {}),
        "block_out_channels": NOT_LIST,
        "layers_per_block": ("1", 0, -1, HUGE, 1.5, {}, 100_000),
        "transformer_layers_per_block": ("1", -1, HUGE, {}, 100_000, [HUGE, HUGE]),
        "norm_num_groups": ("8", -8, HUGE, 7.5, [], 0),
        "norm_eps": (*NOT_NUMBER[:-1], -1, 1e300),
        "cross_attention_dim": ("32", -32, 0, HUGE, {}),
        "attention_head_dim": ("4", -4, 0, HUGE, {}),
        "down_block_types": ("DownBlock2D", [], [1, 2], ["NoBlock", "DownBlock2D"], ["DownBlock2D"], ["x" * 2000] * 2),
        "up_block_types": ("UpBlock2D", [], [None, None], ["UpBlock2D", "NoBlock"]),
        "mid_block_type": (3, [], "NoBlock"),
        "act_fn": ("nothing", 3, []),
        "dropout": ("0", -1, 2, [], HUGE),
        "mid_block_scale_factor": ("1", 0, [], HUGE),
        "resnet_out_scale_factor": ("1", 0, []),
        "flip_sin_to_cos": NOT_BOOL,
        "freq_shift": ("0", [], HUGE),
        "conv_in_kernel": ("3", 0, -3, HUGE),
        "conv_out_kernel": ("3", 0, HUGE),
        "downsample_padding": ("1", -1, HUGE),
        "resnet_time_scale_shift": (3, "nothing"),
        "time_embedding_type": (3, "nothing"),
        "time_embedding_dim": ("64", -64, HUGE),
        "time_cond_proj_dim": ("64", -64, HUGE),
        "class_embed_type": (3, "nothing"),
        "num_class_embeds": ("10", -10, HUGE, 2.5),
        "encoder_hid_dim": ("32", -1, HUGE),
        "encoder_hid_dim_type": (3, "nothing"),
        "addition_embed_type": (3, "nothing"),
        "addition_embed_type_num_heads": ("64", 0, HUGE),
        "num_attention_heads": ("2", -2, HUGE),
        "only_cross_attention": ("yes", 3),
        "upcast_attention": NOT_BOOL,
        "attention_type": (3, []),
        "projection_class_embeddings_input_dim": ("8", -8, HUGE),
        "_class_name": (3, None, "NoUNet", "StableDiffusionPipeline", "x" * 3000),
    },
)
UNET += [
    ("model/unet/config.json", "_diffusers_version", [], "_diffusers_version"),
    ("model/unet/config.json", "quantization_config", {"quant_method": "bitsandbytes"}, "quantization_config"),
    ("model/unet/config.json", "", [], "expected an object"),
    ("model/unet/config.json", "", "stabilityai/sd", "expected an object"),
    ("model/unet/config.json", "", "name", "expected an object"),
]
VAE = rows(
    "vae/config.json",
    {
        "latent_channels": NOT_WHOLE,
        "in_channels": NOT_WHOLE[:6],
        "out_channels": NOT_WHOLE[:6],
        "block_out_channels": NOT_LIST,
        "layers_per_block": NOT_WHOLE,
        "norm_num_groups": ("8", -8, HUGE, 7.5, 0),
        "scaling_factor": ("0.7", 0, [], {}, 10**30, True),
        "shift_factor": ("0.7", [], 10**30),
        "latents_mean": ("0", [1.0], [1, 2, 3, "4"], [0] * 5000, {}),
        "latents_std": (1, [1.0], [None] * 4),
        "down_block_types": ("x", [], [1, 2, 3], ["NoBlock"] * 3),
        "act_fn": ("nothing", 3),
        "sample_size": ("32", -32, HUGE),
        "use_quant_conv": NOT_BOOL,
        "mid_block_add_attention": NOT_BOOL,
        "_class_name": (3, None, "NoVae", "UNet2DModel", "x/y"),
    },
)
TEXT_ENCODER = rows(
    "text_encoder/config.json",
    {
        "vocab_size": NOT_WHOLE,
        "hidden_size": NOT_WHOLE,
        "intermediate_size": NOT_WHOLE,
        "num_hidden_layers": NOT_WHOLE,
        "num_attention_heads": NOT_WHOLE,
        "max_position_embeddings": NOT_WHOLE,
        "layer_norm_eps": ("1e-5", [], -1, 10**30),
        "attention_dropout": ("0", [], 5),
        "hidden_act": (3, "nothing", []),
        "projection_dim": ("32", -32, HUGE),
        "eos_token_id": ("2", -2, 2.5, HUGE),
        "architectures": ("CLIPTextModel", [3], {}, ["NoModel"], ["GPT2Model"], [[]]),
        "model_type": ("gpt2", 3, "no/model"),
        "auto_map": ({"AutoModel": "somebody/repo--modeling.Model"}, {"AutoConfig": "hub/id--x.Y"}),
        "quantization_config": ({"quant_method": "bitsandbytes", "load_in_8bit": True},),
        "dtype": ("float17", 3),
        "torch_dtype": ("float17",),
        "attn_implementation": ("hub/kernel",),
    },
)
TOKENIZER = rows(
    "tokenizer/tokenizer_config.json",
    {
        "model_max_length": ("77", -1, 0, 1, True, [], 5 * 10**8),
        "tokenizer_class": ("NoTokenizer", 3, "somebody/repo", []),
        "pad_token": (3, [], {"content": 3}),
        "auto_map": ({"AutoTokenizer": ["somebody/repo--tok.Tok", None]},),
        "added_tokens_decoder": ({"0": 3}, {"x": {"content": "y"}}, [], {"99999999": {"content": "<far>"}}),
        "additional_special_tokens": (3, {"x": "y"}),
    },
)
TOKENIZER += [
    ("model/tokenizer/tokenizer_config.json", "", [], "expected an object"),
    ("model/tokenizer/tokenizer_config.json", "", "hub/id", "expected an object"),
    ("model/tokenizer/tokenizer.json", "", [], "tokenizer.json"),
    ("model/tokenizer/tokenizer.json", "", {}, "tokenizer.json"),
    ("model/tokenizer/tokenizer.json", "model", REMOVE, "tokenizer.json"),
    ("model/tokenizer/tokenizer.json", "model.type", "NoModel", "tokenizer.json"),
    ("model/tokenizer/tokenizer.json", "model.vocab", [], "tokenizer.json"),
    ("model/tokenizer/tokenizer.json", "model.vocab", {"a": -1}, "tokenizer.json"),
    ("model/tokenizer/tokenizer.json", "model.merges", [3], "tokenizer.json"),
    ("model/tokenizer/tokenizer.json", "model.merges", [["a", "no such piece"]], "tokenizer.json"),
    ("model/tokenizer/tokenizer.json", "added_tokens", [3], "tokenizer.json"),
    ("model/tokenizer/tokenizer.json", "post_processor", {"type": "No"}, "tokenizer.json"),
    ("model/tokenizer/tokenizer.json", "version", "9.0", "tokenizer.json"),
]
SCHEDULER = rows(
    "scheduler/scheduler_config.json",
    {
        "num_train_timesteps": (*NOT_WHOLE, None, 10_001),
        "beta_start": ("0.1", 0, 1.5, 10**30, [], True),
        "beta_end": ("0.1", -0.1, 0, 1.5, [], {}),
        "beta_schedule": (3, "nothing", []),
        "prediction_type": (3, "nothing", []),
        "clip_sample": ("yes", 3, []),
        "steps_offset": ("1", -1, HUGE, 2.5),
        "trained_betas": ("x", [], [0.1], ["a"] * 1000, [2.0] * 1000, [-0.1] * 1000, [0.001] * 20_000, {}, 3),
        "timestep_spacing": (3, "nothing"),
        "set_alpha_to_one": ("yes", 3),
        "_class_name": (3, None, "NoScheduler", "DDPMPipeline", "os.system", "hub/id"),
    },
)
INDEX = [
    ("model/model_index.json", "", [], "expected an object"),
    ("model/model_index.json", "", "hub/id", "expected an object"),
    ("model/model_index.json", "", None, "expected an object"),
    ("model/model_index.json", "_class_name", 3, "_class_name"),
    ("model/model_index.json", "_class_name", [], "_class_name"),
    ("model/model_index.json", "_class_name", "StableDiffusionInpaintPipeline", "StableDiffusionInpaintPipeline"),
    ("model/model_index.json", "_class_name", "x" * 5000, "_class_name"),
    ("model/model_index.json", "unet", REMOVE, "unet"),
    ("model/model_index.json", "unet", "hub/id", "unet"),
    ("model/model_index.json", "unet", ["diffusers"], "unet"),
    ("model/model_index.json", "unet", ["diffusers", 3], "unet"),
    ("model/model_index.json", "unet", ["os", "system"], "unet"),
    ("model/model_index.json", "unet", {"a": "b"}, "unet"),
    ("model/model_index.json", "unet", 3, "unet"),
    ("model/model_index.json", "unet", [[], []], "unet"),
    ("model/model_index.json", "vae", 3, "vae"),
    ("model/model_index.json", "vae", [None, None], "vae"),
    ("model/model_index.json", "vae", "stabilityai/vae", "vae"),
    ("model/model_index.json", "text_encoder", REMOVE, "text_encoder"),
    ("model/model_index.json", "text_encoder", "openai/clip", "text_encoder"),
    ("model/model_index.json", "tokenizer", REMOVE, "tokenizer"),
    ("model/model_index.json", "tokenizer", {"x": 1}, "tokenizer"),
    ("model/model_index.json", "scheduler", 3, "scheduler"),
    ("model/model_index.json", "scheduler", ["diffusers", "NoScheduler"], "NoScheduler"),
    ("model/model_index.json", "controlnet", ["diffusers", "ControlNetModel"], "controlnet"),
    ("model/model_index.json", "a/unet", ["diffusers", "UNet2DModel"], "a/unet"),
    ("model/model_index.json", "force_zeros_for_empty_prompt", "yes", "force_zeros_for_empty_prompt"),
    ("model/model_index.json", "id2label", [], "id2label"),
    ("model/model_index.json", "id2label", {"x": "y"}, "id2label"),
]
SETTINGS = rows(
    "fastgen.json",
    {
        "sampling": (3, [], "ddim"),
        "sampling.scheduler": (3, [], None, "", "no-such-scheduler", "os.system", "x" * 3000),
        "sampling.num_inference_steps": (*NOT_WHOLE, None),
        "sampling.guidance_scale": ("3", -1, 10**30, [], True, None),
        "sampling.extra": (1,),
        "training": (3, [], "x"),
        "training.image_mode": (3, [], "nothing"),
        "null_class": ("1", 1.5, -1, [], HUGE),
        "extra": (1, []),
    },
)
SETTINGS += [
    ("model/fastgen.json", "", [], "expected an object"),
    ("model/fastgen.json", "", "x", "expected an object"),
]

LABELS = [
    ("model/labels.json", "", [], "labels.json"),
    ("model/labels.json", "", {}, "labels.json"),
    ("model/labels.json", "", "red cube", "labels.json"),
    ("model/labels.json", "", {"red cube": 0}, "labels"),
    ("model/labels.json", "", {"red cube": 1}, "red cube"),
    ("model/labels.json", "", {f"label {i}": i for i in range(25)}, "25"),
    ("model/labels.json", "", {f"label {i}": i for i in range(5000)}, "5000"),
    *rows("labels.json", {"red cube": (2, "1", -1, HUGE, 1.0, 1.5, True, None, [], {}, 24)}),
    ("model/labels.json", "red cube", REMOVE, "expected 0 to 22"),
    ("model/labels.json", "", {" ": 0, **{f"label {i}": i for i in range(1, 24)}}, "is empty"),
]
CONDITIONER = rows(
    "conditioner/config.json",
    {
        "kind": ("nothing", 3, None, [], "broadcast"),
        "num_labels": (*NOT_WHOLE, None),
        "dim": (*NOT_WHOLE, None),
        "hidden": ("8", -8, HUGE, 8.5, []),
        "embed": ("nothing", 3, [], "words", "tokens"),
        "words": ([], [[0]], "x", [[HUGE]] * 24, [[0.5]] * 24, 3),
        "extra": (1,),
        "auto_map": ({"AutoModel": "hub/id--x.Y"},),
    },
)
CONDITIONER += [
    ("model/conditioner/config.json", "", [], "expected an object"),
    ("model/conditioner/config.json", "kind", REMOVE, "kind"),
    ("model/conditioner/config.json", "num_labels", REMOVE, "num_labels"),
    ("model/conditioner/config.json", "dim", REMOVE, "dim"),
]
UNET_2D = rows(
    "unet/config.json",
    {
        "class_embed_type": (3, [], {}),
        "block_out_channels": ([8, 16, 16], [8]),
        "add_attention": NOT_BOOL,
        "downsample_type": (3, "nothing"),
        "attn_norm_num_groups": ("8", 0, -8, HUGE),
        "num_train_timesteps": ("1000", -1, 0, HUGE),
        "attention_head_dim": ("8", 0, -8, HUGE, 2.5),
        "sample_size": ("16", HUGE),
    },
)
DIT = rows(
    "transformer/config.json",
    {
        "num_layers": (*NOT_WHOLE, 100_000),
        "num_attention_heads": NOT_WHOLE,
        "attention_head_dim": NOT_WHOLE,
        "num_embeds_ada_norm": NOT_WHOLE[:6],
        "patch_size": NOT_WHOLE,
        "sample_size": (16_384, *NOT_WHOLE),
        "in_channels": NOT_WHOLE[:6],
        "out_channels": ("8", -8, HUGE),
        "norm_type": ("layer_norm", 3),
        "norm_eps": ("x", -1, []),
        "activation_fn": (3, []),
        "attention_bias": ("yes", 3),
        "norm_elementwise_affine": ("yes",),
        "dropout": ("x", 5),
        "_class_name": ("NoTransformer", 3),
    },
)
DIT += [
    ("model/model_index.json", "id2label", {"99": "far"}, "names for 100"),
    ("model/model_index.json", "id2label", {"0": 3}, "id2label"),
    ("model/model_index.json", "id2label", {"-1": "x"}, "id2label"),
    ("model/model_index.json", "id2label", {"1": ""}, "id2label"),
    ("model/model_index.json", "id2label", {"9" * 30: "x"}, "id2label"),
]

# Values of the right type that do not fit the other files.
UNFIT_TEXT = [
    ("model/unet/config.json", "transformer_layers_per_block", 0, "80 weights do not match"),
    ("model/unet/config.json", "conv_in_kernel", 2, "found shape [16, 4, 3, 3], expected [16, 4, 2, 2]"),
    ("model/unet/config.json", "attention_type", "gated", "describes 653,756 weights, its files hold 253,364"),
    ("model/unet/config.json", "cross_attention_dim", None, "unet/config.json"),
    ("model/unet/config.json", "cross_attention_dim", 64, "found shape [32, 32], expected [32, 64]"),
    ("model/unet/config.json", "in_channels", 9, "found shape [16, 4, 3, 3], expected [16, 9, 3, 3]"),
    ("model/vae/config.json", "latent_channels", 8, "vae/diffusion_pytorch_model.safetensors"),
    ("model/vae/config.json", "layers_per_block", 100, "describes 2,162,847 weights, its files hold 62,463"),
    ("model/text_encoder/config.json", "vocab_size", 500, "found shape [546, 32], expected [500, 32]"),
    ("model/text_encoder/config.json", "hidden_size", 64, "text_encoder/model.safetensors"),
    ("model/text_encoder/config.json", "num_hidden_layers", 3, "text_encoder"),
    ("model/text_encoder/config.json", "num_attention_heads", 3, "text_encoder/config.json"),
    ("model/text_encoder/config.json", "max_position_embeddings", 76, "found shape [77, 32], expected [76, 32]"),
    (
        "model/tokenizer/tokenizer_config.json",
        "pad_token",
        "no such token",
        "547 tokens, the text encoder's vocab_size",
    ),
    ("model/tokenizer/tokenizer_config.json", "model_max_length", 78, "78 tokens, but the text encoder has 77"),
    ("model/fastgen.json", "null_class", 1, "null class 1: this model has no class ids"),
]
UNFIT_LABELS = [
    ("model/conditioner/config.json", "num_labels", 23, "embed.weight is (32, 24), expected (32, 23)"),
    ("model/conditioner/config.json", "num_labels", 100_000, "expected (32, 100000)"),
    ("model/conditioner/config.json", "dim", 64, "embed.weight is (32, 24), expected (64, 24)"),
    ("model/conditioner/config.json", "hidden", 16, "embed.0.weight is missing"),
    ("model/conditioner/config.json", "kind", "concat", "dim: found 32, but the UNet takes 3 channels in all"),
    ("model/conditioner/config.json", "kind", "tokens", "embed.absent is missing"),
    ("model/conditioner/config.json", "embed", "identity", "dim is 32, expected 24"),
    ("model/conditioner/config.json", "embed", "embedding", "conditioner"),
    ("model/unet/config.json", "class_embed_type", None, "kind: found 'class_embed', but the UNet takes"),
    ("model/unet/config.json", "class_embed_type", "timestep", "describes 46,603 weights"),
    ("model/unet/config.json", "block_out_channels", [16, 16], "found shape [8], expected [16]"),
    ("model/unet/config.json", "norm_num_groups", 3, "num_channels (8) must be divisible by num_groups (3)"),
    ("model/unet/config.json", "norm_num_groups", None, "unet/config.json"),
    ("model/unet/config.json", "attention_head_dim", 3, "found shape [16], expected [15]"),
    ("model/unet/config.json", "sample_size", 15, "15 x 15 px: expected multiples of 2 px"),
]
UNFIT_CLASSES = [
    ("model/transformer/config.json", "attention_head_dim", 7, "embed_dim must be divisible by 2"),
    ("model/transformer/config.json", "patch_size", 3, "found shape [16, 4, 2, 2], expected [16, 4, 3, 3]"),
    ("model/transformer/config.json", "sample_size", 9, "18 x 18 px: expected multiples of 4 px"),
    ("model/transformer/config.json", "out_channels", 5, "found shape [32], expected [20]"),
    ("model/transformer/config.json", "activation_fn", "nothing", "transformer/config.json"),
    ("model/transformer/config.json", "num_layers", 512, "num_layers: found 512, but its files hold"),
]

TEXT_ROWS = [*UNET, *VAE, *TEXT_ENCODER, *TOKENIZER, *SCHEDULER, *INDEX, *UNFIT_TEXT]


def attacks(prefix: str, argv: Sequence[str], table: Iterable[tuple[str, str, Any, str]]) -> Any:
    return pytest.mark.parametrize("attack", json_attacks(prefix, argv, table), ids=str)


@attacks("text", PROMPT, TEXT_ROWS)
def test_a_text_model_that_lies_is_refused(attack, refused, text_model):
    refused(attack, model=text_model)


@attacks("defaults", DEFAULTS, SETTINGS)
def test_defaults_that_lie_are_refused(attack, refused, text_model):
    refused(attack, model=text_model)


@attacks("label", LABEL, [*LABELS, *CONDITIONER, *UNET_2D, *UNFIT_LABELS])
def test_a_label_model_that_lies_is_refused(attack, refused, label_model):
    refused(attack, model=label_model)


@pytest.fixture(scope="session")
def class_model(once) -> Path:
    """A DiT of 4 classes on latents, as diffusers' own pipeline saves it."""
    return once("models-classes/classes", partial(make_dit))


def make_dit(folder: Path) -> None:
    from gallery import dit_classes

    dit_classes(folder)


@attacks("class", CLASS, [*DIT, *UNFIT_CLASSES])
def test_a_class_model_that_lies_is_refused(attack, refused, class_model):
    refused(attack, model=class_model)


def test_every_option_of_a_network_has_a_type_and_bounds():
    import inspect

    import diffusers

    from fastgen.models.configs import DIFFUSERS
    from fastgen.models.layout import AUTOENCODERS, DENOISERS
    from fastgen.models.networks.labels import denoiser_class

    classes = [*map(denoiser_class, DENOISERS), *(getattr(diffusers, name) for name in AUTOENCODERS)]
    options = {key for cls in classes for key in inspect.signature(cls.__init__).parameters} - {"self"}
    assert options <= DIFFUSERS.keys()
    assert DIFFUSERS.keys() - options == {"_diffusers_version"}
