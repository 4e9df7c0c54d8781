"""`Scorer` loads networks and reference once, then scores any number of runs, each in one pass over its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastgen import __version__
from fastgen.data.attributes import MEAN, read_attributes
from fastgen.errors import InputError
from fastgen.generate.requests import Request, multi_hot, parse_requests, read_requests
from fastgen.models.precision import device_of
from fastgen.scoring.attribute_accuracy import attribute_samples, attribute_targets, metric_names, value_shares
from fastgen.scoring.clip import ClipNetwork, cosines, load_clip
from fastgen.scoring.distances import Frechet, Kernel
from fastgen.scoring.generated_images import Paths, image_folders, image_names, made_by, saving
from fastgen.scoring.judge import is_judged, values_file
from fastgen.scoring.label_accuracy import breakdowns, label_objects, label_sample
from fastgen.scoring.metrics import Share
from fastgen.scoring.networks import EvaluatorNetwork, FeatureNetwork, evaluator_network, inception_network
from fastgen.scoring.options import PathLike, ScoringOptions, need, takes_options
from fastgen.scoring.passes import FolderPass, one_pass
from fastgen.scoring.reference_set import (
    ReferenceImages,
    Statistics,
    named_features,
    read_reference,
    reference_statistics,
)
from fastgen.scoring.result import Resized, Score, figure
from fastgen.scoring.samples import Mean, Sample

ENOUGH = 2048  # images; with fewer the covariance of 2,048 features does not have full rank


@dataclass(frozen=True)
class Work:
    """The requests and targets of one run, read before its images are decoded."""

    requests: Sequence[Request] | None
    objects: Mapping[str, int] | None  # name -> output of the evaluator; None where label accuracy is not measured
    attribute_targets: np.ndarray | None  # (N, K) multi-hot; None where attributes are not measured
    names: tuple[str, ...]
    prompts: tuple[str, ...]  # empty where CLIP-T is not measured
    references: Mapping[str, Path]  # name -> reference image of that name, where there is a CLIP

    @property
    def has_all_references(self) -> bool:
        return len(self.references) == len(self.names)


class Scorer:
    """Scores runs against one evaluator, reference and CLIP. Options and errors as `fastgen.scoring.score`."""

    @takes_options
    def __init__(self, **options: Any) -> None:
        settings = ScoringOptions(**options)
        for option, module in ((settings.features, "torchmetrics"), (settings.clip, "transformers")):
            if option is not None:
                need(module)
        device = device_of(settings.device)
        self.batch_size, self._objects = settings.batch_size, settings.objects
        self.reference: ReferenceImages | None = None
        if settings.reference is not None:
            self.reference = read_reference(Path(settings.reference))
        self.evaluator: EvaluatorNetwork | None = None
        if settings.evaluator is not None:
            self.evaluator = evaluator_network(Path(settings.evaluator), settings.allow_pickle, device)
        self.attributes = self.evaluator.evaluator.attributes if self.evaluator else None
        self._values_file = None if settings.attributes is None else Path(settings.attributes)
        if self._values_file and self.attributes is None:
            raise InputError(f"{settings.evaluator}: judges objects; --attributes is for evaluators of attributes")
        if settings.objects is not None and self.attributes is not None:
            raise InputError(f"{settings.evaluator}: judges attributes; objects are for evaluators of objects")
        self.network: FeatureNetwork | None = None  # of FID and KID
        if str(settings.features) == "evaluator":
            self.network = self.evaluator
        elif settings.features is not None:
            self.network = inception_network(Path(settings.features), settings.allow_pickle, device)
        self.clip: ClipNetwork | None = None
        if settings.clip is not None:
            self.clip = load_clip(str(settings.clip), settings.download, settings.allow_pickle, device)
        self._reference_features: dict[tuple[str, ...], np.ndarray] = {}  # CLIP features of the reference, by names

    def score(self, images: Paths, requests: PathLike | None = None) -> Score:
        """Score one run. Errors as `fastgen.scoring.score`."""
        folders, path = image_folders(images), None if requests is None else Path(requests)
        work = self._work(folders, path)
        judge = self.evaluator if work.objects or work.attribute_targets is not None else None
        networks = {network.name: network for network in (judge, self.network, self.clip) if network}
        passes = [one_pass(folder, work.names, work.requests, networks, self.batch_size) for folder in folders]
        samples = self._samples(work, passes)
        counts, objects = (
            breakdowns(self._label_scores(passes), *self._label_targets(work)) if work.objects else ({}, {})
        )
        values: Mapping[str, Share] = {}
        if work.attribute_targets is not None and self.attributes:
            values = value_shares(self._label_scores(passes), work.attribute_targets, self.attributes)
        metadata = [image for one in passes for image in one.metadata]
        clip = self.clip
        return Score(
            requests=None if path is None else str(path),
            evaluator=None if self.evaluator is None else str(self.evaluator.path),
            num_images=len(work.names),
            metrics={key: figure(key, self.label(key), parts, folders) for key, parts in samples.items()},
            by_count=counts,
            by_object=objects,
            by_value=values,
            reference=self._reference_record(),
            clip=None if clip is None else {"variant": clip.title, "preprocessing": clip.preprocessing},
            resized={name: self._resized(network, passes) for name, network in networks.items()},
            saving=saving(metadata),
            made_by=made_by(metadata),
            warnings=self._warnings(work),
            names=work.names,
            samples=samples,
        )

    @cached_property
    def statistics(self) -> Statistics:
        """The reference's features in the network of FID and KID, with their sums; from the cache where it has them."""
        assert self.reference is not None
        assert self.network is not None
        return reference_statistics(self.reference, self.network, self.batch_size)

    def label(self, key: str) -> str:
        """A metric's full name, which names the network of its features."""
        if key in ("fid", "kid") and self.network:
            return f"{key} ({self.network.title})"
        if key in ("clip_t", "clip_i") and self.clip:
            return f"{key.replace('_', '-')} ({self.clip.title})"
        if key == MEAN and self.attributes:
            return f"{key} (mean of {len(self.attributes)})"
        return key.replace("_", " ")

    def planned(self, requests: PathLike, limit: int | None = None) -> tuple[str, ...]:
        """The metrics that images of these requests (the first `limit`) will be scored by; errors as `score`."""
        work = self._work(None, Path(requests), limit)
        attributes = metric_names(self.attributes) if self.attributes and work.attribute_targets is not None else ()
        metrics = {
            "label_accuracy": work.objects is not None,
            **dict.fromkeys(attributes, True),
            "fid": self.network is not None,
            "kid": self.network is not None,
            "clip_t": self.clip is not None and bool(work.prompts),
            "clip_i": self.clip is not None and work.has_all_references,
        }
        return tuple(key for key, is_measured in metrics.items() if is_measured)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything but the images and requests that scores depend on, as JSON."""
        networks = [network for network in (self.evaluator, self.network, self.clip) if network]
        value: dict[str, Any] = {
            "fastgen": __version__,
            "networks": {n.name: [n.fingerprint, n.preprocessing] for n in networks},
            "reference": None if self.reference is None else self.reference.fingerprint,
            "metrics_network": None if self.network is None else self.network.name,
            "objects": None if self.evaluator is None else self.evaluator.evaluator.objects,
        }
        if self.attributes is None:
            return value
        requested = None if self._values_file is None else read_attributes(self._values_file)
        attributes = {name: list(values) for name, values in self.attributes.items()}
        return value | {"attributes": attributes, "asked": requested}

    def _work(self, folders: Sequence[Path] | None, path: Path | None, limit: int | None = None) -> Work:
        judge = self.evaluator if path and not self.attributes else None
        objects = label_objects(judge.evaluator, self._objects, path) if judge and path else None
        requests = None if path is None else _requests(path, objects)[:limit]
        names = tuple(r.image_name for r in requests or ()) if folders is None else image_names(folders, requests)
        references = self.reference.files_by_name(names) if self.clip and self.reference else {}
        prompts = tuple(r.prompt for r in requests or () if r.prompt is not None) if self.clip else ()
        is_measured = self.evaluator is not None and is_judged(
            requests, path, self.attributes, self._values_file, for_features=self.network is self.evaluator
        )
        targets = None
        if is_measured and requests and path and self.attributes:
            targets = attribute_targets(values_file(self._values_file, path), requests, self.attributes)
        work = Work(requests, objects if is_measured else None, targets, names, prompts, references)
        if self.network and self.reference and (fewest := min(len(work.names), len(self.reference.files))) < 2:
            raise InputError(f"FID and KID need at least 2 images and 2 reference images, found {fewest}")
        if self.clip and not work.prompts and not work.has_all_references:
            needs = "CLIP-T needs --requests with prompts, CLIP-I a --reference with images of the same names"
            raise InputError(f"{self.clip.source}: CLIP has nothing to compare the images with: {needs}")
        return work

    def _samples(self, work: Work, passes: Sequence[FolderPass]) -> dict[str, tuple[Sample, ...]]:
        """Metric -> a sample for each folder, for the metrics that are measured."""
        out: dict[str, tuple[Sample, ...]] = {}
        if work.objects:
            targets, _ = self._label_targets(work)
            out["label_accuracy"] = tuple(label_sample(scores, targets) for scores in self._label_scores(passes))
        if work.attribute_targets is not None and self.attributes:
            out |= attribute_samples(self._label_scores(passes), work.attribute_targets, self.attributes)
        if self.network:
            features = [one.features[self.network.name] for one in passes]
            out["fid"] = tuple(Frechet(x, self.statistics) for x in features)
            out["kid"] = tuple(Kernel(x, self.statistics) for x in features)
        if self.clip and work.prompts:
            texts = self.clip.text_features(work.prompts)
            out["clip_t"] = tuple(Mean(cosines(one.features[self.clip.name], texts)) for one in passes)
        if self.clip and work.has_all_references:
            reference = self._reference_images(work)
            out["clip_i"] = tuple(Mean(cosines(one.features[self.clip.name], reference)) for one in passes)
        return out

    def _label_targets(self, work: Work) -> tuple[np.ndarray, list[str]]:
        """(multi-hot (N, K), the K objects)."""
        assert work.requests is not None
        assert work.objects is not None
        return multi_hot(work.requests, work.objects), list(work.objects)

    def _label_scores(self, passes: Sequence[FolderPass]) -> list[np.ndarray]:
        assert self.evaluator
        return [self.evaluator.scores(one.features[self.evaluator.name]) for one in passes]  # (N, K) each

    def _reference_images(self, work: Work) -> np.ndarray:
        """CLIP features (N, D) of the reference images of the same names."""
        assert self.reference is not None
        assert self.clip is not None
        if work.names not in self._reference_features:
            self._reference_features[work.names] = named_features(
                self.reference, work.references, self.clip, self.batch_size
            )
        return self._reference_features[work.names]

    def _reference_record(self) -> dict[str, Any] | None:
        if self.reference is None:
            return None
        reference = self.reference
        return {"path": str(reference.path), "images": len(reference.files), "sha256": reference.fingerprint}

    def _resized(self, network: FeatureNetwork, passes: Sequence[FolderPass]) -> Resized:
        reference = self.statistics.resized if network is self.network else 0
        return Resized(network.preprocessing, sum(one.resized[network.name] for one in passes), reference)

    def _warnings(self, work: Work) -> tuple[str, ...]:
        out, images, references = [], len(work.names), len(work.references)
        if self.network and self.reference and min(images, len(self.reference.files)) < ENOUGH:
            counts = f"{images} images against {len(self.reference.files)} of the reference"
            out.append(f"FID and KID of {counts}: with fewer than {ENOUGH:,} they are biased (FID) and noisy")
        if self.clip and work.prompts and (count := self.clip.count_truncated(work.prompts)):
            out.append(f"CLIP-T: {count} of {images} prompts were cut to {self.clip.context} tokens")
        if 0 < references < images:
            out.append(
                f"CLIP-I left out: the reference has an image of the same name for {references} of {images} images"
            )
        return tuple(out)


def _requests(path: Path, objects: Mapping[str, int] | None) -> list[Request]:
    """The requests of a file; labels are checked where a judge knows them, not where they only name classes of a model."""
    return (
        parse_requests(path, generated=True).requests
        if objects is None
        else read_requests(path, objects, generated=True)
    )
