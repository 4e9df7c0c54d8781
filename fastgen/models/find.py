"""Finding a model without loading it: by a name or folder, the latest run's, or the one that comes with fastgen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastgen.errors import InputError
from fastgen.files.jsonfiles import located, read_json
from fastgen.files.names import read_objects
from fastgen.models.bundle import MANIFEST, Bundle, is_bundle, read_bundle
from fastgen.models.checkpoint_choice import model_parts
from fastgen.models.condition import kind_of
from fastgen.models.layout import DENOISER_FOLDERS, INDEX, PROMPT, read_index
from fastgen.models.runs import LATEST, latest_model, latest_run

MODELS = Path(__file__).with_name("shipped")
EVALUATOR = "config.json"
HELP = "give --model, or train one with `fastgen train PRESET --data DATA`"
KINDS = {  # what the requests of a model hold, see `Condition.kind`
    "text": "prompts",
    "labels": "labels",
    "text and labels": "prompts with labels",
    "nothing": "nothing but seeds",
}


def shipped_names() -> list[str]:
    """The models and evaluators that come with the package, sorted."""
    return sorted(folder.name for folder in MODELS.glob("*") if any((folder / f).is_file() for f in (INDEX, EVALUATOR)))


def shipped_model(kind: str) -> Path:
    """The folder of the model that comes with the package for requests of this kind, "text" or "labels".

    Raises InputError where the package was built without one.
    """
    for name in shipped_names():
        if model_kind(MODELS / name) == kind:
            return MODELS / name
    raise InputError(f"this build of fastgen comes without a model for {KINDS[kind]}; {HELP}")


def find_folder(name: str | os.PathLike[str]) -> Path:
    """`name` as a path where it exists, else the folder of the shipped model of this name, else the path all the same."""
    folder = Path(name)
    return MODELS / folder if not os.path.lexists(folder) and os.fspath(name) in shipped_names() else folder


def is_shipped(folder: Path) -> bool:
    return folder.parent == MODELS


def name_of(folder: Path) -> str:
    """What a command calls this model: a shipped one's name, else the folder."""
    return folder.name if is_shipped(folder) else str(folder)


def output_folder(model: Path, what: str) -> Path:
    """The default folder of what (such as "bundle") is made from a model: inside the model's folder; for a shipped model,
    whose folder belongs to the package, in the current folder, as `iclevr-64-bundle`."""
    return Path(f"{model.name}-{what}") if is_shipped(model) else model / what


def model_kind(folder: Path) -> str | None:
    """The kind of requests that a bundle or model folder takes, see `Condition.kind`, without loading it; None for others."""
    if (folder / MANIFEST).is_file():
        return read_bundle(folder).spec.condition.kind
    if not (folder / INDEX).is_file():
        return None
    index = read_json(folder / INDEX)
    if not isinstance(index, dict):
        return None
    denoiser = next((name for name in DENOISER_FOLDERS if name in index), None)
    if denoiser is None:
        return None
    text = any(isinstance(entry := index.get(name), list) and entry and entry[0] for name in PROMPT)
    file = folder / denoiser / "config.json"
    config = read_json(file, infinity=True) if file.is_file() else {}
    keys = ("class_embed_type", "num_class_embeds", "num_embeds_ada_norm")
    if not isinstance(config, dict):
        return None
    return kind_of(bool(text), "conditioner" in index or any(config.get(key) for key in keys))


@dataclass(frozen=True)
class ModelFolder:
    """A model folder, or a bundle, whose bundle.json is read; the networks are not loaded.

    `kind`: of its requests, see `model_kind`. `objects`: label name -> index, None where it has no labels. `why`: the reason of
    this choice, where the user named no model.
    """

    folder: Path
    bundle: Bundle | None
    kind: str | None
    objects: Mapping[str, int] | None
    why: str | None = None

    def __str__(self) -> str:
        return name_of(self.folder) + (f" ({self.why})" if self.why else "")


def find_model(name: str | os.PathLike[str], checkpoint: str | None = None, why: str | None = None) -> ModelFolder:
    """The bundle or model folder called `name`, a folder or a shipped model's name.

    `checkpoint`: which of a run's weights, see `checkpoint_choice`. Raises InputError for what is neither, for a malformed
    bundle, and for an unfinished run without a checkpoint.
    """
    folder = find_folder(name)
    if is_bundle(folder):
        bundle = read_bundle(folder)
        return ModelFolder(folder, bundle, bundle.spec.condition.kind, bundle.spec.condition.labels, why)
    parts = model_parts(folder, checkpoint)
    if not (parts / INDEX).is_file():
        shipped = ", ".join(shipped_names()) or "there are none"
        names = "" if folder.exists() else f", nor the name of a model that comes with fastgen ({shipped})"
        raise InputError(f"{folder}: neither a bundle (bundle.json) nor a model folder (model_index.json){names}")
    return ModelFolder(folder, None, model_kind(parts), _objects(parts), why)


def _objects(folder: Path) -> dict[str, int] | None:
    """The labels of a model folder that takes sets of them; None for classes, which requests may also call by their numbers."""
    labels, conditioner = folder / "labels.json", folder / "conditioner" / "config.json"
    if not labels.is_file() or "conditioner" not in read_index(folder):
        return None
    config = read_json(conditioner) if conditioner.is_file() else {}
    return None if isinstance(config, dict) and config.get("embed") == "embedding" else read_objects(labels)


def default_model(
    kind: str, source_kind: str | None, checkpoint: str | None = None, option: str | None = None
) -> ModelFolder:
    """The latest run's bundle or model where it is one for requests of this kind, else the shipped one that is.

    `source_kind`: of the engine that will run it, "bundle" or "model"; None for any. `option`: see `latest_model`.

    Raises InputError when there is neither, and when the latest run has no bundle for an engine that needs one.
    """
    if not LATEST.exists():
        reason = "no runs/latest here"
    elif (latest := model_kind(latest_run())) == kind:
        return find_model(latest_model(source_kind, option), checkpoint, "the latest run")
    else:
        reason = f"the latest run, {latest_run().name}, " + (f"takes {KINDS[latest]}" if latest else "is no model")
    with located(f"no model given, and {reason}"):
        return find_model(shipped_model(kind), checkpoint, f"shipped with fastgen; {reason}")
