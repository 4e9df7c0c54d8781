"""`--shard auto` finds its part in the variables of Kubernetes, Slurm and torchrun, or says in one line what is wrong."""

from __future__ import annotations

import pytest

from fastgen.errors import InputError
from fastgen.generate import shard_auto
from fastgen.generate.shard_auto import auto_shard, gpu_of_rank

KUBERNETES = {"JOB_COMPLETION_INDEX": "2"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


def slurm(index, count, first, last, step=1):
    names = {"ID": index, "COUNT": count, "MIN": first, "MAX": last, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize(
    ("variables", "of", "shard", "said"),
    [
        (KUBERNETES, 8, "3/8", "shard 3/8, by JOB_COMPLETION_INDEX=2 of 8"),
        (slurm(0, 4, 0, 3), None, "1/4", "shard 1/4, by SLURM_ARRAY_TASK_ID=0 of 0-3"),
        (slurm(4, 4, 1, 4), 4, "4/4", "shard 4/4, by SLURM_ARRAY_TASK_ID=4 of 1-4"),
        (slurm(7, 1, 7, 7), None, "1/1", "shard 1/1, by SLURM_ARRAY_TASK_ID=7 of 7-7"),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, None, "3/4", "of 0-3"),
        (TORCHRUN, None, "4/4", "shard 4/4, by RANK=3 and WORLD_SIZE=4"),
        ({**TORCHRUN, **slurm(1, 2, 0, 1), **KUBERNETES}, 5, "3/5", "; SLURM_ARRAY_TASK_ID, RANK not used"),
        ({**TORCHRUN, **slurm(1, 2, 0, 1)}, None, "2/2", "; RANK not used"),
    ],
)
def test_the_shard_is_that_of_the_first_variables(variables, of, shard, said):
    lines = []
    assert str(auto_shard(variables, of, lines.append)) == shard
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize(
    ("variables", "of", "message"),
    [
        ({}, None, r"--shard auto: JOB_COMPLETION_INDEX \(with --of N\), SLURM_ARRAY_TASK_ID and RANK are not set"),
        ({"WORLD_SIZE": "2", "SLURM_JOB_ID": "7"}, 2, "are not set"),
        (KUBERNETES, None, "JOB_COMPLETION_INDEX does not tell the number of shards; add --of N"),
        (KUBERNETES, 2, "JOB_COMPLETION_INDEX: found 2, out of range for 2 shards"),
        ({"JOB_COMPLETION_INDEX": "-1"}, 2, "JOB_COMPLETION_INDEX: found '-1', expected a whole number from 0"),
        ({"JOB_COMPLETION_INDEX": ""}, 2, "JOB_COMPLETION_INDEX: found ''"),
        ({"JOB_COMPLETION_INDEX": "1" * 5000}, 2, "JOB_COMPLETION_INDEX: found '1"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, None, "SLURM_ARRAY_TASK_COUNT: is not set"),
        (slurm(1, 0, 1, 1), None, "SLURM_ARRAY_TASK_COUNT: found '0', expected a whole number from 1"),
        (slurm(5, 4, 0, 3), None, "SLURM_ARRAY_TASK_ID: found 5, out of range for 4 shards"),
        (slurm(0, 4, 1, 4), None, "SLURM_ARRAY_TASK_ID: found 0, out of range for 4 shards"),
        (slurm(2, 4, 0, 6, step=2), None, "found 4 tasks from 0 to 6, with step 2, expected an array without holes"),
        (slurm(3, 3, 1, 7), None, "SLURM_ARRAY_TASK_COUNT: found 3 tasks from 1 to 7"),
        (slurm("x", 4, 0, 3), None, "SLURM_ARRAY_TASK_ID: found 'x'"),
        (slurm(0, 4, 0, 3), 8, "--of: found 8, expected 4, by SLURM_ARRAY_TASK_ID=0 of 0-3"),
        ({"RANK": "0"}, None, "WORLD_SIZE: is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None, "RANK: found 2, out of range for 2 shards"),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, None, "RANK: found '1.0'"),
        (TORCHRUN, 2, "--of: found 2, expected 4, by RANK=3 and WORLD_SIZE=4"),
    ],
)
def test_what_the_variables_do_not_say_is_one_line(variables, of, message):
    with pytest.raises(InputError, match=message) as raised:
        auto_shard(variables, of, lambda line: pytest.fail(line))
    assert len(str(raised.value)) <= 280
    assert "\n" not in str(raised.value)


def test_each_process_of_torchrun_gets_a_gpu_where_there_are_several(monkeypatch):
    monkeypatch.setattr(shard_auto, "gpus", lambda: (["a card", "another"], None))
    assert gpu_of_rank(TORCHRUN) == "1"
    assert gpu_of_rank({**TORCHRUN, "CUDA_VISIBLE_DEVICES": "4, 6"}) == "6"
    assert gpu_of_rank({**TORCHRUN, "CUDA_VISIBLE_DEVICES": "4"}) is None
    assert gpu_of_rank({**TORCHRUN, **KUBERNETES}) is None
    assert gpu_of_rank({"RANK": "0", "WORLD_SIZE": "2"}) is None
    with pytest.raises(InputError, match="LOCAL_RANK: found 2, and this machine shows 2 GPUs"):
        gpu_of_rank({**TORCHRUN, "LOCAL_RANK": "2"})
    monkeypatch.setattr(shard_auto, "gpus", lambda: ([], None))
    assert gpu_of_rank(TORCHRUN) is None
