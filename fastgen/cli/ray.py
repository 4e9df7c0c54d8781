"""The options of commands that use a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cli.certifying import ensure_certified
from fastgen.cli.common import say
from fastgen.cli.parameters import THREADS, option
from fastgen.errors import InputError

if TYPE_CHECKING:
    from fastgen.cluster.pool import Pool
    from fastgen.generate.job_record import Environment


def ray_options(command: Any) -> Any:
    """--ray, --cpus-per-worker and --allow-mixed, in the order of the help; see `RayOptions.of`."""
    options = [
        option(
            "--ray",
            is_flag=False,
            flag_value="local",
            metavar="[ADDRESS]",
            help="Make the images on a Ray cluster: a new one on this machine, auto (the one that runs here), or "
            "HOST:PORT of its head node. Write it last, or as --ray=ADDRESS.",
        ),
        option(
            "--cpus-per-worker",
            type=THREADS,
            metavar="K",
            help="With --ray: CPUs, and threads, of each worker.  [default: all of a machine; 1 beside a GPU]",
        ),
        option(
            "--allow-mixed",
            is_flag=True,
            help="With --ray: also use machines with other cards or versions; each image's line says which.",
        ),
    ]
    for add in reversed(options):
        command = add(command)
    return command


@dataclass(frozen=True)
class RayOptions:
    """`address`: see `cluster.connect.parse_address`. `cpus`: of each worker. `mixed`: machines of several kinds may work."""

    address: str
    cpus: int | None
    mixed: bool

    @staticmethod
    def of(
        address: str | None, cpus: int | None, mixed: bool, others: Mapping[str, object], device: str | None
    ) -> RayOptions | None:
        """The values of the options; None without --ray. Raises InputError for one of the `others` (name -> value) beside it,
        for the rest of these options without it, for a device with a number, and where Ray is missing."""
        if address is None:
            for name, given in (("--cpus-per-worker", cpus is not None), ("--allow-mixed", mixed)):
                if given:
                    raise InputError(f"{name} belongs to --ray; give both or neither")
            return None
        for name, value in others.items():
            if value not in (None, False):
                raise InputError(f"--ray shares the work out itself; leave {name} out")
        if device is not None and ":" in device:
            raise InputError(f"--device {device}: with --ray each worker gets a GPU of its own; give cpu or cuda")
        from fastgen.cluster.connect import check_installed, parse_address

        check_installed()
        return RayOptions(parse_address(address), cpus, mixed)

    @contextmanager
    def pool(
        self, model: Path, engine: str | None, load: Mapping[str, Any], rag: Path | None, expected: Environment | None
    ) -> Iterator[Pool]:
        """Workers of the cluster with this model. `load`: arguments of `fastgen.load`; `rag`: an index;
        `expected`: the kind of machine, None for the most common. Raises InputError and FastgenError."""
        from fastgen.cluster.connect import cluster
        from fastgen.cluster.machines import Slot
        from fastgen.cluster.pool import Pool
        from fastgen.cluster.shipping import Shipment, ship
        from fastgen.cluster.worker import WorkerOptions
        from fastgen.engines import engine_class

        with cluster(self.address, say) as (ray, here):

            def place(path: Path) -> Path | Shipment:
                return path.absolute() if here else ship(path, ray.put)

            device = load.get("device")
            gpus = sum(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
            wanted = device is None and gpus >= 1 and not (engine and engine_class(engine).cpu_only)
            slot = Slot(self.cpus, device == "cuda" or wanted)
            arguments = {**load, "device": "cuda" if slot.gpu else "cpu"}
            if not slot.gpu and arguments.get("threads") is None:
                arguments["threads"] = self.cpus
            loras = arguments.pop("loras", None)
            options = WorkerOptions(
                place(model),
                engine,
                arguments,
                None if loras is None else [(lora, place(lora.file)) for lora in loras],
                None if rag is None else place(rag),
                ensure_certified,
                self.mixed,
            )
            with Pool(ray, slot, options, expected=expected, say=say) as pool:
                yield pool
