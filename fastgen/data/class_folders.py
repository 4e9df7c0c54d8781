"""A folder of images per class, such as cat/*.jpg and dog/*.jpg, in the root or in train/: each image has one label."""

from __future__ import annotations

from pathlib import Path

from fastgen.data.dataset import Dataset, Example, files_in, note
from fastgen.data.folders import OTHERS, SPLITS, TRAIN, folders_in, images_in, is_image, other_splits
from fastgen.data.imagefolder import METADATA
from fastgen.data.labels import objects_for
from fastgen.files.jsonfiles import located
from fastgen.files.names import check_text

NO_CLASSES = (*SPLITS, "images", "iclevr", "masks", "labels", "annotations", "runs", "generated", "previews")


def recognise(root: Path) -> bool:
    return _base(root) is not None


def lies_in(root: Path) -> bool:
    """Whether train/ has the folders of classes, which is no accident in any folder. Folders of images in the root itself may
    be anything, such as the pictures of several jobs."""
    return _are_classes(root / TRAIN)


def read(root: Path) -> Dataset:
    """The images of all classes. Without objects.json labels are numbered alphabetically."""
    base = _base(root)
    assert base is not None
    examples, empty, other, below = [], [], [], []
    for label in folders_in(base):
        folder = base / label
        with located(base):
            check_text(label, "name of a class")
        prefix = f"{folder.relative_to(root).as_posix()}/"
        images = images_in(folder)
        examples += [Example(folder / name, (), (label,), group=prefix + name) for name in images]
        if not images:
            empty.append(prefix)
        other += [prefix + name for name in sorted(files_in(folder)) if not (is_image(name) or name.startswith("."))]
        below += [f"{prefix}{name}/" for name in folders_in(folder)]
    notes = (
        *note(empty, "folders of classes without an image left out"),
        *note(other, "files in folders of classes that are no images"),
        *note(below, "folders in folders of classes left out"),
        *other_splits(root, base),
    )
    objects = objects_for({str(example.image): example.labels for example in examples}, (base, root))
    return Dataset("labels", root, tuple(examples), objects, notes)


def _base(root: Path) -> Path | None:
    return next((base for base in (root / TRAIN, root) if _are_classes(base)), None)


def _are_classes(base: Path) -> bool:
    """Whether `base` holds folders of images, two or more, and nothing that makes it something else.

    That is: an image beside the folders; a file of OTHERS or of metadata in one of them; a folder with a name of NO_CLASSES;
    a folder that holds files or folders but no image, such as the code of a project.
    """
    names = folders_in(base)
    if len(names) < 2 or any(name.lower() in NO_CLASSES for name in names):
        return False
    files = files_in(base)
    if any(map(is_image, files)) or not OTHERS.isdisjoint(files):
        return False
    marks = OTHERS.union(METADATA)
    with_images = 0
    for name in names:
        files = files_in(base / name)
        if not marks.isdisjoint(files):
            return False
        if any(map(is_image, files)):
            with_images += 1
        elif files or folders_in(base / name):
            return False
    return with_images >= 2
