"""The config.json of the networks that fastgen runs: type and bounds of each field, checked before a library reads it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief, read_json
from fastgen.files.records import Edge, Factor, Index, Name, Record, Tokens, Width, to_record

MAX_GRID = 512  # patches along a side of a transformer, which keeps a table with a row for each patch

Layers = Annotated[int, Meta(ge=1, le=512)]  # of a block, or of a whole transformer
Heads = Annotated[int, Meta(ge=1, le=4096)]
Kernel = Annotated[int, Meta(ge=1, le=31)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Epsilon = Annotated[float, Meta(ge=0, le=1)]
Scale = Annotated[float, Meta(gt=0, le=1e6)]
# No tuple[Edge, Edge]: in a union with a bounded number it crashes msgspec 0.23 when garbage is collected.
Both = Annotated[tuple[Edge, ...], Meta(min_length=2, max_length=2)]
Widths = Annotated[tuple[Width, ...], Meta(min_length=1, max_length=32)]
Blocks = Annotated[tuple[Name, ...], Meta(min_length=1, max_length=32)]
Depths = Annotated[tuple[Layers, ...], Meta(min_length=1, max_length=32)]
Transformers = Annotated[int, Meta(ge=0, le=512)]  # in a place of a UNet; those without attention may say 0
Nested = Annotated[tuple[Transformers | tuple[Transformers, ...], ...], Meta(min_length=1, max_length=32)]
Flags = Annotated[tuple[bool, ...], Meta(min_length=1, max_length=32)]
Statistics = Annotated[tuple[Factor, ...], Meta(min_length=1, max_length=1024)]
Activation = Literal["silu", "swish", "mish", "gelu", "relu"]
Shift = Literal["default", "scale_shift", "ada_group", "spatial"]

# Fields of diffusers' networks, of all classes that fastgen runs; a field means the same in each.
DIFFUSERS: dict[str, Any] = {
    "sample_size": Edge | Both | None,
    "in_channels": Width,
    "out_channels": Width | None,
    "latent_channels": Width,
    "center_input_sample": bool,
    "flip_sin_to_cos": bool,
    "freq_shift": Annotated[float, Meta(ge=0, le=10)],
    "down_block_types": Blocks,
    "mid_block_type": Name | None,
    "up_block_types": Blocks,
    "block_out_channels": Widths,
    "layers_per_block": Layers | Depths,
    "transformer_layers_per_block": Transformers | Nested,
    "reverse_transformer_layers_per_block": Nested | None,
    "only_cross_attention": bool | Flags,
    "downsample_padding": Annotated[int, Meta(ge=0, le=15)],
    "mid_block_scale_factor": Scale,
    "dropout": Probability,
    "act_fn": Activation,
    "norm_num_groups": Width | None,
    "attn_norm_num_groups": Width | None,
    "norm_eps": Epsilon,
    "cross_attention_dim": Width | Widths | None,
    "encoder_hid_dim": Width | None,
    "encoder_hid_dim_type": Name | None,
    "attention_head_dim": Width | Widths | None,
    "num_attention_heads": Heads | Depths | None,
    "dual_cross_attention": bool,
    "use_linear_projection": bool,
    "class_embed_type": Name | None,
    "addition_embed_type": Name | None,
    "addition_embed_type_num_heads": Heads,
    "addition_time_embed_dim": Width | None,
    "num_class_embeds": Width | None,
    "upcast_attention": bool,
    "resnet_time_scale_shift": Shift,
    "resnet_skip_time_act": bool,
    "resnet_out_scale_factor": Scale,
    "time_embedding_type": Literal["positional", "fourier", "learned"],
    "time_embedding_dim": Width | None,
    "time_embedding_act_fn": Activation | None,
    "timestep_post_act": Activation | None,
    "time_cond_proj_dim": Width | None,
    "conv_in_kernel": Kernel,
    "conv_out_kernel": Kernel,
    "projection_class_embeddings_input_dim": Width | None,
    "attention_type": Name | None,
    "class_embeddings_concat": bool,
    "mid_block_only_cross_attention": bool | None,
    "cross_attention_norm": Name | None,
    "downsample_type": Literal["conv", "resnet"],
    "upsample_type": Literal["conv", "resnet"],
    "add_attention": bool,
    "num_train_timesteps": Width | None,
    "num_layers": Layers,
    "attention_bias": bool,
    "patch_size": Annotated[int, Meta(ge=1, le=256)],
    "activation_fn": Name,
    "num_embeds_ada_norm": Width | None,
    "norm_type": Name,
    "norm_elementwise_affine": bool,
    "label_dim": Width,
    "time_dim": Width,
    "scaling_factor": Factor | None,
    "shift_factor": Factor | None,
    "latents_mean": Statistics | None,
    "latents_std": Statistics | None,
    "force_upcast": bool | Annotated[float, Meta(ge=0, le=1)],
    "use_quant_conv": bool,
    "use_post_quant_conv": bool,
    "mid_block_add_attention": bool,
    "encoder_block_out_channels": Widths,
    "decoder_block_out_channels": Widths,
    "upsample_fn": Name,
    "upsampling_scaling_factor": Annotated[int, Meta(ge=1, le=16)],
    "num_encoder_blocks": Depths,
    "num_decoder_blocks": Depths,
    "latent_magnitude": Scale,
    "latent_shift": Factor,
    "num_vq_embeddings": Width,
    "vq_embed_dim": Width | None,
    "lookup_from_codebook": bool,
    "_diffusers_version": Name,
}
# Each field has a default, as in diffusers; it is not used.
DiffusersConfig: Any = msgspec.defstruct(
    "DiffusersConfig", [(key, kind, None) for key, kind in DIFFUSERS.items()], bases=(Record,), frozen=True
)
# Keys that EMAModel of diffusers' training scripts adds to the config.json of unet_ema/.
AVERAGED = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
# Keys that diffusers itself writes besides its classes' arguments.
WRITTEN = {
    "AutoencoderTiny": ("block_out_channels",),
    "DiTTransformer2DModel": ("num_vector_embeds", "only_cross_attention", "double_self_attention", "attention_type"),
}
DEPTHS = ("layers_per_block", "transformer_layers_per_block", "num_layers", "num_hidden_layers")


class TransformersConfig(Record, frozen=True, forbid_unknown_fields=False):
    """What transformers' CLIP and T5 read of their config.json. A field that is not here is not used by the text encoder."""

    architectures: Annotated[tuple[Name, ...], Meta(max_length=8)] | None = None
    model_type: Literal["clip", "clip_text_model", "t5"] | None = None
    vocab_size: Width = 1
    hidden_size: Width = 1
    intermediate_size: Width = 1
    projection_dim: Width | None = None
    num_hidden_layers: Layers = 1
    num_attention_heads: Heads = 1
    max_position_embeddings: Tokens = 1
    hidden_act: Name = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    attention_dropout: Probability = 0.0
    d_model: Width = 1
    d_kv: Width = 1
    d_ff: Width = 1
    num_layers: Layers = 1
    num_decoder_layers: Layers | None = None
    num_heads: Heads = 1
    relative_attention_num_buckets: Width = 32
    relative_attention_max_distance: Width = 128
    dropout_rate: Probability = 0.0
    layer_norm_epsilon: Epsilon = 1e-6
    feed_forward_proj: Name = "relu"
    initializer_factor: Factor | None = 1.0
    initializer_range: Factor = 0.02
    pad_token_id: Index | None = None
    bos_token_id: Index | None = None
    eos_token_id: Index | tuple[Index, ...] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    auto_map: None = None
    quantization_config: None = None
    attn_implementation: None = None
    _attn_implementation: None = None
    text_config: Mapping[str, Any] | None = None


def read_config(file: Path) -> dict[str, Any]:
    """A network's config.json. Raises InputError where it is no object."""
    if not file.is_file():
        raise InputError(f"{file}: no such file, expected a saved network")
    config = read_json(file, infinity=True)
    if not isinstance(config, dict):
        raise InputError(f"{file}: found {brief(config)}, expected an object")
    return config


def check_config(cls: Any, file: Path, tensors: int) -> None:
    """InputError, which names file and field, for a value of another type or out of bounds, and for a key that the class of
    diffusers does not have: it would be left out silently, and the network might compute something else. Keys without a value
    do no harm, nor do those of an average of weights.

    `tensors`: in the network's files of weights; no network has more layers.
    """
    config = read_config(file)
    if hasattr(cls, "register_to_config"):
        to_record({k: v for k, v in config.items() if k in DIFFUSERS}, DiffusersConfig, file)
        known = {*inspect.signature(cls.__init__).parameters, *AVERAGED, *WRITTEN.get(cls.__name__, ())}
        foreign = [key for key, value in config.items() if key not in known and not key.startswith("_") and value]
        if foreign:
            what = f"{foreign[0]} = {brief(config[foreign[0]])}"
            raise InputError(f"{file}: {what}: {cls.__name__} of diffusers has no such option, and would leave it out")
        _check_grid(config, file)
    else:
        to_record(config, TransformersConfig, file)
        to_record(config.get("text_config") or {}, TransformersConfig, file, "text_config")
    for key, value in (config | (config.get("text_config") or {})).items():
        if key in DEPTHS and max(_numbers(value), default=0) > tensors:
            raise InputError(f"{file}: {key}: found {brief(value)}, but its files hold {tensors} tensors in all")


def _check_grid(config: Mapping[str, Any], file: Path) -> None:
    size, patch = config.get("sample_size"), config.get("patch_size")
    if "num_layers" in config and isinstance(size, int) and isinstance(patch, int) and size // patch > MAX_GRID:
        expected = f"at most {MAX_GRID} patches of {patch} along a side"
        raise InputError(f"{file}: sample_size: found {size}, expected {expected}")


def _numbers(value: Any) -> Iterable[int]:
    if isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int):
        yield value
