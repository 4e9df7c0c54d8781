"""Fields of a request that mean something to other programs: fastgen honours a field, refuses it, or says that it ignores it.

A request has a condition, a name and a seed. How images are sampled is said once for the whole job, by options of the command.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief

CLASS_KEYS = ("class", "class_id", "class_label", "class_name", "label")  # one class, in place of a list of labels
PROMPT_KEYS = ("prompt", "text", "caption")  # the first one that a request has is its prompt, the others are ignored
FIELDS = ("image_name", "prompt", "text_prompt", "labels", *CLASS_KEYS, "seed")
# Fields of the tasks' files that describe a picture: `text_prompt` is made of the first two, and training sets have the others.
DESCRIPTIONS = ("given_description", "action_description", "num_frames", "original_name")

RENAMED = {
    **dict.fromkeys(("random_seed", "noise_seed", "generator_seed"), "seed"),
    **dict.fromkeys(("file_name", "filename", "image_file", "output", "output_name", "output_path"), "image_name"),
}
# Field -> the option of `fastgen generate` that sets the same for the whole job.
OPTIONS = {
    **dict.fromkeys(
        ("num_inference_steps", "inference_steps", "sampling_steps", "num_steps", "steps"), "--num-inference-steps"
    ),
    **dict.fromkeys(("guidance_scale", "guidance", "cfg_scale", "cfg"), "--guidance-scale"),
    **dict.fromkeys(("scheduler", "scheduler_name", "sampler", "sampler_name", "solver"), "--scheduler"),
    **dict.fromkeys(("strength", "denoising_strength"), "--strength"),
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            *("guidance_interval", "noise_steps", "rag", "rag_top_k", "normalize", "batch_size"),
            *("cache_interval", "model", "checkpoint", "engine", "dtype", "device", "width", "height", "lora"),
        )
    },
}
SIZE = "every image of a job has the size that --height and --width say, by default training's"
START = "an image starts from noise, or with --rag from the nearest training image"
ONE = "a request is one image; repeat it with another image_name and seed"
WHOLE = "a job runs one model as it is"
NONE = "fastgen has no such setting"
UNSUPPORTED = {
    **dict.fromkeys(("negative_prompt", "negative_prompt_2", "negative"), "fastgen takes no negative prompts"),
    **dict.fromkeys(("prompt_2", "prompt_3"), "a model has one prompt"),
    **dict.fromkeys(("size", "image_size", "resolution", "aspect_ratio"), SIZE),
    **dict.fromkeys(("init_image", "init_images", "input_image", "image", "mask", "mask_image", "latents"), START),
    **dict.fromkeys(("control_image", "ip_adapter_image"), START),
    **dict.fromkeys(("num_images", "num_images_per_prompt", "num_outputs", "n", "count", "n_iter", "samples"), ONE),
    **dict.fromkeys(("loras", "lora_scale", "vae", "controlnet", "ip_adapter", "refiner"), WHOLE),
    **dict.fromkeys(("textual_inversion", "embeddings", "adapter", "adapters"), WHOLE),
    **dict.fromkeys(("clip_skip", "eta", "guidance_rescale", "timesteps", "sigmas", "cross_attention_kwargs"), NONE),
}
# Values with which a field asks for nothing; null, a blank text and an empty list do so in every field.
NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys((name for name, why in UNSUPPORTED.items() if why == ONE), (1,)),
    **dict.fromkeys(("strength", "denoising_strength", "rag_top_k", "batch_size", "cache_interval"), (1,)),
    **dict.fromkeys(("clip_skip", "eta", "guidance_rescale", "lora_scale"), (0,)),
    "normalize": ("clamp",),
}
LISTED = 10  # keys that a note names, problems that an error does


def check_fields(entry: Mapping[str, Any]) -> list[str]:
    """The keys of a request that are no part of it and are ignored, such as `id` or `tags`.

    Raises InputError for keys that ask for something else than what will be done: settings of the whole job, settings that
    fastgen lacks, and other names of `seed` and `image_name`. A value that asks for nothing, such as null, is no such key.
    """
    options: dict[str, str] = {}
    problems: list[str] = []
    ignored: list[str] = []
    for key, name, value in _asked(entry):
        if name in OPTIONS:
            options[key] = _option(OPTIONS[name], value)
        elif name in UNSUPPORTED:
            problems.append(f"{brief(key)}: {UNSUPPORTED[name]}; take the key out")
        elif right := RENAMED.get(name, name if name in FIELDS else None):
            problems.append(f"{brief(key)}: call it {right!r}, or take the key out")
        else:
            ignored.append(key)
    if options:
        keys, words = ", ".join(map(brief, options)), " ".join(dict.fromkeys(options.values()))
        what = f"fastgen has one setting for the whole job; give {words} to the command"
        problems.insert(0, f"{keys}: {what}, and take the key{'s' if len(options) > 1 else ''} out")
    if problems:
        raise InputError("; ".join(problems[:LISTED]))
    return ignored


def ignored_note(keys: Iterable[str], requests: int) -> str:
    """A line about all ignored keys of a file of so many requests; `keys`: once for each request that has it."""
    counts = Counter(keys)
    words = [brief(key) + ("" if n == requests else f" ({n} of {requests} requests)") for key, n in counts.items()]
    more = f", ... ({len(words)} keys)" if len(words) > LISTED else ""
    return f"ignored, as no part of a request: {', '.join(words[:LISTED])}{more}"


def _asked(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(key, its name in lower case with underscores, value) of what is no field of a request and has a value that asks for
    something; an object under an unknown key, such as `params`, gives its own keys, as `params.steps`."""
    prompt = next((key for key in ("text_prompt", *PROMPT_KEYS) if entry.get(key) is not None), None)
    for key, value in entry.items():
        if not prefix and key in (*FIELDS, *DESCRIPTIONS, prompt):
            continue
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s-]+", "_", key).lower()
        known = name in OPTIONS or name in UNSUPPORTED or name in RENAMED or name in FIELDS
        if isinstance(value, dict) and not known and not prefix:
            yield from _asked(value, f"{key}.")
        elif not _asks_for_nothing(name, value):
            yield prefix + key, name, value


def _asks_for_nothing(name: str, value: object) -> bool:
    if value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip()):
        return True
    if name == "size":  # a picture's size has digits; that of a thing in it is a word
        return isinstance(value, str) and not any(map(str.isdigit, value))
    return not isinstance(value, bool) and value in NEUTRAL.get(name, ())


def _option(option: str, value: object) -> str:
    plain = isinstance(value, int | float | str) and not isinstance(value, bool) and len(str(value)) <= 40
    return f"{option} {shlex.quote(str(value))}" if plain else option
