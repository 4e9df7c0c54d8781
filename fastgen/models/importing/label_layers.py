"""The layers of a checkpoint that embed labels or a class: which they are, and what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgen.errors import InputError
from fastgen.models.importing.split import MismatchError
from fastgen.models.networks.labels import LabelConditioner


@dataclass(frozen=True)
class LabelLayers:
    """What is between the labels and the network: `embed` "linear" (one Linear, or two with SiLU between them), "embedding" (an
    nn.Embedding of class ids), or "identity" (nothing). `kind`: where it enters, see `LabelConditioner`; `dim`: its width."""

    name: str  # of the module in the checkpoint
    kind: str
    embed: str
    layers: tuple[
        dict[str, Tensor], ...
    ]  # {"weight": (out, in), "bias": (out,)}; of an embedding {"weight": (classes, dim)}
    dim: int

    @property
    def num_labels(self) -> int:
        if not self.layers:
            return self.dim
        return self.layers[0]["weight"].shape[0 if self.embed == "embedding" else 1]

    @property
    def hidden(self) -> int:
        return self.layers[0]["weight"].shape[0] if len(self.layers) > 1 else 0

    @property
    def weight_name(self) -> str:
        return f"{self.name}.0.weight" if len(self.layers) > 1 else f"{self.name}.weight"

    def conditioner(self) -> LabelConditioner:
        module = LabelConditioner(self.kind, self.num_labels, self.dim, self.hidden, self.embed)
        names = ("embed",) if len(self.layers) < 2 else ("embed.0", "embed.2")
        module.load_state_dict(
            {f"{name}.{k}": v for name, layer in zip(names, self.layers, strict=False) for k, v in layer.items()}
        )
        return module.eval()

    def module(self) -> nn.Module:
        """The layers as plain torch modules, as the checkpoint's author had them."""
        if not self.layers:
            return nn.Identity()
        modules: list[nn.Module] = []
        for layer in self.layers:
            rows, columns = layer["weight"].shape
            table = self.embed == "embedding"
            modules.append(
                nn.Embedding(rows, columns, device="meta") if table else nn.Linear(columns, rows, device="meta")
            )
            modules[-1].load_state_dict(layer, assign=True)
        return modules[0] if len(modules) == 1 else nn.Sequential(modules[0], nn.SiLU(), modules[1])

    def __str__(self) -> str:
        if self.embed == "embedding":
            return f"table (nn.Embedding) of {self.num_labels} classes"
        kind = f"Linear-SiLU-Linear conditioner ({self.hidden} wide)" if self.hidden else "Linear conditioner"
        return f"{kind} of {self.num_labels} labels"


def find_layers(
    state: Mapping[str, Tensor], kind: str, dim: int, embed: str | None, hidden: int, where: str
) -> LabelLayers:
    """The one Linear, the chain of two, or the nn.Embedding that these tensors are.

    `dim`: the width that the network takes. `embed` ("linear" | "embedding") and `hidden`: what the user says. A table and a
    Linear without bias can have the same shape: then the user has to say which. Raises InputError for that, and MismatchError
    for other tensors and shapes.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, _, part = key.rpartition(".")
        groups.setdefault(layer, {})[part] = value
    names = sorted(groups)
    layers = [groups[name] for name in names]
    linear = len(layers) <= 2 and all(map(_is_linear, layers))
    if not linear or (len(layers) == 2 and len(layers[0]["weight"]) != layers[1]["weight"].shape[1]):
        shapes = [f"unexpected {k} {tuple(v.shape)}" for k, v in state.items()]
        raise MismatchError(
            f"{where}: beside the UNet, a label conditioner is one Linear or a chain of two, or one nn.Embedding",
            shapes,
        )
    name = (names[0] if len(names) == 1 else names[0].rpartition(".")[0]) or "its Linear"
    if _embed(layers, dim, embed, name, where) == "embedding":
        return LabelLayers(name, kind, "embedding", (layers[0],), dim)
    complete = [{"weight": x["weight"], "bias": x.get("bias", torch.zeros(len(x["weight"])))} for x in layers]
    found = LabelLayers(name, kind, "linear", tuple(complete), dim)
    if found.hidden and not hidden:
        raise InputError(
            f"{where}: {name} holds two layers, and weights do not tell the activation between them; if it is SiLU, "
            f"say so in the preset: [conditioner] hidden = {found.hidden}"
        )
    wrong = [
        f"shape {name}: {key} found {value}, expected {expected}"
        for key, value, expected in (("dim", len(complete[-1]["weight"]), dim), ("hidden", found.hidden, hidden))
        if value != expected
    ]
    if wrong:
        raise MismatchError(f"{where}: label conditioner of kind {kind!r}", wrong)
    return found


def _embed(layers: list[dict[str, Tensor]], dim: int, said: str | None, name: str, where: str) -> str:
    """ "linear" or "embedding". A table has no bias and `dim` columns; a Linear `dim` rows."""
    rows, columns = layers[-1]["weight"].shape
    if len(layers) > 1 or "bias" in layers[0]:
        if said == "embedding":
            raise InputError(f"{where}: {name} has a bias, or is two layers; an nn.Embedding is neither")
        return "linear"
    can = {"linear": rows == dim, "embedding": columns == dim}
    if said in can:
        if not can[said]:
            raise MismatchError(
                f"{where}: {name} as {said}", [f"shape {name}.weight: found {(rows, columns)}, width {dim}"]
            )
        return said
    if all(can.values()):
        raise InputError(
            f"{where}: {name}.weight is {(rows, columns)} without a bias: an nn.Embedding of {rows} classes or a Linear on "
            f"{columns} labels; say which with --embed embedding or --embed linear"
        )
    return "embedding" if can["embedding"] else "linear"


def _is_linear(layer: Mapping[str, Tensor]) -> bool:
    weight, bias = layer.get("weight"), layer.get("bias")
    sizes = weight is not None and weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])
    return sizes and layer.keys() <= {"weight", "bias"}
