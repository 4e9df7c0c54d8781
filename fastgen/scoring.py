"""`fastgen score`: how many of the requested objects an evaluator finds in the generated images."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastgen import metrics
from fastgen.errors import FastgenError, InputError
from fastgen.images import METADATA_KEY
from fastgen.jsonfiles import brief
from fastgen.metrics import Share
from fastgen.names import ICLEVR_OBJECTS, check_objects, read_objects
from fastgen.requests import Request, multi_hot, read_requests

if TYPE_CHECKING:
    from fastgen.evaluator import Evaluator

SIZE = (64, 64)  # what the evaluator is trained on
LISTED = 10


@dataclass(frozen=True)
class Score:
    """Label accuracy of one or several folders of images generated from the same requests (one folder per seed)."""

    requests: str
    evaluator: str
    num_images: int  # in each folder
    resized: int  # images of all folders that were not 64 x 64 px
    folders: Mapping[str, float]  # folder -> label accuracy
    standard_error: float  # NaN for one folder of one image
    by_count: Mapping[int, Share]  # number of objects in the image -> found and asked for, all folders together
    by_object: Mapping[str, Share]  # object -> found and asked for; only objects that were asked for

    @property
    def accuracy(self) -> float:
        """Mean over the folders; as they share their requests, also the share of all labels of all folders."""
        return float(np.mean(list(self.folders.values())))

    @property
    def error_over(self) -> str:
        """What the standard error was taken over: "seeds" (folders), or "images" of the only folder."""
        return "seeds" if len(self.folders) > 1 else "images"

    def to_json(self) -> dict[str, Any]:
        """A value for `json.dumps`; a standard error that is undefined is None."""
        return {
            "accuracy": self.accuracy,
            "standard_error": None if math.isnan(self.standard_error) else self.standard_error,
            "standard_error_over": self.error_over,
            "requests": self.requests,
            "evaluator": self.evaluator,
            "num_images": self.num_images,
            "resized": self.resized,
            "folders": dict(self.folders),
            "by_count": {str(count): _share_json(share) for count, share in self.by_count.items()},
            "by_object": {name: _share_json(share) for name, share in self.by_object.items()},
        }

    def table(self) -> str:
        """Several lines of text: the accuracy with its standard error, then folders, object counts and objects."""
        labels = sum(share.total for share in self.by_count.values()) // len(self.folders)
        runs = f"{len(self.folders)} seeds of " if len(self.folders) > 1 else ""
        lines = [f"label accuracy {self.accuracy:.4f} over {runs}{self.num_images} images with {labels} labels"]
        if not math.isnan(self.standard_error):
            lines.append(f"standard error {self.standard_error:.4f} over {self.error_over}")
        if self.resized:
            lines.append(f"{self.resized} images resized to 64 x 64 px (bilinear, antialiased)")
        if len(self.folders) > 1:
            lines += _rows("folder", [(name, f"{value:.4f}") for name, value in self.folders.items()])
        lines += _rows("objects in image", [(str(n), _share_text(s)) for n, s in self.by_count.items()])
        lines += _rows("object", [(name, _share_text(s)) for name, s in self.by_object.items()])
        return "\n".join(lines)


def score(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    requests: str | os.PathLike[str],
    *,
    evaluator: str | os.PathLike[str],
    objects: Mapping[str, int] | str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    batch_size: int = 64,
) -> Score:
    """Score the images of label requests: by the official protocol (`metrics.label_accuracy`), over the whole set.

    images: a folder with `<image_name>` for every request, or several of them, one per seed; the standard error is then
    over seeds, else over the images of the one folder. Images are read as RGB and scaled to [-1, 1]; one that is not
    64 x 64 px is stretched to that with Pillow's bilinear filter, antialiased.
    evaluator: what `evaluator.load` reads. objects: name -> output of the evaluator, or a JSON file of that; by default
    what the evaluator's folder says, else objects.json beside the requests, else the 24 objects of i-CLEVR.

    Raises InputError for requests that are prompts, objects the evaluator does not know, images that are missing, not
    readable or generated for other labels, and an evaluator that does not load; FastgenError without torch.
    """
    folders, path = _folders(images), Path(requests)
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: expected at least 1")
    judge = _load_evaluator(Path(evaluator), allow_pickle)
    known = _objects(judge, objects, path)
    wanted = read_requests(path, known)
    if wanted[0].kind != "labels":
        raise InputError(
            f'{path}: holds prompts; label accuracy needs requests with labels, such as [["red cube"], ...]'
        )
    for folder in folders:
        _check_present(folder, wanted)
    targets = multi_hot(wanted, known)  # (N, K)
    scores, resized = zip(*(_folder_scores(folder, wanted, judge, batch_size) for folder in folders), strict=True)
    return _summary(folders, path, Path(evaluator), list(known), scores, targets, sum(resized))


def read_image(path: Path) -> Image.Image:
    """A PNG file as RGB, its text chunks in `info`. InputError if it is damaged, too large or not 8 bits deep."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as file:
                if file.mode.startswith(("I", "F")):
                    raise InputError(f"{path}: mode {file.mode}, expected an image with 8 bits per channel")
                return file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: cannot be read as a PNG image: {error}") from None


def to_input(image: Image.Image) -> np.ndarray:
    """An RGB image, stretched to 64 x 64 px where it is not that already -> (3, 64, 64) float32 in [-1, 1]."""
    if image.size != SIZE:
        image = image.resize(SIZE, Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


def _folders(images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    folders = [Path(images)] if isinstance(images, str | os.PathLike) else [Path(folder) for folder in images]
    if not folders:
        raise InputError("no folder of images was given")
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, expected the images that `fastgen generate` wrote")
        if folder.resolve() in seen:
            raise InputError(f"{folder}: given twice; every folder counts as a seed of its own")
        seen.add(folder.resolve())
    return folders


def _load_evaluator(path: Path, allow_pickle: bool) -> Evaluator:
    try:
        from fastgen.evaluator import load
    except ModuleNotFoundError as error:
        raise FastgenError(
            f"scoring needs {error.name}, which is not installed: pip install 'fastgen-diffusion[train]'"
        ) from None
    return load(path, allow_pickle)


def _objects(
    judge: Evaluator, objects: Mapping[str, int] | str | os.PathLike[str] | None, requests: Path
) -> Mapping[str, int]:
    """Object name -> output of the evaluator, in output order."""
    if objects is not None:
        found = read_objects(objects) if isinstance(objects, str | os.PathLike) else objects
        check_objects(found)
        if judge.objects is not None and dict(found) != dict(judge.objects):
            raise InputError("objects: they differ from those in the evaluator's folder; leave the option out")
    elif judge.objects is not None:
        found = judge.objects
    else:
        beside = requests.parent / "objects.json"
        found = read_objects(beside) if beside.exists() else ICLEVR_OBJECTS
    if len(found) != judge.num_labels:
        raise InputError(
            f"the evaluator has {judge.num_labels} outputs, the list of objects {len(found)}: expected one for each"
        )
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _check_present(folder: Path, requests: Sequence[Request]) -> None:
    missing = [r.image_name for r in requests if not (folder / r.image_name).is_file()]
    if missing:
        listed = ", ".join(missing[:LISTED]) + (", ..." if len(missing) > LISTED else "")
        raise InputError(f"{folder}: {len(missing)} of {len(requests)} images are missing: {listed}")


def _folder_scores(
    folder: Path, requests: Sequence[Request], judge: Evaluator, batch_size: int
) -> tuple[np.ndarray, int]:
    """Scores (N, K) of the folder's images in request order, and how many were resized."""
    scores, resized = [], 0
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        images = [read_image(folder / request.image_name) for request in batch]
        for image, request in zip(images, batch, strict=True):
            _check_made_for(image, folder / request.image_name, request)
        scores.append(judge.predict(np.stack([to_input(image) for image in images]), batch_size))  # (B, K)
        resized += sum(image.size != SIZE for image in images)
    return np.concatenate(scores), resized


def _check_made_for(image: Image.Image, path: Path, request: Request) -> None:
    """InputError when the image's own metadata names other labels: a task's test files share their image names."""
    try:
        metadata = json.loads(image.info.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: its text chunk {METADATA_KEY!r} is not the JSON of a generated image") from None
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    if labels is None:
        return
    found = sorted(map(str, labels)) if isinstance(labels, list) else labels
    if found != (expected := sorted(request.labels or ())):
        raise InputError(
            f"{path}: was generated for {brief(found)}, the requests say {brief(expected)}: another file's?"
        )


def _summary(
    folders: Sequence[Path],
    requests: Path,
    evaluator: Path,
    names: Sequence[str],
    scores: Sequence[np.ndarray],
    targets: np.ndarray,
    resized: int,
) -> Score:
    values = [metrics.label_accuracy(s, targets) for s in scores]
    pooled, repeated = np.concatenate(scores), np.tile(targets, (len(scores), 1))  # (S N, K) both
    one = len(values) == 1
    return Score(
        requests=str(requests),
        evaluator=str(evaluator),
        num_images=len(targets),
        resized=resized,
        folders={str(folder): value for folder, value in zip(folders, values, strict=True)},
        standard_error=(metrics.standard_error_over_images(pooled, targets) if one else metrics.standard_error(values)),
        by_count=metrics.accuracy_by_count(pooled, repeated),
        by_object={
            name: share
            for name, share in zip(names, metrics.accuracy_by_object(pooled, repeated), strict=True)
            if share.total
        },
    )


def _share_json(share: Share) -> dict[str, Any]:
    return {"accuracy": share.accuracy, "hits": share.hits, "labels": share.total}


def _share_text(share: Share) -> str:
    return f"{share.accuracy:.4f}  ({share.hits} of {share.total})"


def _rows(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    """A blank line, a heading and the rows, with the first column padded to one width."""
    width = max(len(title), *(len(name) for name, _ in rows))
    return ["", f"{title:<{width}}  accuracy", *(f"{name:<{width}}  {value}" for name, value in rows)]
