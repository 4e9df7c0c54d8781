"""Three minutes of requests, every tenth of whose clients leaves: the server's memory, files and threads stay as they were."""

from __future__ import annotations

import os

import pytest

from benchmarks.serving import warm
from benchmarks.serving_faults import soak
from benchmarks.serving_local import Local
from benchmarks.serving_sections import Bench, singly
from benchmarks.serving_server import Server

pytest.importorskip("onnxruntime")
pytest.importorskip("starlette")
SECONDS = 180.0
LOAD = 0.3  # of what this machine does one by one, which runs other tests beside


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_memory_files_and_threads_stay_as_they_were(text_bundle, tmp_path):
    local = Local(text_bundle, "ort", threads=1)
    with Server(text_bundle, "ort", tmp_path / "serve.log") as server:
        bench = Bench(server, local, SECONDS, singly=LOAD * singly(local))
        warm(bench)
        (row,) = soak(bench)
    assert row["holds"], row
    assert row["wrong_bytes"] == 0
    assert row["pictures"] > 60, row
