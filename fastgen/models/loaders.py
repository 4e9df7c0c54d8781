"""The boundary around other libraries' loaders: a folder's files are checked, then read without the network, without other
people's code and without a word on stderr; whatever a library raises becomes one line that names the file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from fastgen.errors import FastgenError, InputError, first_line
from fastgen.files.jsonfiles import brief
from fastgen.files.quiet import no_panics, verbose
from fastgen.files.records import named_value
from fastgen.models.configs import check_config, read_config
from fastgen.models.tensor_files import TensorInfo, read_headers
from fastgen.models.tokenizer import check_tokenizer_files
from fastgen.models.weight_choice import weight_files

LIBRARIES = ("diffusers", "transformers", "huggingface_hub", "accelerate", "tokenizers", "safetensors", "torch")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
# Weights that a whole CLIP has beside its text encoder.
WHOLE_CLIP = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
FLOATS = ("F64", "F32", "F16", "BF16")
RATIO = 1.01  # of a network's weights to those in its files, where some are stored once and used twice


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' log lines, warnings and progress bars off stderr, unless `verbose`."""
    if verbose():
        yield
        return
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.enter_context(_no_bars())
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def boundary(place: object, what: str = "a model", *, local: bool = True) -> Iterator[None]:
    """Run a library's loader: quietly, and where all is `local` without the network.

    Raises InputError, `place: cannot be loaded as WHAT ...`, for whatever the library raises; FastgenError without memory.
    """
    import huggingface_hub.constants

    offline = mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with quiet(), ExitStack() as stack:
        if local:
            stack.enter_context(offline)
        try:
            yield
        except (FastgenError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic in a library written in Rust is no Exception
            if isinstance(error, MemoryError) or "memory" in str(error).lower():
                raise FastgenError(f"{place}: memory ran out while it was loaded as {what}") from error
            kind = type(error).__name__
            raise InputError(f"{place}: cannot be loaded as {what} ({kind}: {first_line(error)[:160]})") from error


def pretrained(
    cls: Any, source: str | Path, where: str, may_ignore: Callable[[str], bool] = lambda key: False, **options: Any
) -> Any:
    """The network that `cls.from_pretrained(source, **options)` loads, float32, in eval mode.

    Raises InputError, which begins with `where` or the file, for what cannot be read, before memory is used for a config that
    does not fit the weights, and for weights that are missing, unexpected (unless `may_ignore(key)`), of another shape or not
    finite: `from_pretrained` warns about these and goes on with random values.
    """
    folder = Path(source, options.get("subfolder") or "")
    local = folder.is_dir()
    options = {"use_safetensors": True, "torch_dtype": torch.float32, "ignore_mismatched_sizes": True, **options}
    if local:
        check_network(cls, folder, allow_pickle=not options["use_safetensors"])
    with boundary(where, f"a {cls.__name__}", local=local):
        module, info = cls.from_pretrained(source, output_loading_info=True, **options)
    unexpected = [key for key in info["unexpected_keys"] if not may_ignore(key)]
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    wrong = sorted(map(str, (*info["missing_keys"], *mismatched, *unexpected)))
    wrong = [key for key in wrong if not key.endswith("position_ids")]
    if wrong:
        raise InputError(f"{where}: {len(wrong)} weights do not match {cls.__name__}, the first {wrong[0]}")
    if broken := [key for key, value in module.state_dict().items() if not torch.isfinite(value).all()]:
        raise InputError(f"{where}: {len(broken)} weights hold NaN or infinity, the first {broken[0]}")
    return module.eval()


def check_network(cls: Any, folder: Path, *, allow_pickle: bool = False, weights: bool = True) -> None:
    """InputError where a network's config.json is not what `cls` takes, or describes other weights than its files hold. Only
    the files' headers are read, and no memory is used. `weights` False: the weights come from elsewhere."""
    file = folder / "config.json"
    files = weight_files(folder, allow_pickle=allow_pickle).files if weights else ()
    safe = [one for one in files if one.suffix == ".safetensors"]
    headers = read_headers(safe)
    check_config(cls, file, len(headers) if safe else 1000)
    config = read_config(file)
    try:
        with boundary(file, f"a {cls.__name__}"), torch.device("meta"):
            module = empty(cls, config)
    except InputError as error:
        problem = str(error).partition("(")[2].rpartition(")")[0] or str(error)
        found = named_value(config, problem)
        raise InputError(f"{file}: {found}{cls.__name__} refuses it ({problem})") from None
    if safe:
        _compare(module, headers, folder, file)


def empty(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    """The network that a config describes, with fresh weights, or without any where torch's device is "meta"."""
    if hasattr(cls, "register_to_config"):
        return cls.from_config(dict(config))
    part = config.get(cls.config_class.base_config_key) if config.get("model_type") == "clip" else None
    return cls(cls.config_class.from_dict(dict(part or config)))


def _compare(module: nn.Module, headers: Mapping[str, TensorInfo], folder: Path, file: Path) -> None:
    """InputError for a weight whose file has another shape than the config says, or no numbers with a fraction; and where the
    config describes more weights than there are."""
    expected = dict(module.state_dict())
    for name, info in headers.items():
        others = (name, name.removeprefix("text_model."), f"text_model.{name}")
        value = next((expected[other] for other in others if other in expected), None)
        if value is None:
            continue
        if tuple(value.shape) != info.shape:
            raise InputError(
                f"{info.file}: {name}: found shape {list(info.shape)}, expected {list(value.shape)}, as {file.name} says"
            )
        if value.is_floating_point() and info.dtype not in FLOATS:
            raise InputError(f"{info.file}: {name}: found dtype {info.dtype}, expected {', '.join(FLOATS)}")
    described = sum(p.numel() for p in module.parameters())
    stored = sum(info.count for info in headers.values())
    if described > RATIO * stored:
        missing = next((name for name in expected if name not in headers), "some")
        raise InputError(
            f"{folder}: {file.name} describes {described:,} weights, its files hold {stored:,}; the first that is missing is "
            f"{missing}"
        )


def pretrained_tokenizer(source: str | Path, where: str, **options: Any) -> Any:
    """The tokenizer in `source`, CLIP's unless its config names another class. Raises InputError, which begins with `where` or
    the file, where it is missing (`from_pretrained` would make an empty tokenizer of a folder without files) or cannot be
    read."""
    from transformers import AutoTokenizer, CLIPTokenizer

    folder = Path(source, options.get("subfolder", ""))
    local = Path(source).is_dir()
    if local and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{where}: its tokenizer is missing: {' or '.join(TOKENIZER_FILES)}")
    name = "CLIP"
    if local:
        name = check_tokenizer_files(folder) or name
        _check_class(name, folder)
    cls = CLIPTokenizer if name.startswith("CLIP") else AutoTokenizer
    place = next((folder / one for one in TOKENIZER_FILES if (folder / one).is_file()), where)
    with boundary(place, "a tokenizer", local=local), no_panics():
        tokenizer = cls.from_pretrained(source, trust_remote_code=False, **options)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{where}: its tokenizer has no tokenizer.json; save it with transformers' fast class")
    return tokenizer


def _check_class(name: str, folder: Path) -> None:
    """InputError for a `tokenizer_class` that is no tokenizer of transformers: its name would be looked for on a hub."""
    import transformers

    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if name != "CLIP" and not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedTokenizerBase)):
        expected = "a tokenizer class of transformers, such as CLIPTokenizer"
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class: found {brief(name)}, expected {expected}"
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
