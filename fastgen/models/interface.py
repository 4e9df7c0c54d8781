"""The condition and the space of a model, read from its networks' configs; what fastgen does not run is refused by name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief
from fastgen.models.condition import Condition, Text
from fastgen.models.networks.labels import LabelConditioner
from fastgen.models.networks.text_encoder import pooled_encoder
from fastgen.models.pipelines import STATISTICS
from fastgen.models.space import Space
from fastgen.models.tokenizer import UNLIMITED

# Values of config keys of UNet2DConditionModel with which it takes inputs that fastgen does not give.
REFUSED = {
    "addition_embed_type": {
        "image": "image embeddings (Kandinsky 2.2)",
        "text_image": "image embeddings beside the text's (Kandinsky 2.1)",
        "image_hint": "image embeddings and a hint (Kandinsky 2.2 ControlNet)",
    },
    "encoder_hid_dim_type": {
        "image_proj": "image embeddings (Kandinsky 2.2)",
        "text_image_proj": "image embeddings beside the text's (Kandinsky 2.1)",
        "ip_image_proj": "image prompts (IP-Adapter)",
    },
}
CROPPING = ("UpBlock2D", "CrossAttnUpBlock2D")  # they take a size that is no multiple of 2
CLASS_EMBEDS = {
    "UNet2DConditionModel": ("timestep", "identity", "projection", "simple_projection"),
    "UNet2DModel": ("timestep", "identity"),
    "PatchUNet": ("identity",),
    "BroadcastUNet": (),
}
TIME_IDS = 6  # SDXL: original size, crop, target size


def check_supported(config: Mapping[str, Any], where: str) -> None:
    """InputError for a denoiser that takes inputs which fastgen does not give."""
    for key, values in REFUSED.items():
        if (value := config.get(key)) in values:
            raise InputError(
                f"{where}: {key} = {value!r}: this UNet takes {values[value]}, which fastgen does not give it"
            )
    if config.get("attention_type") not in (None, "default"):
        raise InputError(f"{where}: attention_type = {config['attention_type']!r}: this UNet takes boxes (GLIGEN)")


def condition_of(
    name: str,
    config: Mapping[str, Any],
    conditioner: LabelConditioner | None,
    names: Mapping[str, int] | None,
    text: Text | None,
    where: str,
    null_class: int | None = None,
) -> Condition:
    """The condition of a denoiser of the class `name` with this config.

    `names`: of labels or classes, where the folder has them; else they are numbered. `where`: the model folder, for messages.
    `null_class`: of a model whose own class ids do not say which one stands for no class. Raises InputError.
    """
    check_supported(config, where)
    guidance = int(config.get("time_cond_proj_dim") or 0)
    if text is not None and name != "UNet2DConditionModel":
        raise InputError(f"{where}: has a text encoder, but its {name} takes no text")
    if name == "UNet2DConditionModel":
        _check_states(config, conditioner, text, where)
    if null_class is not None and (name == "DiTTransformer2DModel" or (conditioner and not conditioner.takes_class)):
        raise InputError(
            f"{where}: null class {null_class}: this model has no class ids, or says itself which stands for none"
        )
    if conditioner is not None:
        count = int(conditioner.config["num_labels"])
        if conditioner.takes_class:
            return _classes(names, count, null_class, text, guidance, where)
        return Condition(text, labels=_names(names, count, where, exact=True), guidance_width=guidance)
    if name == "DiTTransformer2DModel":
        count = int(config["num_embeds_ada_norm"])
        return Condition(classes=_names(names, count, where), null_class=count)
    kind, classes = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind is None and classes is not None:
        return _classes(names, int(classes), null_class, text, guidance, where)
    if null_class is not None:
        raise InputError(f"{where}: null class {null_class}: this model has no class ids")
    if kind == "timestep":
        return Condition(text, number=True, guidance_width=guidance)
    if kind is None:
        return Condition(text, guidance_width=guidance)
    if kind not in CLASS_EMBEDS[name]:
        raise InputError(f"{where}: class_embed_type = {kind!r}: {name} has {', '.join(CLASS_EMBEDS[name])}")
    if kind == "identity":
        count = int(config.get("time_embedding_dim") or 4 * config["block_out_channels"][0])
        if names is None:
            raise InputError(
                f"{where}: class_embed_type = 'identity': the UNet takes a vector of {count} values, and there is no "
                "conditioner/ that makes it of labels, nor a labels.json that names them"
            )
    else:
        count = int(config["projection_class_embeddings_input_dim"])
    return Condition(text, labels=_names(names, count, where, exact=True), guidance_width=guidance)


def text_of(
    config: Mapping[str, Any],
    encoders: Sequence[Any],
    tokenizers: Sequence[Any],
    where: str,
    *,
    zero_unconditional: bool,
) -> Text | None:
    """The prompt's part of the condition, from the text encoders and their tokenizers; None where there are none. Raises
    InputError where they do not fit together, or not to the denoiser's config."""
    if not encoders:
        return None
    pooled_input = config.get("addition_embed_type") == "text_time"
    if len(encoders) > 1 and not pooled_input:
        raise InputError(f"{where}: has {len(encoders)} text encoders, but its UNet is none of SDXL's kind")
    lengths = []
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        if getattr(encoder.config, "use_attention_mask", False):
            raise InputError(f"{where}: text encoder: use_attention_mask: fastgen gives it no mask")
        lengths.append(_length(encoder.config, tokenizer, where))
    if len(set(lengths)) > 1:
        raise InputError(
            f"{where}: its tokenizers give {' and '.join(map(str, lengths))} tokens, expected the same number"
        )
    width = sum(_width(encoder.config) for encoder in encoders)
    last = pooled_encoder(encoders)
    projected = "Projection" in type(last).__name__
    pooled = int(last.config.projection_dim) if projected else _width(last.config)
    if pooled_input:
        expected, found = (
            pooled + TIME_IDS * config["addition_time_embed_dim"],
            config["projection_class_embeddings_input_dim"],
        )
        if found != expected or not projected:
            what = (
                f"{expected}: the pooled text's {pooled} and {TIME_IDS} sizes"
                if projected
                else "a projected text encoder"
            )
            raise InputError(f"{where}: projection_class_embeddings_input_dim = {found}, expected {what} (SDXL's base)")
    vocabulary = tuple(int(encoder.config.vocab_size) for encoder in encoders)
    for tokenizer, known in zip(tokenizers, vocabulary, strict=True):
        if len(tokenizer) > known:
            found = f"its tokenizer has {len(tokenizer)} tokens, the text encoder's vocab_size is {known}"
            raise InputError(f"{where}: {found}: they do not belong together")
    return Text(tuple(lengths), vocabulary, width, pooled, pooled_input, zero_unconditional)


def space_of(
    name: str,
    config: Mapping[str, Any],
    vae: Any | None,
    planes: int,
    where: str,
    size: tuple[int, int] | None = None,
    statistics: Collection[str] = STATISTICS,
) -> Space:
    """The space of a denoiser of the class `name`. `vae`: the autoencoder of latents. `planes`: channels of its input that hold
    the labels. `size`: height and width of the images, by default those that training had. `statistics`: those of the
    autoencoder's config that count. Raises InputError."""
    taken = int(config["in_channels"]) - planes
    given = int(config["out_channels"] or config["in_channels"])
    factor = 1 if vae is None else downscaling(vae)
    channels = taken if vae is None else latent_channels(vae)
    if taken != channels or given not in (channels, 2 * channels):
        _refuse_channels(taken, given, channels, vae is not None, where)
    if size is None:
        sample = config.get("sample_size")
        if sample is None:
            raise InputError(f"{where}: its config has no sample_size; give the images' --height and --width")
        height, width = _height_and_width(sample, where)
        size = height * factor, width * factor
    inside = size[0] // factor, size[1] // factor
    multiple = factor * multiple_of(name, config)
    if size[0] < 1 or size[1] < 1 or size[0] % multiple or size[1] % multiple:
        raise InputError(f"{where}: images of {size[1]} x {size[0]} px: expected multiples of {multiple} px")
    if vae is None:
        return Space((channels, *inside), (channels, *size), latent=False)
    return latent_space(vae, inside, size, statistics)


def _height_and_width(sample: Any, where: str) -> tuple[int, int]:
    """`sample_size`: a number, or height and width."""
    both = sample if isinstance(sample, list | tuple) else (sample, sample)
    if len(both) != 2 or not all(type(edge) is int and edge > 0 for edge in both):
        raise InputError(f"{where}: sample_size is {brief(sample)}, expected a whole number, or height and width")
    return both[0], both[1]


def latent_space(
    vae: Any, inside: tuple[int, int], size: tuple[int, int], statistics: Collection[str] = STATISTICS
) -> Space:
    """The latents (height and width `inside`) of images of height and width `size`. Raises InputError for statistics in the
    autoencoder's config that are no finite numbers, or not one for each channel."""
    channels = latent_channels(vae)
    for key in ("latents_mean", "latents_std"):
        if (found := vae.config.get(key)) is not None and (not _numbers(found) or len(found) != channels):
            raise InputError(f"vae: {key} = {brief(found)}: expected {channels} numbers, one for each channel")
    values = {key: vae.config.get(key) for key in STATISTICS if key in statistics}
    for key in ("scaling_factor", "shift_factor"):
        if (found := values.get(key)) is not None and (
            not _numbers([found]) or (key == "scaling_factor" and found == 0)
        ):
            raise InputError(
                f"vae: {key} = {brief(found)}: expected a number{', not 0' if key == 'scaling_factor' else ''}"
            )
    return Space(
        (channels, *inside),
        (int(vae.config.out_channels), *size),
        latent=True,
        scaling_factor=1.0 if values.get("scaling_factor") is None else float(values["scaling_factor"]),
        shift_factor=float(values.get("shift_factor") or 0.0),
        mean=tuple(map(float, values.get("latents_mean") or ())),
        std=tuple(map(float, values.get("latents_std") or ())),
    )


def _numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )


def multiple_of(name: str, config: Mapping[str, Any]) -> int:
    """What height and width of a denoiser's input must be multiples of. Most blocks of UNet2DConditionModel take any, as they
    crop."""
    if name == "DiTTransformer2DModel":
        return int(config["patch_size"])
    blocks = config.get("up_block_types", ())
    if name == "UNet2DConditionModel" and all(block in CROPPING for block in blocks):
        return 1
    down = (
        sum("Down" in block for block in config.get("down_block_types", ())[:-1])
        or len(config["block_out_channels"]) - 1
    )
    return 2**down * int(config.get("patch_size") or 1)


def downscaling(vae: Any) -> int:
    """How many pixels wide one latent is."""
    config = vae.config
    if type(vae).__name__ == "AutoencoderTiny":
        return int(config.upsampling_scaling_factor) ** (len(config.decoder_block_out_channels) - 1)
    return 2 ** (len(config.block_out_channels) - 1)


def latent_channels(vae: Any) -> int:
    return int(vae.config.get("vq_embed_dim") or vae.config.latent_channels)


def predicts_variance(config: Mapping[str, Any], channels: int) -> bool:
    """Whether a denoiser predicts a variance beside each of the `channels`."""
    return int(config["out_channels"] or config["in_channels"]) == 2 * channels


def _refuse_channels(taken: int, given: int, channels: int, latent: bool, where: str) -> None:
    space = f"the autoencoder's latents have {channels} channels" if latent else f"it takes {taken}"
    if taken != channels:
        more = taken - channels
        kinds = {
            9 - 4: "a mask and a masked image (inpainting)",
            4: "another image (InstructPix2Pix)",
            1: "a depth map",
        }
        what = kinds.get(more, "further images (upscaling, hints)") if more > 0 else "fewer channels"
        raise InputError(
            f"{where}: in_channels = {taken}, but {space}: this denoiser takes {what}, which fastgen does not give"
        )
    raise InputError(
        f"{where}: out_channels = {given}, but {space}: expected as many, or twice as many with a learned variance"
    )


def _check_states(
    config: Mapping[str, Any], conditioner: LabelConditioner | None, text: Text | None, where: str
) -> None:
    blocks = (*config["down_block_types"], config["mid_block_type"], *config["up_block_types"])
    crosses = any("CrossAttn" in str(block) for block in blocks)
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    widths = set(width) if isinstance(width, list | tuple) else {width}
    tokens = conditioner is not None and conditioner.kind == "tokens"
    if text is not None and tokens:
        raise InputError(f"{where}: its UNet has one cross-attention, for text or for labels as tokens, not for both")
    if text is None and not tokens:
        if crosses or config.get("addition_embed_type"):
            raise InputError(
                f"{where}: its UNet has cross-attention (encoder_hidden_states), but there is neither a text_encoder/ nor a "
                "conditioner/ that gives tokens"
            )
        return
    found = text.width if text is not None else int(conditioner.config["dim"])  # type: ignore[union-attr]
    if widths != {found}:
        key = "encoder_hid_dim" if config.get("encoder_hid_dim") else "cross_attention_dim"
        who = "the text encoder gives" if text is not None else "the conditioner gives tokens"
        raise InputError(f"{where}: {who} {found} wide, but the UNet takes {key} = {width}")


def _classes(
    names: Mapping[str, int] | None, count: int, null_class: int | None, text: Text | None, guidance: int, where: str
) -> Condition:
    if null_class is not None and not 0 <= null_class < count:
        raise InputError(f"{where}: null class {null_class}: expected 0 to {count - 1}, one of the class ids")
    classes = {name: i for name, i in _names(names, count, where).items() if i != null_class}
    return Condition(text, classes=classes, null_class=null_class, guidance_width=guidance)


def _names(names: Mapping[str, int] | None, count: int, where: str, exact: bool = False) -> dict[str, int]:
    if names is None:
        return {str(i): i for i in range(count)}
    highest = max(names.values())
    if highest >= count or (exact and highest != count - 1):
        raise InputError(f"{where}: names for {highest + 1} labels or classes, but the network has {count}")
    return dict(names)


def _width(config: Any) -> int:
    return int(config.d_model if config.model_type == "t5" else config.hidden_size)


def _length(config: Any, tokenizer: Any, where: str) -> int:
    """Tokens of a prompt: those that the tokenizer pads to, as training did; the text encoder must have so many positions."""
    positions = getattr(config, "max_position_embeddings", None)
    length = tokenizer.model_max_length
    if not isinstance(length, int | float) or isinstance(length, bool) or length < 2:
        raise InputError(f"{where}: its tokenizer's model_max_length is {brief(length)}, expected a number of tokens")
    if tokenizer.pad_token is None:
        raise InputError(f"{where}: its tokenizer has no pad_token, so prompts have no length")
    if length >= UNLIMITED:
        if positions is None:
            raise InputError(
                f"{where}: its tokenizer_config.json has no model_max_length, so the number of tokens that training padded "
                "prompts to is unknown; write it there"
            )
        return int(positions)
    if positions is not None and length > positions:
        raise InputError(
            f"{where}: its tokenizer gives {length} tokens, but the text encoder has {positions} positions"
        )
    return int(length)
