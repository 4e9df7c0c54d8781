"""The machines of a cluster: how many workers each has room for, and which of them may work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen import __version__
from fastgen.cluster.environment import most_common
from fastgen.cluster.worker import Refused
from fastgen.errors import FastgenError, InputError, Say
from fastgen.generate.job_record import Environment, difference

DEATHS_AT_START = 5  # of a machine's workers while they load the model, one after the other, after which it is left out


@dataclass(frozen=True)
class Slot:
    """What a worker takes of a machine. `cpus`: None for one beside a GPU, and else for all that the machine has."""

    cpus: int | None
    gpu: bool

    def __str__(self) -> str:
        cpus = "a CPU" if self.cpus in (None, 1) else f"{self.cpus} CPUs"
        return f"a GPU and {cpus}" if self.gpu else cpus

    def takes(self, resources: Mapping[str, float]) -> dict[str, int]:
        """For Ray: the CPUs and GPUs of a worker on a machine with these resources."""
        return {
            "num_cpus": self.cpus or (1 if self.gpu else int(resources.get("CPU", 0)) or 1),
            "num_gpus": int(self.gpu),
        }

    def workers(self, resources: Mapping[str, float]) -> int:
        """How many workers fit on a machine with these resources."""
        by_cpus = int(resources.get("CPU", 0)) // self.takes(resources)["num_cpus"]
        return min(by_cpus, int(resources.get("GPU", 0))) if self.gpu else by_cpus


class Machines:
    """The machines of a cluster. `kind`: the environment of those that work, None until it is chosen; `mixed`: machines of
    several kinds may work. `say` gets a line for each machine that is left out, once work has begun."""

    def __init__(self, ray: Any, slot: Slot, kind: Environment | None, mixed: bool, say: Say) -> None:
        self._ray, self._slot, self.kind, self._mixed, self._say = ray, slot, kind, mixed, say
        self._left_out: dict[str, Refused] = {}
        self._deaths_at_start: Counter[str] = Counter()
        self._working = False

    def room(self) -> dict[str, tuple[int, dict[str, int]]]:
        """Machine -> how many workers it has room for, and what each takes; of those that are there and not left out. Raises
        InputError where no machine has room at all, before work has begun."""
        nodes = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        room = {name: (self._slot.workers(has), self._slot.takes(has)) for name, has in nodes.items()}
        if not self._working and not any(count for count, _ in room.values()):
            found = ", ".join(f"{has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs" for has in nodes.values())
            raise InputError(f"--ray: no machine of the cluster has {self._slot}; found {found or 'none'}")
        return {name: each for name, each in room.items() if name not in self._left_out and each[0]}

    def choose(self, environments: Sequence[Environment]) -> None:
        """Choose the kind of machine, of those on which workers are ready, unless it is known."""
        if self.kind is None or self._mixed:
            self.kind = most_common(environments)

    def begin(self) -> None:
        """Work begins: tell which machines are left out."""
        self._working = True
        for name, refused in self._left_out.items():
            self._tell(name, refused)

    def refusal(self, environment: Environment) -> Refused | None:
        """Why a machine with this environment cannot work; None where it can, as far as the kind is known."""
        text = None
        if (there := environment["fastgen"]) != __version__:
            text = f"fastgen is {there} there and {__version__} here; install one version on all machines"
        elif self.kind is not None and not self._mixed and (found := difference(self.kind, environment)) is not None:
            words = found.replace(" there ", " in this job ").replace(" here", " there")
            text = f"{words}; --allow-mixed takes it"
        return None if text is None else Refused(text, InputError.exit_code)

    def leave_out(self, name: str, refused: Refused) -> None:
        """Let no worker start on a machine any more."""
        if name not in self._left_out:
            self._left_out[name] = refused
            if self._working:
                self._tell(name, refused)

    def started(self) -> None:
        """A worker has loaded the model."""
        self._deaths_at_start.clear()

    def died_at_start(self, name: str, why: str) -> None:
        """A worker has died while it loaded the model; the machine is left out when that happens again and again."""
        self._deaths_at_start[name] += any(node["NodeID"] == name and node["Alive"] for node in self._ray.nodes())
        if self._deaths_at_start[name] >= DEATHS_AT_START:
            text = f"the worker died {DEATHS_AT_START} times while it loaded the model: {why}"
            self.leave_out(name, Refused(text, FastgenError.exit_code))

    def check_left(self) -> None:
        """Where all machines that are there are left out, raises the reason of the last one: InputError for a refusal of the
        user's input, else FastgenError."""
        there = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        left_out = [name for name in self._left_out if name in there]
        if not left_out or self.room():
            return
        name, refused = left_out[-1], self._left_out[left_out[-1]]
        kind = InputError if refused.exit_code == InputError.exit_code else FastgenError
        raise kind(f"--ray: {self.name(name)}: {refused.text}")

    def name(self, node: str) -> str:
        """The address of a machine, for messages."""
        found = next((n for n in self._ray.nodes() if n["NodeID"] == node), None)
        return found["NodeManagerAddress"] if found else node[:8]

    def _tell(self, name: str, refused: Refused) -> None:
        self._say(f"ray: {self.name(name)} is left out: {refused.text}")
