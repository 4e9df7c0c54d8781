"""The memory that a container or a job of Slurm may use."""

from __future__ import annotations

import pytest

from fastgen.engines.machine import cpu, memory_limits

GIB = 2**30
V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def group(folder, names, limit, used, stat=""):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{value}\n")


def test_version_2_has_limits_at_every_level(tmp_path):
    group(tmp_path / "job" / "step", V2, "max", GIB)
    group(tmp_path / "job", V2, 8 * GIB, 3 * GIB, f"anon {GIB}\nactive_file {GIB}\ninactive_file {GIB // 2}")
    assert list(memory_limits("0::/job/step\n", tmp_path)) == [(8 * GIB, 6.5 * GIB)]


def test_in_a_container_the_group_is_the_root(tmp_path):
    group(tmp_path, V2, 4 * GIB, 5 * GIB)
    assert list(memory_limits("0::/somewhere/else\n", tmp_path)) == [(4 * GIB, 0)]


def test_version_1_has_a_folder_of_its_own_for_memory(tmp_path):
    group(tmp_path / "memory" / "docker", V1, 2 * GIB, GIB, f"inactive_file 7\ntotal_inactive_file {GIB // 4}")
    group(tmp_path / "memory", V1, 2**63 - 4096, GIB)
    groups = "5:cpu,cpuacct:/docker\n4:memory:/docker\n"
    assert list(memory_limits(groups, tmp_path)) == [(2 * GIB, 1.25 * GIB)]


@pytest.mark.parametrize("groups", ["", "nonsense\n", "0::/\n", "3:memory:/a\n"])
def test_no_group_is_no_limit(groups, tmp_path):
    assert list(memory_limits(groups, tmp_path)) == []


def test_the_smallest_counts(monkeypatch):
    machine = cpu()
    limits = [(2**50, 2**50), (3 * 2**20, 2**20)]
    monkeypatch.setattr("fastgen.engines.machine.memory_limits", lambda: iter(limits))
    assert (cpu().memory, cpu().memory_free) == (3 * 2**20, 2**20)
    assert machine.memory is None or machine.memory > 3 * 2**20
