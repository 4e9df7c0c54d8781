"""`fastgen doctor BUNDLE`: every file of a bundle is verified, and what it states about itself is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.engines.cache.artifacts import bundled
from fastgen.engines.cache.listing import size_text
from fastgen.models.bundle import COMPILED, LOWERED, Bundle, read_bundle

UNSEALED = (
    "no digest over bundle.json, which an older fastgen wrote: changes of its fields would not be seen; export it again"
)


@dataclass(frozen=True)
class BundleReport:
    """A bundle whose files are all as they were exported, and its compiled networks."""

    bundle: Bundle
    plans: int

    def lines(self) -> list[str]:
        return [f"{name:11}{text}" for name, text in self._rows()]

    def to_json(self) -> dict[str, Any]:
        spec = self.bundle.spec
        return {
            "bundle": str(self.bundle.folder),
            "bundle_sha256": spec.bundle_sha256,
            "sealed": self.bundle.sealed,
            "model_sha256": spec.sha256,
            "checkpoint": spec.checkpoint,
            "versions": dict(self.bundle.versions),
            "dtypes": self._dtypes(),
            "files": len(self.bundle.files),
            "bytes": self._bytes(),
            "plans": self.plans,
        }

    def _rows(self) -> Iterator[tuple[str, str]]:
        spec, bundle = self.bundle.spec, self.bundle
        yield "bundle", str(bundle.folder)
        yield "digest", f"{spec.bundle_sha256}, verified" if bundle.sealed else UNSEALED
        yield "weights", f"{spec.sha256}{f', checkpoint {spec.checkpoint}' if spec.checkpoint else ''}"
        yield "takes", f"{spec.condition.takes}; images of {spec.space.size}"
        yield "graphs", ", ".join(self._dtypes())
        yield "files", f"{len(bundle.files)}, {size_text(self._bytes())}, all verified"
        if self.plans:
            yield COMPILED, f"{self.plans} plans"
        yield "made by", ", ".join(f"{name} {version}" for name, version in bundle.versions.items()) or "not recorded"

    def _dtypes(self) -> list[str]:
        return ["fp32", *(dtype for dtype in LOWERED if f"unet/model.{dtype}.onnx" in self.bundle.files)]

    def _bytes(self) -> int:
        return sum(file.bytes for file in self.bundle.files.values())


def examine_bundle(folder: Path) -> BundleReport:
    """Read a bundle and verify every file that bundle.json lists, its graphs and its solver tables too. Raises InputError for
    what is wrong with it."""
    bundle = read_bundle(folder)
    bundle.verify()
    for name in bundle.files:
        network = name.partition("/")[0]
        bundle.graph(name) if name.endswith(".onnx") and network in bundle.spec.all_signatures else bundle.file(name)
    for key in bundle.solver_keys():
        bundle.table(key)
    plans = bundled(bundle)
    for plan in plans:
        plan.verify()
    return BundleReport(bundle, len(plans))
