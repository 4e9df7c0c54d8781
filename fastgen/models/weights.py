"""Weights: reading files of tensors, loading networks strictly, the hash of a module."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import InputError, first_line
from fastgen.files.jsonfiles import brief, read_json

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
LISTED = 10
# Weights that a whole CLIP has beside its text encoder.
WHOLE_CLIP = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
# Keys that EMAModel of diffusers' training scripts adds to the config.json of unet_ema/.
AVERAGED = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
# Keys that diffusers itself writes besides its classes' arguments.
WRITTEN = {
    "AutoencoderTiny": ("block_out_channels",),
    "DiTTransformer2DModel": (
        *("num_vector_embeds", "only_cross_attention", "double_self_attention", "attention_type"),
    ),
}


def read_state(path: Path, allow_pickle: bool = False) -> Mapping[str, Any]:
    """Name -> tensor from a .safetensors file, or from a PyTorch pickle with `allow_pickle` (tensors and plain containers
    only; `torch.save(state_dict)` or `torch.save({"model": state_dict})`), on the CPU.

    Raises InputError for a file that cannot be read, a pickle without permission, and another kind of file.
    """
    if path.suffix not in (".safetensors", *PICKLES):
        raise InputError(f"{path}: expected a .safetensors file or one of {', '.join(PICKLES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected weights")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = unpickle(path, allow_pickle)
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise InputError(f'{path}: holds a {type(state).__name__}, expected {{"model": state_dict}}')
    return state


def load_state(module: nn.Module, state: Mapping[str, Any], path: Path, kind: str) -> None:
    """Load weights that fit exactly. Else InputError names the first ten that are missing, unexpected, of the wrong shape or
    not finite. `kind`: what the message calls the module."""
    wrong = _mismatches(module.state_dict(), state)
    if wrong:
        first = f" (the first {LISTED} listed)" if len(wrong) > LISTED else ""
        raise InputError(f"{path}: {len(wrong)} weights do not match {kind}{first}: {'; '.join(wrong[:LISTED])}")
    module.load_state_dict(state)


def pretrained(
    cls: Any, source: str | Path, where: str, may_ignore: Callable[[str], bool] = lambda key: False, **options: Any
) -> Any:
    """The network that `cls.from_pretrained(source, **options)` loads, float32, in eval mode.

    Raises InputError, which begins with `where`, for what cannot be read and for weights that are missing, unexpected (unless
    `may_ignore(key)`) or of another shape: `from_pretrained` warns about these and goes on with random values.
    """
    from safetensors import SafetensorError

    _check_config(cls, Path(source), options.get("subfolder"))
    options = {"use_safetensors": True, "torch_dtype": torch.float32, "ignore_mismatched_sizes": True, **options}
    try:
        module, info = cls.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{where}: cannot be loaded as a {cls.__name__}: {first_line(error)}") from None
    unexpected = [key for key in info["unexpected_keys"] if not may_ignore(key)]
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    wrong = sorted(map(str, (*info["missing_keys"], *mismatched, *unexpected)))
    wrong = [key for key in wrong if not key.endswith("position_ids")]
    if wrong:
        raise InputError(f"{where}: {len(wrong)} weights do not match {cls.__name__}, the first {wrong[0]}")
    if broken := [key for key, value in module.state_dict().items() if not torch.isfinite(value).all()]:
        raise InputError(f"{where}: {len(broken)} weights hold NaN or infinity, the first {broken[0]}")
    return module.eval()


def _check_config(cls: Any, folder: Path, subfolder: str | None) -> None:
    """InputError for a key of a diffusers network's config.json that its class does not have: it would be left out silently,
    and the network might compute something else. Keys without a value do no harm, nor do those of an average of weights."""
    file = folder / (subfolder or "") / "config.json"
    if not (hasattr(cls, "register_to_config") and file.is_file()):
        return
    config = read_json(file, infinity=True)
    known = {*inspect.signature(cls.__init__).parameters, *AVERAGED, *WRITTEN.get(cls.__name__, ())}
    foreign = [key for key, value in config.items() if key not in known and not key.startswith("_") and value]
    if foreign:
        what = f"{foreign[0]} = {brief(config[foreign[0]])}"
        raise InputError(f"{file}: {what}: {cls.__name__} of diffusers has no such option, and would leave it out")


def pretrained_tokenizer(source: str | Path, where: str, **options: Any) -> Any:
    """The tokenizer in `source`, CLIP's unless its config names another class. Raises InputError, which begins with `where`,
    where it is missing (`from_pretrained` would make an empty tokenizer of a folder without files) or cannot be read."""
    from transformers import AutoTokenizer, CLIPTokenizer

    folder = Path(source, options.get("subfolder", ""))
    if Path(source).is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{where}: its tokenizer is missing: {' or '.join(TOKENIZER_FILES)}")
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if not isinstance(config, dict):
        raise InputError(f"{where}: tokenizer_config.json: found {brief(config)}, expected an object")
    cls = CLIPTokenizer if str(config.get("tokenizer_class") or "CLIP").startswith("CLIP") else AutoTokenizer
    try:
        tokenizer = cls.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"{where}: its tokenizer cannot be read: {first_line(error)}") from None
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{where}: its tokenizer has no tokenizer.json; save it with transformers' fast class")
    return tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and progress bars; `pretrained` raises errors for what the warnings say."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        array = value.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, on the CPU. Raises InputError for a file that cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error}") from None


def unpickle(path: Path, allow_pickle: bool) -> Any:
    """The content of a `torch.save` file, tensors and plain containers only, on the CPU. Raises InputError without
    `allow_pickle`, and for a file that holds anything else or cannot be read."""
    import pickle

    if not allow_pickle:
        raise InputError(f"{path}: is a PyTorch pickle; if you trust where it came from, read it with --allow-pickle")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused: it is damaged or holds more than tensors and plain containers, such as a whole module; "
            "save its state dict alone: torch.save(module.state_dict(), FILE)"
        ) from None
    except Exception as error:  # damaged pickles raise anything: https://docs.python.org/3/library/pickle.html
        raise InputError(f"{path}: not a readable PyTorch checkpoint ({type(error).__name__})") from None


def _mismatches(expected: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    wrong = []
    for key, tensor in expected.items():
        value = state.get(key)
        if value is None:
            wrong.append(f"{key} is missing")
        elif not isinstance(value, Tensor):
            wrong.append(f"{key} is a {type(value).__name__}, expected a tensor")
        elif value.shape != tensor.shape:
            wrong.append(f"{key} is {tuple(value.shape)}, expected {tuple(tensor.shape)}")
        elif not torch.isfinite(value).all():
            wrong.append(f"{key} holds NaN or infinity")
    return wrong + [f"{key} is unexpected" for key in state if key not in expected]
