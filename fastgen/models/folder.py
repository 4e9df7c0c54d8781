"""Model folders (diffusers layout) -> PyTorch modules.

This is the one module of generation that needs torch, diffusers and transformers: bundles do not.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastgen.errors import InputError, first_line
from fastgen.files.hashes import sha256_file, sha256_names
from fastgen.files.jsonfiles import brief, located
from fastgen.files.names import read_objects
from fastgen.models import interface, pipelines
from fastgen.models.checkpoint_choice import RunWeights, choose_weights, model_parts
from fastgen.models.condition import Condition, Text
from fastgen.models.configs import read_config
from fastgen.models.layout import AUTOENCODERS, SETTINGS, TEXT_ENCODERS, Layout, class_names, read_layout
from fastgen.models.loaders import (
    WHOLE_CLIP,
    boundary,
    check_network,
    empty,
    pretrained,
    pretrained_tokenizer,
)
from fastgen.models.lora import Lora, fuse
from fastgen.models.networks.autoencoder import VaeDecoder, VaeEncoder
from fastgen.models.networks.denoiser import Denoiser
from fastgen.models.networks.labels import LabelConditioner, check_fits, denoiser_class, load_conditioner
from fastgen.models.networks.split_unet import ShallowDenoiser, WholeDenoiser, deep_shape, why_whole
from fastgen.models.networks.text_encoder import TextEncoder
from fastgen.models.settings import Settings, read_scheduler, read_settings, trained_mode
from fastgen.models.signatures import UNET_SHALLOW, UNET_WHOLE, Signature, model_signatures
from fastgen.models.space import Space
from fastgen.models.spec import Spec
from fastgen.models.tokenizer import Tokenizer
from fastgen.models.weight_choice import weight_files
from fastgen.models.weights import load_state
from fastgen.sampling.compile import TableCompiler
from fastgen.sampling.defaults import Sampling
from fastgen.sampling.schedulers import check_name, default_name
from fastgen.sampling.tables import SolverTable


@dataclass
class Model:
    """A model in memory, in eval mode: its networks, and what it is conditioned on.

    `folder` and `layout`: where it lies; None for one that was never saved. `names`: label or class name -> index, where the
    folder names them. `text_encoders` and `tokenizers`: none, one, or the two of SDXL. `size`: height and width of the images,
    where they are not training's.
    """

    folder: Path | None
    unet: nn.Module  # or the transformer: what denoises
    scheduler_config: dict[str, Any]
    sampling: Sampling
    conditioner: LabelConditioner | None = None
    names: dict[str, int] | None = None
    null_class: int | None = None
    text_encoders: list[nn.Module] = field(default_factory=list)
    tokenizers: list[Any] = field(default_factory=list)  # of transformers
    vae: nn.Module | None = None
    layout: Layout | None = None
    run_weights: RunWeights | None = None  # of the UNet and the conditioner, where they come from a checkpoint
    size: tuple[int, int] | None = None
    loras: tuple[Lora, ...] = ()

    @cached_property
    def condition(self) -> Condition:
        return interface.condition_of(
            type(self.unet).__name__,
            self._config,
            self.conditioner,
            self.names,
            self._text,
            self.where,
            self.null_class,
        )

    @cached_property
    def space(self) -> Space:
        conditioner = self.conditioner
        planes = int(conditioner.config["dim"]) if conditioner is not None and conditioner.kind == "concat" else 0
        counted = pipelines.latent_statistics(self.layout.pipeline if self.layout else None, self.vae)
        return interface.space_of(
            type(self.unet).__name__, self._config, self.vae, planes, self.where, self.size, counted
        )

    def networks(self) -> dict[str, nn.Module]:
        """The modules under the names and interfaces of `signatures`."""
        networks: dict[str, nn.Module] = {}
        if self.text_encoders:
            networks["text_encoder"] = TextEncoder(self.text_encoders, penultimate=self._takes_sizes).eval()
        networks["unet"] = self.denoiser().eval()
        if self.vae is not None:
            networks |= {"vae_decoder": VaeDecoder(self.vae).eval(), "vae_encoder": VaeEncoder(self.vae).eval()}
        return networks

    def split_networks(self) -> dict[str, nn.Module]:
        """The modules of a split UNet under the names of `split_signatures`; empty for a denoiser that cannot be split."""
        if why_whole(self.unet):
            return {}
        denoiser = self.denoiser()
        return {UNET_WHOLE: WholeDenoiser(denoiser).eval(), UNET_SHALLOW: ShallowDenoiser(denoiser).eval()}

    def check_split(self) -> None:
        """InputError for a denoiser that cannot be split."""
        if problem := why_whole(self.unet):
            raise InputError(f"{self.where}: --cache-interval: {problem}, which cannot be split")

    def shallow_share(self) -> float:
        """See `Source.shallow_share`. Nothing is computed: the products follow from the shapes."""
        self.check_split()
        counts = {}
        for name, network in self.split_networks().items():
            inputs = self.spec.split_signatures[name].inputs
            # Of fused attention torch counts nothing on a CPU.
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                tensors = [torch.zeros(t.with_batch(1), dtype=getattr(torch, t.dtype)) for t in inputs]
                with FlopCounterMode(display=False) as counter:
                    network(*tensors)
            counts[name] = counter.get_total_flops()
        return counts[UNET_SHALLOW] / counts[UNET_WHOLE]

    def denoiser(self) -> Denoiser:
        """The UNet or transformer with its conditioner; in training mode, as its parts are."""
        channels, (_, height, width) = self.space.shape[0], self.space.image
        return Denoiser(
            self.unet,
            [name for name, *_ in self.condition.inputs],
            self.conditioner,
            channels=channels if interface.predicts_variance(self._config, channels) else None,
            time_ids=(height, width, 0, 0, height, width)
            if self.condition.text and self.condition.text.pooled_input
            else None,
        )

    def signatures(self) -> dict[str, Signature]:
        return model_signatures(self.condition, self.space)

    @cached_property
    def spec(self) -> Spec:
        """Raises InputError for a model that was never saved: it has no files to hash."""
        if self.folder is None or self.layout is None:
            raise InputError("this model lives in memory only; save it with save_model and load the folder")
        hashes, parts = _hashes(self.folder, self.layout, self.run_weights)
        hashes |= {f"lora {i}": f"{lora.sha256} x {lora.scale}" for i, lora in enumerate(self.loras)}
        return Spec(
            condition=self.condition,
            space=self.space,
            sampling=self.sampling,
            scheduler_config=self.scheduler_config,
            sha256=sha256_names(hashes),
            checkpoint=self.layout.label if self.run_weights is None else self.run_weights.label,
            image_mode=trained_mode(self.folder),
            component_sha256=parts,
            deep_feature=None if why_whole(self.unet) else deep_shape(self.unet, self.space.shape),
        )

    def prompt_tokenizers(self) -> list[Tokenizer]:
        """One per text encoder."""
        inputs = self.signatures()["text_encoder"].inputs
        return [
            Tokenizer(
                copy.deepcopy(t.backend_tokenizer),
                t.pad_token,
                int(ids.shape[1]),
                ids.high,
                t.padding_side == "left",
                t.truncation_side == "left",
            )
            for t, ids in zip(self.tokenizers, inputs, strict=True)
        ]

    def table(self, key: str) -> SolverTable:
        """The solver table `NAME:STEPS[:NOISE_STEPS]` of this model's noise schedule, compiled now."""
        with located(self.where):
            return TableCompiler(self.scheduler_config).table(key)

    @property
    def where(self) -> str:
        """What messages call it."""
        return "this model" if self.folder is None else str(self.folder)

    @property
    def _config(self) -> Any:
        return self.unet.config

    @cached_property
    def _text(self) -> Text | None:
        zero = self.layout is not None and self.layout.zero_unconditional and self._takes_sizes
        return interface.text_of(self._config, self.text_encoders, self.tokenizers, self.where, zero_unconditional=zero)

    @property
    def _takes_sizes(self) -> bool:
        """Whether the UNet takes a pooled text and sizes, as SDXL's."""
        return self._config.get("addition_embed_type") == "text_time"


def load_model(
    folder: str | os.PathLike[str],
    checkpoint: str | None = None,
    *,
    size: tuple[int, int] | None = None,
    loras: Sequence[Lora] | None = None,
    allow_pickle: bool = False,
) -> Model:
    """Load a model folder onto the CPU in float32, in eval mode.

    `checkpoint`: which of a training run's weights, see `checkpoint_choice.choose_checkpoint` (the run need not be finished);
    "ema" also takes the averaged weights in unet_ema/, where diffusers' training script wrote them. `size`: height and width of
    the images, by default training's. `loras`: fused into the weights; an empty sequence leaves those beside the folder out.
    `allow_pickle`: read .bin files too. Raises InputError when the folder is not a model folder, a component is missing, a
    weight does not match its architecture, or the model needs what fastgen does not give."""
    parts = model_parts(Path(folder), checkpoint)
    with boundary(parts):
        return _load(Path(folder), parts, checkpoint, size, loras, allow_pickle)


def _load(
    folder: Path,
    parts: Path,
    checkpoint: str | None,
    size: tuple[int, int] | None,
    loras: Sequence[Lora] | None,
    allow_pickle: bool,
) -> Model:
    layout = read_layout(parts, checkpoint, has_lora=loras is not None)
    run_weights = choose_weights(folder, checkpoint, layout.label)
    scheduler_config = read_scheduler(parts)
    settings = read_settings(parts)
    cls = denoiser_class(layout.denoiser_class)
    unet = _denoiser(cls, parts / layout.denoiser, run_weights, allow_pickle)
    conditioner = None
    if layout.conditioner:
        weights = None if run_weights is None else run_weights.weights("conditioner")
        conditioner = load_conditioner(parts / "conditioner", weights).eval()
        with located(parts / "conditioner" / "config.json"):
            check_fits(conditioner, unet.config)
    foreign = settings is None
    if foreign:
        scheduler_config = pipelines.repaired_scheduler(layout.pipeline, scheduler_config)
        pipelines.repair_size(layout.pipeline, unet)
    model = Model(parts, unet, scheduler_config, _sampling(parts, settings, layout, scheduler_config), conditioner)
    model.layout, model.run_weights, model.size = layout, run_weights, size
    model.names, model.null_class = _names(parts, layout, settings)
    for name, tokenizer in layout.text_encoders.items():
        if not (parts / tokenizer).is_dir():
            raise InputError(f"{parts / tokenizer}: no such folder, model_index.json names it")
        model.text_encoders.append(_text_encoder(parts / name, allow_pickle))
        model.tokenizers.append(pretrained_tokenizer(parts / tokenizer, str(parts / tokenizer), local_files_only=True))
    if layout.vae is not None:
        model.vae = _pretrained(_autoencoder(parts / layout.vae), parts / layout.vae, allow_pickle)
    model.signatures()  # raises for what does not fit together
    pipelines.check_pipeline(layout.pipeline, parts)
    if foreign or size is not None:
        check_runs(model)
    model.loras = tuple(loras or ())
    for lora in model.loras:
        fuse(lora, model.unet, model.text_encoders)
    return model


def check_runs(model: Model) -> None:
    """Run every network once without computing anything: InputError, in one line, for one that cannot run, or whose outputs
    have other shapes than the config promises."""
    signatures = model.signatures()
    for name, module in model.networks().items():
        signature = signatures[name]
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            inputs = [torch.zeros(t.with_batch(2), dtype=getattr(torch, t.dtype)) for t in signature.inputs]
            try:
                outputs = module(*inputs)
            except Exception as error:
                what = f"its {name} does not run at {model.space.size} ({type(error).__name__}: {first_line(error)})"
                raise InputError(f"{model.where}: {what}") from error
        shapes = [tuple(y.shape) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
        expected = [t.with_batch(2) for t in signature.outputs]
        if shapes != expected:
            raise InputError(f"{model.where}: its {name} gives {shapes}, expected {expected}")


def _hashes(folder: Path, layout: Layout, run_weights: RunWeights | None) -> tuple[dict[str, str], dict[str, str]]:
    """File -> SHA-256 of all weights, and the hash of the text encoder's and the VAE's alone."""
    components = {"text_encoder": list(layout.text_encoders), "vae": [] if layout.vae is None else [layout.vae]}
    names = [*([] if run_weights else [layout.denoiser, *(["conditioner"] if layout.conditioner else [])])]
    names += [name for part in components.values() for name in part]
    files = sorted(file for name in names for file in weight_files(folder / name, allow_pickle=True).files)
    hashes = {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}
    parts = {c: {n: h for n, h in hashes.items() if n.partition("/")[0] in below} for c, below in components.items()}
    if run_weights is not None:
        hashes["unet"] = run_weights.sha256
    return hashes, {component: sha256_names(part) for component, part in parts.items() if part}


def _sampling(folder: Path, settings: Settings | None, layout: Layout, scheduler_config: Mapping[str, Any]) -> Sampling:
    """fastgen.json's; else the model's own scheduler, with the steps and guidance of its pipeline."""
    if settings is not None and settings.sampling is not None:
        with located(f"{folder / SETTINGS}: sampling.scheduler"):
            check_name(settings.sampling.scheduler)
        return settings.sampling
    steps, guidance = pipelines.defaults(layout.pipeline, text=bool(layout.text_encoders))
    return Sampling(default_name(scheduler_config), steps, guidance)


def _names(folder: Path, layout: Layout, settings: Settings | None) -> tuple[dict[str, int] | None, int | None]:
    """The names of labels or classes, from labels.json or the pipeline's id2label; and the class id that stands for none."""
    null = None if settings is None else settings.null_class
    if (folder / "labels.json").is_file():
        return read_objects(folder / "labels.json"), null
    return class_names(layout.id2label, folder) if layout.id2label else None, null


def _autoencoder(folder: Path) -> Any:
    import diffusers

    name = read_config(folder / "config.json").get("_class_name")
    if name not in AUTOENCODERS:
        where = f"{folder / 'config.json'}: _class_name"
        raise InputError(f"{where}: found {brief(name)}, fastgen runs {', '.join(AUTOENCODERS)}")
    return getattr(diffusers, name)


def _text_encoder(folder: Path, allow_pickle: bool) -> Any:
    import transformers

    config = read_config(folder / "config.json")
    names = config.get("architectures") or ["CLIPTextModel"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise InputError(f"{folder / 'config.json'}: architectures: found {brief(names)}, expected a list of names")
    name = "CLIPTextModel" if names[0] == "CLIPModel" else names[0]
    if name not in TEXT_ENCODERS:
        where = f"{folder / 'config.json'}: architectures"
        raise InputError(f"{where}: found {brief(name)}, fastgen runs {', '.join(TEXT_ENCODERS)}")
    whole = names[0] == "CLIPModel"  # which has an image tower beside the text encoder
    encoder = _pretrained(getattr(transformers, name), folder, allow_pickle, WHOLE_CLIP if whole else ())
    if config.get("model_type") == "t5":
        # torch cannot export its fused attention, which has a bias for each pair of tokens.
        encoder.set_attn_implementation("eager")
    return encoder


def _denoiser(cls: Any, folder: Path, run_weights: RunWeights | None, allow_pickle: bool) -> Any:
    if run_weights is None:
        return _pretrained(cls, folder, allow_pickle)
    check_network(cls, folder, weights=False)
    unet = empty(cls, read_config(folder / "config.json"))
    load_state(unet, run_weights.weights("unet"), run_weights.checkpoint.folder, f"the {cls.__name__} of {folder}")
    return unet.eval()


def _pretrained(cls: Any, folder: Path, allow_pickle: bool, beside: tuple[str, ...] = ()) -> Any:
    """`beside`: beginnings of the keys of weights that the class does not have and does not need."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: config.json is missing, expected a saved {cls.__name__}")
    options = weight_files(folder, allow_pickle=allow_pickle).options
    return pretrained(cls, folder, str(folder), lambda key: key.startswith(beside), local_files_only=True, **options)
