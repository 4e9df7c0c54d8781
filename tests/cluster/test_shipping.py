"""Folders that travel to a machine of a cluster arrive whole, once, and are checked."""

from __future__ import annotations

import os
import threading
import time

import pytest

from fastgen.cluster import shipping
from fastgen.cluster.shipping import ship, unpack
from fastgen.errors import FastgenError, InputError


class Objects(list):
    """What was put; `get` counts."""

    gets = 0

    def put(self, data):
        self.append(data)
        return len(self) - 1

    def get(self, reference):
        self.gets += 1
        return self[reference]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "model_index.json").write_text("{}")
    (folder / "empty.txt").write_bytes(b"")
    (folder / ".hidden").write_text("a file that is being written")
    (tmp_path / "elsewhere.json").write_text("[1]")
    (folder / "link.json").symlink_to(tmp_path / "elsewhere.json")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shipping, "BLOCK", 1000)  # a file is several blocks


def read(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_arrives_as_it_was_and_a_second_worker_uses_it(model):
    objects = Objects()
    shipment = ship(model, objects.put)
    folder = unpack(shipment, objects.get)
    assert folder.name == "model"
    assert read(folder) == {name: data for name, data in read(model).items() if name != ".hidden"}
    gets = objects.gets
    assert gets == 11 + 1 + 1  # blocks of the weights, the index, and the link's file
    assert unpack(shipment, objects.get) == folder
    assert objects.gets == gets


def test_the_same_files_under_another_name_arrive_under_that_name(model):
    objects = Objects()
    unpack(ship(model, objects.put), objects.get)
    other = model.rename(model.with_name("other"))
    assert unpack(ship(other, objects.put), objects.get).name == "other"
    assert unpack(ship(other / "unet" / "..", objects.put), objects.get).name == "other"


def test_a_single_file_keeps_its_name(model):
    objects = Objects()
    file = unpack(ship(model / "unet" / "weights.safetensors", objects.put), objects.get)
    assert file.name == "weights.safetensors"
    assert unpack(ship(model / "link.json", objects.put), objects.get).name == "link.json"
    assert file.read_bytes() == (model / "unet" / "weights.safetensors").read_bytes()


def test_workers_that_arrive_together_fetch_once(model):
    objects = Objects()
    shipment = ship(model, objects.put)
    found = []
    threads = [threading.Thread(target=lambda: found.append(unpack(shipment, objects.get))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert objects.gets == 13


def test_damage_on_the_way_is_seen_and_nothing_is_left(model, tmp_path):
    objects = Objects()
    shipment = ship(model, objects.put)
    objects[shipment.files[-1].blocks[0]] = b"other"
    with pytest.raises(FastgenError, match="arrived damaged"):
        unpack(shipment, objects.get)
    assert [p.name for p in (tmp_path / "cache" / "cluster").iterdir() if not p.name.endswith(".lock")] == []


def test_what_was_changed_after_it_arrived_is_refused(model):
    objects = Objects()
    shipment = ship(model, objects.put)
    (unpack(shipment, objects.get) / "model_index.json").write_text('{"a": 1}')
    with pytest.raises(FastgenError, match="was changed after it arrived"):
        unpack(shipment, objects.get)


def test_folders_that_no_job_used_for_a_month_go(model, tmp_path):
    objects = Objects()
    old = unpack(ship(model, objects.put), objects.get).parent
    month = time.time() - 31 * 86_400
    os.utime(old, (month, month))
    (model / "new.txt").write_text("another model")
    unpack(ship(model, objects.put), objects.get)
    assert not old.exists()


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="empty folder"):
        ship(tmp_path / "nothing", Objects().put)
