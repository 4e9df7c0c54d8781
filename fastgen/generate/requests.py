"""What to generate: the test files of both tasks, and lists of prompts or labels, as validated `Request`s."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief, located, read_json, read_jsonl
from fastgen.files.names import (
    ICLEVR_OBJECTS,
    check_image_name,
    check_known,
    check_labels,
    check_objects,
    check_text,
    check_unreserved,
    folded,
    read_objects,
)
from fastgen.generate.request_fields import CLASS_KEYS, PROMPT_KEYS, check_fields, ignored_note
from fastgen.models.condition import kind_of

MAX_SEED = 2**63  # exclusive
MAX_REQUESTS = 250_000  # in a file
SCHEMAS = (
    'expected {"0_main": {"image_name": "0_main.png", "text_prompt": "..."}}, [["red cube", ...], ...], '
    'or [{"prompt": "..."}, ...] (with "labels" or "class" instead of "prompt", as the model takes them)'
)


@dataclass(frozen=True)
class Request:
    """One image to generate. Raises InputError for a field that is not as described here."""

    id: str  # the key in the file, or the position
    image_name: str  # relative POSIX path below the output folder, ends in .png
    prompt: str | None = None  # for a model of text
    labels: tuple[str, ...] | None = None  # for a model of labels; a single one for a model of classes
    seed: int | None = None  # the request's own; 0 <= seed < 2**63
    description: str | None = None  # the prompt without the action, where the file has it apart

    def __post_init__(self) -> None:
        check_image_name(self.image_name)
        if self.prompt is not None:
            check_text(self.prompt, "prompt")
        if self.labels is not None:
            check_labels(self.labels)
        if self.description is not None:
            check_text(self.description, "description")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < MAX_SEED):
            raise InputError(f"seed: found {brief(self.seed)}, expected an integer with 0 <= seed < 2**63")

    @property
    def kind(self) -> str:
        """What it holds, see `Condition.kind`."""
        return kind_of(self.prompt is not None, self.labels is not None)


class Labelled(Protocol):
    """A Request, or a training Example."""

    @property
    def labels(self) -> tuple[str, ...] | None: ...


class Requests(NamedTuple):
    """Requests of one kind, with the place of each in its file for messages. `known` checks their labels. `notes`: lines that
    tell the user what of the file has no effect."""

    requests: list[Request]
    places: list[str]
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.requests[0].kind

    def known(self, objects: Mapping[str, int] | None) -> list[Request]:
        """The requests, their labels checked against `objects` (None, of a text model: not checked, as it takes no labels).
        Raises InputError, with the place, for an unknown label."""
        for request, place in zip(self.requests, self.places, strict=True):
            if request.labels is not None and objects is not None:
                with located(place):
                    check_known(request.labels, objects)
        return self.requests


def read_requests(
    path: str | os.PathLike[str], objects: Mapping[str, int] | None = None, *, generated: bool = False
) -> list[Request]:
    """Every request of a JSON or JSONL file, see `parse_requests`. Labels must be in `objects`, by default in objects.json
    beside the file, else among the 24 of i-CLEVR. Raises InputError with file, entry and field."""
    requests = parse_requests(path, generated=generated)
    if requests.kind.endswith("labels") and objects is None:
        beside = Path(path).parent / "objects.json"
        objects = read_objects(beside) if beside.exists() else ICLEVR_OBJECTS
    return requests.known(objects)


def parse_requests(path: str | os.PathLike[str], *, generated: bool = False) -> Requests:
    """Every request of a JSON or JSONL file, in file order; all of one kind, with image names that do not collide.

    Schemas: {"0_main": {"image_name", "text_prompt"}} (without text_prompt: given_description and action_description),
    [["red cube", ...], ...], and {"prompt", "labels", "image_name", "seed"} in a list, a dict or a JSONL file, with what the
    model takes: a prompt, labels, a "class" (its name or number) in their place, both, or none of them.
    A missing image_name is the position, "0.png"; null is a missing prompt, labels or seed. A key that asks for something that
    will not be done is refused (`request_fields`); a note names the other keys that are ignored. `generated`: the images are
    there already, so no key is refused and none is noted. Raises InputError with file, entry and field.
    """
    path = Path(path)
    requests, places, ignored = [], [], []
    for position, (key, place, value) in enumerate(_entries(path)):
        with located(place):
            if isinstance(value, dict) and not generated:
                ignored += check_fields(value)
            requests.append(_request(key, position, value))
        places.append(place)
    if not requests:
        raise InputError(f"{path}: holds no requests; {SCHEMAS}")
    _check_together(requests, places, new=not generated)
    notes = (f"{path}: {ignored_note(ignored, len(requests))}",) if ignored else ()
    return Requests(requests, places, notes)


def typed_requests(
    prompts: Sequence[str] = (), labels: Sequence[str] = (), *, seed: int = 0, count: int = 1
) -> Requests:
    """Requests from the command line: for each prompt, or each list "red cube, blue sphere" of labels, `count` images with the
    seeds `seed`, `seed` + 1, ... So an image does not depend on the other prompts. With both, each prompt has the one list of
    labels; with neither the images have no condition. Raises InputError."""
    if prompts and len(labels) > 1:
        raise InputError(f"--prompt with {len(labels)} lists of --labels; give one list, which every prompt gets")
    requests: list[Request] = []
    places: list[str] = []
    for text in prompts or labels or ("",):
        place = f"--{'prompt' if prompts else 'labels'} {brief(text)}" if prompts or labels else f"--count {count}"
        for image_seed in range(seed, seed + count):
            position = len(requests)
            with located(place):
                listed = labels[0] if prompts and labels else None if prompts or not labels else text
                names = None if listed is None else check_labels([label.strip() for label in listed.split(",")])
                prompt = text if prompts else None
                requests.append(Request(str(position), f"{position}.png", prompt, names, image_seed))
            places.append(place)
    return Requests(requests, places)


def resolve_seed(request: Request, base_seed: int) -> int:
    """The seed of the request's noise: the one in the request, else SHA-256 of "{base_seed}:{image_name}" (UTF-8), its 32 bytes
    read as a big-endian integer, modulo 2**63. So it depends on neither the position nor the other requests."""
    if request.seed is not None:
        return request.seed
    digest = hashlib.sha256(f"{base_seed}:{request.image_name}".encode()).digest()
    return int.from_bytes(digest, "big") % MAX_SEED


def multi_hot(requests: Sequence[Labelled], objects: Mapping[str, int]) -> np.ndarray:
    """(N, len(objects)) float32, 1 at the index of every label. InputError for a prompt or an unknown label."""
    check_objects(objects)
    rows = np.zeros((len(requests), len(objects)), np.float32)  # (N, len(objects))
    for row, request in zip(rows, requests, strict=True):
        if request.labels is None:
            raise InputError(f"expected labels, found the prompt {brief(getattr(request, 'prompt', None))}")
        check_known(request.labels, objects)
        row[[objects[label] for label in request.labels]] = 1
    return rows


def _entries(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(id, place for messages, value) of every entry of a list, a dict or a JSONL file."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        lines = read_jsonl(path)
        _check_count(path, len(lines))
        for position, (line, value) in enumerate(lines):
            yield str(position), f"{path}: line {line}", value
        return
    content = read_json(path)
    if isinstance(content, dict | list):
        _check_count(path, len(content))
    if isinstance(content, dict):
        for key, value in content.items():
            with located(path):
                check_text(key, f"key {brief(key)}")
            if not isinstance(value, dict):
                raise InputError(f"{path}: key {brief(key)}: found {brief(value)}; {SCHEMAS}")
            yield key, f"{path}: key {brief(key)}", value
    elif isinstance(content, list):
        for position, value in enumerate(content):
            yield str(position), f"{path}: entry [{position}]", value
    else:
        raise InputError(f"{path}: found {brief(content)}; {SCHEMAS}")


def _check_count(path: Path, count: int) -> None:
    if count > MAX_REQUESTS:
        raise InputError(f"{path}: holds {count:,} requests, expected at most {MAX_REQUESTS:,}; split it")


def _request(key: str, position: int, value: Any) -> Request:
    if isinstance(value, list):
        value = {"labels": value}
    if not isinstance(value, dict):
        raise InputError(f"found {brief(value)}; {SCHEMAS}")
    labels, description = _labels(value), value.get("given_description")
    return Request(
        id=key,
        image_name=value.get("image_name", f"{position}.png"),
        prompt=_prompt(value),
        labels=tuple(labels) if isinstance(labels, list) else labels,
        seed=value.get("seed"),
        description=description.strip() or None if isinstance(description, str) else None,
    )


def _labels(value: dict[str, Any]) -> Any:
    """A request's labels; the one class that it may name instead, or its number, is a list of one."""
    named = [key for key in CLASS_KEYS if value.get(key) is not None]
    if len(named) + (value.get("labels") is not None) > 1:
        raise InputError(
            f"found {' and '.join([*(['labels'] if value.get('labels') is not None else []), *named])}; give one"
        )
    if not named:
        return value.get("labels")
    found = value[named[0]]
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise InputError(f"{named[0]}: found {brief(found)}, expected a class's name or number")
    return [str(found)]


def _prompt(value: dict[str, Any]) -> str | None:
    if "text_prompt" in value:
        check_text(value["text_prompt"], "text_prompt")
        if value.get("prompt") is not None:
            raise InputError("found both text_prompt and prompt, expected one of them")
        return value["text_prompt"]
    named = [key for key in PROMPT_KEYS if value.get(key) is not None]
    if named or "given_description" not in value:
        return value[named[0]] if named else None
    texts = value["given_description"], value.get("action_description", "")
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"given_description, action_description: found {brief(texts)}, expected one text each")
    return " ".join(texts).strip()


def _check_together(requests: list[Request], places: list[str], *, new: bool) -> None:
    """InputError for mixed kinds, and for image names that collide: the same file, or a file where another needs a folder; for
    `new` images also those that collide with what a job writes. Names are compared as `folded`."""
    names = [folded(request.image_name) for request in requests]
    for request, place in zip(requests if new else (), places, strict=False):
        try:
            check_unreserved(request.image_name)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    first: dict[str, int] = {}
    for i, (request, name) in enumerate(zip(requests, names, strict=True)):
        if request.kind != requests[0].kind:
            kinds = f"asks by {request.kind}, but {places[0]} by {requests[0].kind}"
            raise InputError(f"{places[i]}: {kinds}; split the file")
        if name in first:
            raise InputError(f"{places[i]}: image_name {brief(request.image_name)} is taken by {places[first[name]]}")
        first[name] = i
    for place, request, name in zip(places, requests, names, strict=True):
        folder = name
        while folder := folder.rpartition("/")[0]:
            if (other := first.get(folder)) is not None:
                name = f"image_name {brief(request.image_name)}"
                raise InputError(f"{place}: {name} needs a folder where {places[other]} has a file")
