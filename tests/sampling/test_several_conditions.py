"""A loop hands any number of conditions to its network, of any dtype, each with an unconditional row of its own."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen.errors import InputError
from fastgen.sampling.loop import initial_latents, sample, unconditional_first

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from fastgen.sampling.compile import TableCompiler  # noqa: E402
from fastgen.sampling.device_loop import DeviceLoop  # noqa: E402

CONFIG = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
SEEDS = [3, 4, 5]
TABLE = np.linspace(-1, 1, 4, dtype=np.float32)  # a value for each class


def network(xp):
    table = xp.asarray(TABLE)

    def predict(sample, timestep, *conditions):
        x = 0.3 * sample + 0.001 * timestep[:, None, None, None]
        for condition in conditions:
            value = table[condition] if str(condition.dtype).endswith("int64") else condition.sum(-1)
            x = x + value[:, None, None, None]
        return x

    return predict


class Engine:
    """What the loop asks of an engine, on a CPU."""

    device, capturable, xp = "cpu", False, torch

    def run(self, name, *inputs):
        return (network(torch)(*inputs),)

    def run_guided(self, sample, timestep, *conds):
        return self.run("unet", torch.cat([sample, sample]), torch.cat([timestep, timestep]), *conds)[0]


def conditions(xp):
    vector = xp.asarray(np.arange(6, dtype=np.float32).reshape(3, 2) / 10)
    classes = xp.asarray(np.array([0, 1, 2]))
    return {
        "none": ((), ()),
        "class": ((classes,), (classes[:1] + 3,)),
        "vector and class": ((vector, classes), (0 * vector[:1], classes)),  # the class stays, row by row
    }


@pytest.mark.parametrize("name", ["none", "class", "vector and class"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_all_loops_give_the_same(name, guidance):
    table = TableCompiler(CONFIG).table("ddpm:6")
    given = {"seeds": SEEDS, "guidance_scale": guidance}
    cond, uncond = conditions(np)[name]
    x = initial_latents(table, SEEDS, (2, 4, 4))
    expected = sample(network(np), table, x, cond, uncond=uncond, **given)
    cond, uncond = conditions(torch)[name]
    x = torch.from_numpy(x)
    found = sample(network(torch), table, x, cond, uncond=uncond, **given)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    loop = DeviceLoop(Engine(), table, x.shape, cond, graphs=False)
    for _ in range(2):  # a second run reuses the buffers
        queued = loop.run(x, cond, uncond=uncond, **given | {"seeds": torch.tensor(SEEDS)})
        np.testing.assert_allclose(queued.numpy(), expected, atol=2e-5)
    if name != "none" and guidance != 1.0:
        assert (
            np.abs(expected - sample(network(np), table, x.numpy(), conditions(np)[name][0], seeds=SEEDS)).max() > 0.01
        )


def test_unconditional_rows_must_match_the_conditions():
    cond, _ = conditions(np)["vector and class"]
    with pytest.raises(InputError, match="1 unconditional arrays, expected 2"):
        unconditional_first(np, cond[:1], cond)
    with pytest.raises(InputError, match="unconditional row of shape"):
        unconditional_first(np, (cond[0][:, :1], cond[1]), cond)
    with pytest.raises(InputError, match="unconditional row of shape"):
        unconditional_first(np, (cond[0][:2], cond[1]), cond)
