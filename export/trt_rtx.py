"""ONNX graphs of a bundle -> plans of TensorRT for RTX in that bundle: built on any x86-64 machine, for cards elsewhere.

A plan takes any number of rows up to the most that it was built for, on every card whose compute capability it names. A bundle
holds `trt-rtx/<address>/engine.plan` and its record, both listed in bundle.json.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.extend import add_files, sweep
from export.trt_build import LEAST_CAPABILITY, Rows, build_plan, check_networks, check_settings, network_rows
from fastgen.engines.cache.artifacts import RECORD, Artifact, Recipe, read_record, write_record
from fastgen.engines.trt.plan import CAPABILITIES, PLAN, make_recipe
from fastgen.engines.trt.platform import TrtLibrary, open_library
from fastgen.engines.trt.product import RTX
from fastgen.errors import InputError, Say
from fastgen.files.folders import scratch_folder
from fastgen.models.bundle import COMPILED, plan_graph, read_bundle

if TYPE_CHECKING:
    from fastgen.models.bundle import Bundle

DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")  # A100; RTX 30, 40 and 50


@dataclass(frozen=True)
class Order:
    """A plan to build: of a network's graph in the precision `dtype` that it executes, with its profile and its address."""

    network: str
    dtype: str
    rows: Rows
    recipe: Recipe

    def replaces(self, other: Recipe) -> bool:
        """Whether another plan is of no use beside this one: of the same network and precision, for no other card."""
        same = all(other.fields.get(key) == self.recipe.fields[key] for key in ("network", "dtype"))
        theirs, ours = (set(str(recipe.fields.get(CAPABILITIES)).split()) for recipe in (other, self.recipe))
        return same and theirs <= ours


def build_plans(
    bundle: Bundle,
    *,
    dtype: str = "fp16",
    batch_sizes: Sequence[int],
    capabilities: Sequence[str] | None = None,
    networks: Sequence[str] | None = None,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Bundle:
    """Build the plans that generating batches of up to max(batch_sizes) images needs and the bundle does not hold; returns the
    bundle read again.

    `capabilities`: of the cards, by default `DEFAULT_CAPABILITIES`, as far as they have `dtype`.
    `networks`: by default all that generation runs, and the VAE decoder in fp32 besides, for images that are NaN or flat
    otherwise. A new plan replaces older ones of its network and precision, unless they run on a card that the new one does not
    run on. `overwrite`: build all of them again. Ctrl-C stops a build and leaves the bundle unchanged. Raises InputError for
    wrong options and missing graphs, FastgenError when the builder refuses a graph.
    """
    check_settings(dtype, batch_sizes)
    cards = check_capabilities(capabilities, dtype)
    pairs = [(name, dtype) for name in check_networks(bundle, networks)]
    if networks is None and bundle.spec.space.latent and dtype != "fp32":
        pairs.append(("vae_decoder", "fp32"))
    library = open_library(RTX)
    sweep(bundle)
    orders = [_order(bundle, library, name, kind, batch_sizes, cards) for name, kind in pairs]
    sound, damaged = _plans(bundle)
    orders = [order for order in orders if overwrite or order.recipe.digest not in sound]
    addresses = {order.recipe.digest for order in orders}
    for address, reason in damaged.items():
        say(f"{reason}; the plan is {'built again' if address in addresses else 'taken out'}")
    if not orders and not damaged:
        say(f"{bundle.folder} holds these plans already")
        return bundle
    replaced = [digest for digest, a in sound.items() if any(order.replaces(a.recipe) for order in orders)]
    gone = {*damaged, *replaced} - addresses
    with scratch_folder(bundle.folder) as partial:
        for order in orders:
            _make(bundle, library, order, partial / COMPILED / order.recipe.digest, say)
        add_files(bundle, partial, [name for name in bundle.files if _address(name) in gone])
    return read_bundle(bundle.folder)


def check_capabilities(capabilities: Sequence[str] | None, dtype: str) -> list[str]:
    """The compute capabilities in ascending order, each once; by default those of `DEFAULT_CAPABILITIES` that have `dtype`.

    Raises InputError for one that plans in `dtype` cannot be built for."""
    least = LEAST_CAPABILITY.get(dtype, 0.0)
    if capabilities is None:
        return [text for text in DEFAULT_CAPABILITIES if float(text) >= least]
    for text in capabilities:
        if not re.fullmatch(r"\d{1,2}\.\d", text):
            raise InputError(f"capabilities: found {text!r}, expected compute capabilities such as 8.6,8.9")
        if refusal := RTX.refusal(text):
            raise InputError(f"capabilities: {refusal}; on that card use `fastgen export --trt`")
        if float(text) < least:
            raise InputError(
                f"capabilities: {text} has no {dtype}, which needs {least}; use --dtype fp16 for that card"
            )
    if not capabilities:
        raise InputError("capabilities: found none, expected compute capabilities such as 8.6,8.9")
    return sorted(set(capabilities), key=float)


def _order(
    bundle: Bundle, library: TrtLibrary, network: str, dtype: str, batch_sizes: Sequence[int], cards: Sequence[str]
) -> Order:
    """The plan to build for a network. The text encoder always runs the same number of rows; the others any up to the most."""
    most = network_rows(network, batch_sizes, bundle.spec.space.pixels)[-1]
    rows = Rows(most if network == "text_encoder" else 1, most, most)
    bound: dict[str, str | float | None] = {RTX.module: library.version, CAPABILITIES: " ".join(cards)}
    bound |= {"least_rows": rows.least, "best_rows": rows.best}
    recipe = make_recipe(bundle, network, most, dtype, RTX, bound)
    return Order(network, str(recipe.fields["dtype"]), rows, recipe)


def _plans(bundle: Bundle) -> tuple[dict[str, Artifact], dict[str, str]]:
    """The sound plans of a bundle by their address, and what is wrong with each of the others."""
    sound, damaged = {}, {}
    for name in (name for name in bundle.files if _address(name) and name.endswith(f"/{RECORD}")):
        try:
            artifact = read_record(bundle.file(name).parent)
            artifact.verify()
            sound[_address(name)] = artifact
        except InputError as problem:
            damaged[_address(name)] = str(problem)
    return sound, damaged


def _address(name: str) -> str:
    """The address of the plan that a file of the bundle belongs to; "" for other files."""
    return name.split("/")[1] if name.startswith(f"{COMPILED}/") else ""


def _make(bundle: Bundle, library: TrtLibrary, order: Order, folder: Path, say: Say) -> None:
    """Build one plan and its record into `folder`."""
    recipe = order.recipe
    say(f"building {RTX.engine}: {recipe}, compute capabilities {recipe.fields[CAPABILITIES]}")
    start = time.perf_counter()
    graph, signature = bundle.network(order.network, plan_graph(order.dtype)), bundle.spec.signatures[order.network]
    prepare = partial(_set_targets, library, str(recipe.fields[CAPABILITIES]).split(), str(recipe))
    built = build_plan(library, graph, signature, order.dtype, order.rows, str(recipe), say, prepare)
    folder.mkdir(parents=True)
    size = (folder / PLAN).write_bytes(built.plan)
    seconds = time.perf_counter() - start
    write_record(folder, recipe, seconds)
    say(f"built {RTX.engine}: {recipe} in {seconds:.1f} s, {size / 1e6:.1f} MB")


def _set_targets(library: TrtLibrary, cards: Sequence[str], what: str, config: Any) -> None:
    """Set the compute capabilities that an IBuilderConfig compiles for."""
    config.num_compute_capabilities = len(cards)
    for index, card in enumerate(cards):
        capability = getattr(library.trt.ComputeCapability, f"SM{card.replace('.', '')}")
        if not config.set_compute_capability(capability, index):
            raise library.failure(f"{what}: compute capability {card} is refused")
