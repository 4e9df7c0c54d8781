from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastgen.errors import InputError
from fastgen.presets import NetworkPreset, Preset, Training, load_preset, preset_names

LABELS = """
image_size = 64
[unet.config]
sample_size = 64
[unet.train]
steps = 10
adam_betas = [0.9, 0.99]
[conditioner]
kind = "class_embed"
[scheduler]
_class_name = "DDPMScheduler"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_of_the_package_is_valid(name: str) -> None:
    assert load_preset(name).name == name


def test_a_users_file_is_a_preset_named_after_it(tmp_path: Path) -> None:
    preset = load_preset(write(tmp_path, LABELS))
    assert (preset.name, preset.kind, preset.image_mode) == ("mine", "labels", "stretch")
    assert preset.described == "labels -> pixels"
    assert preset.unet is not None
    assert preset.unet.train == Training(steps=10, adam_betas=(0.9, 0.99))


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("unet.train.steps=300", 300),
        ("unet.train.learning_rate = 1e-3", 1e-3),
        ("unet.train.precision=fp32", "fp32"),
        ('unet.train.precision="fp32"', "fp32"),
        ("unet.train.adam_betas=[0.8, 0.9]", (0.8, 0.9)),
        ("unet.train.flip=true", True),
    ],
)
def test_an_override_replaces_one_key_by_a_toml_value(tmp_path: Path, override: str, found: object) -> None:
    preset = load_preset(write(tmp_path, LABELS), [override])
    assert preset.unet is not None
    key = override.partition("=")[0].strip().split(".")[-1]
    assert getattr(preset.unet.train, key) == found


def test_an_override_reaches_a_networks_own_arguments_and_the_top(tmp_path: Path) -> None:
    preset = load_preset(write(tmp_path, LABELS), ["unet.config.block_out_channels=[8, 16]", "image_size=32"])
    assert preset.unet is not None
    assert preset.unet.config["block_out_channels"] == [8, 16]
    assert preset.image_size == 32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unet.train.stpes=3", r"unet\.train: unknown field 'stpes'; did you mean 'steps'"),
        ("unt.train.steps=3", r"unknown table 'unt'; did you mean 'unet'"),
        ("unet.trian.steps=3", r"unknown table 'unet\.trian'; did you mean 'unet\.train'"),
        ("unet.train.steps", r"found 'unet\.train\.steps', expected KEY=VALUE"),
        ("unet.train.steps=many", r"unet\.train\.steps: found 'many', expected a whole number from 0"),
        ("unet.train.steps=[1", r"unet\.train\.steps: found '\[1', expected a TOML value"),
        ("unet.train.steps=true", r"unet\.train\.steps: found True, expected a whole number"),
        ("unet.train.steps=0", r"unet\.train: steps, epochs: found \(0, 0\), expected one of them"),
        ("unet.train.accumulation=5", r"unet\.train: accumulation: found 5, expected a divisor of batch_size = 32"),
        ("unet.train.precision=fp8", r"unet\.train\.precision: found 'fp8', expected .*; did you mean"),
        ("unet.train.adam_betas=[0.9]", r"unet\.train\.adam_betas: found \[0\.9\], expected a list of 2"),
        ("unet.train=3", r"unet\.train: found 3, expected an object"),
        ("conditioner.kind=embed", r"conditioner\.kind: found 'embed', expected .*class_embed"),
        ("conditioner.width=3", r"conditioner: unknown field 'width'"),
        ("sampling.guidance_scale=-1", r"sampling\.guidance_scale: found -1, expected a number from 0 to 1000"),
        ("image_mode=strech", r"image_mode: found 'strech', expected .*; did you mean 'stretch'"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_it(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load_preset(write(tmp_path, LABELS + "[sampling]\nscheduler = 'ddim'\n"), [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family = \n", "not valid TOML.*line 1"),
        (LABELS.replace("steps = 10", ""), r"unet\.train: steps, epochs: found \(0, 0\), expected one of them"),
        ('family = "label"' + LABELS, r"unknown family 'label'; did you mean 'labels'"),
        (
            'family = "text"' + LABELS,
            r"family 'text': found \['conditioner', 'scheduler', 'unet'\], expected \[text_encoder\]",
        ),
        (
            LABELS.partition("[unet.config]")[0] + "[scheduler]\na = 1\n",
            r"tables: found \['scheduler'\], expected \[unet\] and \[sch",
        ),
        (
            LABELS + "[text_encoder]\npath = 'clip'\n",
            r"\[text_encoder\] for text, or \[conditioner\] for labels, not both",
        ),
        (LABELS.replace('"class_embed"', '"class_embed"\nembed = "onehot"'), r"conditioner\.embed: found 'onehot'"),
        (LABELS.replace("[unet.train]\nsteps = 10\nadam_betas = [0.9, 0.99]", ""), r"unet\.train: found None"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as raised:
        load_preset(path)
    assert str(path) in str(raised.value)


def test_an_unknown_preset_names_the_nearest_one() -> None:
    with pytest.raises(InputError, match="did you mean 'monsters-64'"):
        load_preset("monster-64")


def test_a_network_is_either_loaded_or_trained() -> None:
    with pytest.raises(InputError, match="either a path"):
        NetworkPreset(path="folder", config={"a": 1})
    with pytest.raises(InputError, match="either a path"):
        NetworkPreset()


def test_a_preset_that_still_names_its_family_is_the_same_preset(tmp_path: Path) -> None:
    assert load_preset(write(tmp_path, 'family = "labels"' + LABELS)) == load_preset(write(tmp_path, LABELS))


def test_the_tables_say_what_a_model_is_conditioned_on_and_what_it_works_on() -> None:
    trained = NetworkPreset(config={"a": 1}, train=Training(steps=1))
    tables: dict[str, Any] = {"text_encoder": trained, "conditioner": {"kind": "concat"}, "vae": trained}
    for names, described in (
        ((), "nothing -> pixels"),
        (("vae",), "nothing -> latents"),
        (("text_encoder",), "text -> pixels"),
        (("text_encoder", "vae"), "text -> latents"),
        (("conditioner", "vae"), "labels -> latents"),
    ):
        preset = Preset("x", 64, "pad", trained, {"_class_name": "DDPMScheduler"}, **{n: tables[n] for n in names})
        assert preset.described == described
        assert preset.kind == described.partition(" ")[0]


def test_a_preset_needs_a_unet_and_the_schedule_that_it_learns() -> None:
    trained = NetworkPreset(config={"a": 1}, train=Training(steps=1))
    with pytest.raises(InputError, match=r"tables: found \['unet'\], expected \[unet\] and \[scheduler\] at least"):
        Preset("x", 64, "pad", unet=trained)


def test_the_width_of_an_evaluator_may_be_set() -> None:
    for overrides, config in (([], {}), (["evaluator.config.width=16"], {"width": 16})):
        evaluator = load_preset("evaluator", overrides).evaluator
        assert evaluator is not None
        assert dict(evaluator.config) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("width=0", r"evaluator\.config\.width: found 0, expected a whole number from 1 to 256"),
        ("width=1.5", r"evaluator\.config\.width: found 1\.5, expected a whole number"),
        ("depth=50", r"evaluator\.config: unknown field 'depth'"),
    ],
)
def test_a_wrong_setting_of_an_evaluator_is_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_preset("evaluator", [f"evaluator.config.{override}"])


def test_epochs_become_steps_of_the_training_examples() -> None:
    recipe = Training(epochs=30, batch_size=128, warmup_fraction=0.05, validate_every_epochs=2).for_examples(43_294)
    assert (recipe.steps, recipe.warmup_steps, recipe.validate_every) == (10147, 507, 676)
    assert recipe.for_examples(43_294) == recipe


def test_an_override_may_begin_a_table_that_the_file_leaves_out(tmp_path: Path) -> None:
    path = write(tmp_path, LABELS)
    preset = load_preset(path, ["unet.train.loss.kl=0.01", 'preview.labels=[["red cube"]]'])
    assert preset.unet.train.loss == {"kl": 0.01}  # type: ignore[union-attr]
    assert preset.preview == {"labels": [["red cube"]]}


def test_an_override_of_steps_replaces_epochs(tmp_path: Path) -> None:
    path = write(tmp_path, LABELS.replace("steps = 10", "epochs = 3"))
    assert load_preset(path).unet.train.epochs == 3  # type: ignore[union-attr]
    recipe = load_preset(path, ["unet.train.steps=7"]).unet.train  # type: ignore[union-attr]
    assert (recipe.steps, recipe.epochs) == (7, 0)  # type: ignore[union-attr]
