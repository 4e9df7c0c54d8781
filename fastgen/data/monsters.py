"""The monsters task: train_info.json with descriptions and an action per animation, frames in train/{key}_{n}.png."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fastgen.data.dataset import Dataset, Example, files_in, note, nothing_matches
from fastgen.errors import InputError
from fastgen.files.jsonfiles import MAX_DATA_BYTES, brief, located, read_json
from fastgen.files.names import check_text

CAPTIONS, FRAMES = "train_info.json", "train"
MAX_FRAMES = 10_000  # of one animation
_FRAME = re.compile(r"(.+)_([0-9]{1,9})\.png", re.DOTALL)
_KEY = re.compile(r"([0-9]+)_.+", re.DOTALL)


def recognise(root: Path) -> bool:
    return os.path.isfile(root / CAPTIONS)


def read(root: Path) -> Dataset:
    """The frames that exist of the keys in train_info.json; notes list frames without a key and keys without frames.

    Raises InputError for a wrong entry, and where no frame matches.
    """
    path = root / CAPTIONS
    info = read_json(path, limit=MAX_DATA_BYTES)
    if not isinstance(info, dict) or not info:
        raise InputError(f'{path}: found {brief(info)}, expected {{"0_main": {{"given_description": [...], ...}}}}')
    captions, descriptions, counts = {}, {}, {}
    for key, entry in info.items():
        with located(f"{path}: key {brief(key)}"):
            check_text(key, "key")
            captions[key], counts[key] = _captions(entry), _count(entry)
            descriptions[key] = tuple(text.strip() for text in entry["given_description"])
    frames, unknown_files = _frames(root / FRAMES, captions)
    if not any(frames.values()):
        expected = [
            f"{key}_{number}.png" for key, count in counts.items() for number in range(1 if count is None else count)
        ]
        raise nothing_matches(path, root / FRAMES, expected or [f"{next(iter(info))}_0.png"], unknown_files)
    examples = tuple(
        Example(root / FRAMES / name, captions[key], (), key, descriptions[key], _monster(key))
        for key, numbers in frames.items()
        for _, name in sorted(numbers.items())
    )
    notes = _notes(frames, counts, unknown_files)
    return Dataset("text", root, examples, objects=None, notes=notes)


def _monster(key: str) -> str:
    """12_main and 12_attack1 -> 12; other keys stay as they are."""
    match = _KEY.fullmatch(key)
    return match[1] if match else key


def _captions(entry: Any) -> tuple[str, ...]:
    """Every description, followed by the action if there is one."""
    if not isinstance(entry, dict):
        raise InputError(f"found {brief(entry)}, expected an object with given_description")
    descriptions, action = entry.get("given_description"), entry.get("action_description", "")
    if not isinstance(descriptions, list) or not descriptions:
        raise InputError(f"given_description: found {brief(descriptions)}, expected a list of one or more texts")
    if not isinstance(action, str):
        raise InputError(f"action_description: found {brief(action)}, expected text")
    if action.strip():
        check_text(action, "action_description")
    return tuple(f"{check_text(text, 'given_description')} {action}".strip() for text in descriptions)


def _count(entry: dict[str, Any]) -> int | None:
    count = entry.get("num_frames")
    if count is not None and (type(count) is not int or not 0 <= count <= MAX_FRAMES):
        raise InputError(f"num_frames: found {brief(count)}, expected a whole number up to {MAX_FRAMES:,}")
    return count


def _frames(folder: Path, keys: dict[str, Any]) -> tuple[dict[str, dict[int, str]], list[str]]:
    """({key: {frame number: file name}} in the order of the keys, PNG files that belong to no key)."""
    frames: dict[str, dict[int, str]] = {key: {} for key in keys}
    others = []
    for name in sorted(files_in(folder)) if os.path.isdir(folder) else ():
        match = _FRAME.fullmatch(name)
        if match and match[1] in frames and int(match[2]) not in frames[match[1]]:
            frames[match[1]][int(match[2])] = name
        elif name.endswith(".png"):
            others.append(name)
    return frames, others


def _notes(
    frames: dict[str, dict[int, str]], counts: dict[str, int | None], unknown_files: list[str]
) -> tuple[str, ...]:
    base = 0 if any(0 in numbers for numbers in frames.values()) else 1
    missing, extra = [], []
    for key, numbers in frames.items():
        listed = range(base, base + (counts[key] or 0))
        missing += [f"{key}_{number}.png" for number in listed if number not in numbers]
        if counts[key] is not None:
            extra += [name for number, name in sorted(numbers.items()) if number not in listed]
    return (
        *note([key for key, count in counts.items() if count == 0], "keys with num_frames 0"),
        *note(missing, f"frames listed in {CAPTIONS} but missing in {FRAMES}/"),
        *note(extra, f"frames used although num_frames in {CAPTIONS} is smaller"),
        *note(unknown_files, f"files in {FRAMES}/ that match no key of {CAPTIONS}"),
    )
