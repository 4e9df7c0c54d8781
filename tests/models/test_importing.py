"""Importing: checkpoints that plain diffusers and torch code wrote compute the same here, and what does not fit is listed."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastgen.errors import InputError
from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.models.condition import Condition
from fastgen.models.folder import load_model
from fastgen.models.importing import MismatchError, import_model

LABELS = 24
UNET = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
TEXT_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
COSINE = '[scheduler]\n_class_name = "DDPMScheduler"\nbeta_schedule = "squaredcos_cap_v2"\n'


class Concat(nn.Module):
    """The label model of other people's code: a Linear, and its output as further channels."""

    def __init__(self, first=False):
        super().__init__()
        from diffusers import UNet2DModel

        self.first = first
        self.cond_embed = nn.Linear(LABELS, 6)
        self.model = UNet2DModel(**UNET | {"in_channels": 9})

    def forward(self, x, t, labels):
        planes = self.cond_embed(labels).view(-1, 6, 1, 1).expand(-1, -1, *x.shape[2:])
        return self.model(torch.cat([planes, x] if self.first else [x, planes], 1), t).sample


def patched(**config):
    """A UNet2DModel whose class_embedding was replaced after construction."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(**UNET | config)
    unet.class_embedding = nn.Linear(LABELS, 32)
    return unet.eval()


def toml(path, config, *tables):
    lines = [f"{k} = {json.dumps(list(v) if isinstance(v, tuple) else v)}" for k, v in config.items()]
    head = f"image_size = {32 if 'cross_attention_dim' in config else 16}\n"
    path.write_text("\n".join([head, "[unet.config]", *lines, "[unet.train]\nsteps = 1", *tables]))
    return path


@pytest.fixture
def embed_preset(tmp_path):
    return toml(
        tmp_path / "embed.toml", UNET | {"class_embed_type": "identity"}, '[conditioner]\nkind = "class_embed"', COSINE
    )


@pytest.fixture
def concat_preset(tmp_path):
    return toml(tmp_path / "concat.toml", UNET | {"in_channels": 9}, '[conditioner]\nkind = "concat"\ndim = 6', COSINE)


@pytest.fixture
def text_preset(tmp_path, text_model):
    tables = [f'[{name}]\npath = "{text_model}"\nsubfolder = "{name}"' for name in ("text_encoder", "vae")]
    return toml(tmp_path / "text.toml", TEXT_UNET, *tables, COSINE)


def inputs(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(
        3, 4 if model.condition.kind == "text" else 3, *[model.unet.config.sample_size] * 2, generator=generator
    )
    t = torch.tensor([3.0, 250.0, 999.0])
    if model.condition.kind == "text":
        return x, t, torch.randn(3, 77, 32, generator=generator)
    return x, t, (torch.rand(3, LABELS, generator=generator) < 0.1).float()


def difference(folder, original, dtype=torch.float32):
    """The largest one between the imported model and the original module, called as its author did."""
    model = load_model(folder)
    x, t, condition = (value.to(dtype) for value in inputs(model))
    with torch.no_grad():
        network = model.networks()["unet"].to(dtype)
        return float((network(x, t, condition) - original(x, t, condition)).abs().max())


def refused(tmp_path, *arguments, **options):
    """The error; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        import_model(*arguments, tmp_path / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before
    return caught.value


def test_a_patched_class_embedding_that_diffusers_drops_is_found_in_the_folder(tmp_path):
    from diffusers import UNet2DModel

    unet = patched()
    unet.save_pretrained(tmp_path / "old")
    assert UNet2DModel.from_pretrained(tmp_path / "old").class_embedding is None  # what this is about
    imported = import_model(tmp_path / "old", tmp_path / "out", schedule="squaredcos_cap_v2")
    assert any("class_embedding.weight (32, 24) found although config.json says nothing" in n for n in imported.notes)
    assert imported.difference == 0
    assert difference(tmp_path / "out", lambda x, t, y: unet(x, t, class_labels=y).sample) == 0
    assert load_model(tmp_path / "out").condition.labels == ICLEVR_OBJECTS
    assert imported.parameters == sum(p.numel() for p in unet.parameters())


@pytest.mark.parametrize("wrap", [None, "model", "checkpoint.ema"])
def test_a_patched_unets_state_dict_imports_with_a_preset(wrap, tmp_path, embed_preset):
    unet = patched(class_embed_type="identity")
    state = unet.state_dict()
    for name in reversed(wrap.split(".")) if wrap else []:
        state = {name: state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}}
    torch.save(state, tmp_path / "old.pt")
    imported = import_model(tmp_path / "old.pt", tmp_path / "out", preset=embed_preset, allow_pickle=True)
    assert difference(tmp_path / "out", lambda x, t, y: unet(x, t, class_labels=y).sample) == 0
    assert any(f"its key {wrap!r}" in note for note in imported.notes) == (wrap is not None)


@pytest.mark.parametrize("first", [False, True])
def test_cond_embed_beside_a_model_computes_the_same_in_both_orders(first, tmp_path, concat_preset):
    torch.manual_seed(1)
    original = Concat(first).eval()
    torch.save(original.state_dict(), tmp_path / "old.pt")
    options = {"preset": concat_preset, "allow_pickle": True}
    imported = import_model(tmp_path / "old.pt", tmp_path / "out", condition_first=first, **options)
    assert difference(tmp_path / "out", original) <= (
        1e-5 if first else 0
    )  # the sum over channels runs in another order
    assert difference(tmp_path / "out", original.double(), torch.float64) < 1e-13
    original.float()
    order = "before the image" if first else "import with --condition-first"
    assert any(order in note for note in imported.notes)
    import_model(tmp_path / "old.pt", tmp_path / "wrong", condition_first=not first, **options)
    assert difference(tmp_path / "wrong", original) > 1e-3


def test_wrappers_and_half_precision_are_undone_with_a_note(tmp_path, concat_preset):
    torch.manual_seed(1)
    original = Concat().half()
    original.model = torch.compile(original.model)
    state = nn.DataParallel(original).state_dict()
    assert all(k.startswith("module.") for k in state)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "old.safetensors")
    imported = import_model(tmp_path / "old.safetensors", tmp_path / "out", preset=concat_preset)
    plain = Concat().float().eval()
    plain.load_state_dict({k.replace("module.", "").replace("_orig_mod.", ""): v for k, v in state.items()})
    assert difference(tmp_path / "out", plain) == 0
    notes = "\n".join(imported.notes)
    assert "module. removed" in notes
    assert "_orig_mod. removed" in notes
    assert "stored as float16" in notes


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of a pipeline without steps_offset
@pytest.mark.parametrize("kind", ["folder", "fp16 folder", "pickle folder", "pt"])
def test_a_bare_text_unet_becomes_a_whole_model(kind, tmp_path, text_model, text_preset):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(2)
    unet = UNet2DConditionModel(**TEXT_UNET).eval()
    encoder, vae = f"{text_model}:text_encoder", f"{text_model}:vae"
    options = {"text_encoder": encoder, "vae": vae, "schedule": "scaled_linear:0.00085:0.012"}
    if kind == "pt":
        torch.save({"unet": unet.state_dict()}, tmp_path / "old")
        shutil.move(tmp_path / "old", tmp_path / "old.pt")
        options = {"preset": text_preset, "allow_pickle": True}
    elif kind == "pickle folder":
        unet.save_pretrained(tmp_path / "old", safe_serialization=False)
        assert "--allow-pickle" in str(refused(tmp_path, tmp_path / "old", **options))
        options["allow_pickle"] = True
    else:
        variant = "fp16" if "fp16" in kind else None
        unet = unet.half() if variant else unet
        unet.save_pretrained(tmp_path / "old", variant=variant)
        unet = unet.float()
    imported = import_model(tmp_path / ("old.pt" if kind == "pt" else "old"), tmp_path / "out", **options)
    assert difference(tmp_path / "out", lambda x, t, y: unet(x, t, y).sample) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(pipeline.unet.conv_in.weight, unet.conv_in.weight)
    assert imported.described == "text -> latents"
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    if kind != "pt":
        assert (config["beta_start"], config["beta_end"], config["clip_sample"]) == (0.00085, 0.012, False)
    record = json.loads((tmp_path / "out" / "fastgen.json").read_text())["training"]["imported"]
    assert len(next(iter(record["sha256"].values()))) == 64


def test_a_sharded_folder_is_read_whole(tmp_path, text_model):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**TEXT_UNET).eval()
    unet.save_pretrained(tmp_path / "old", max_shard_size="200KB")
    assert len(list((tmp_path / "old").glob("*.safetensors"))) > 1
    options = {"text_encoder": str(text_model), "vae": str(text_model), "schedule": "linear"}
    import_model(tmp_path / "old", tmp_path / "out", **options)
    assert difference(tmp_path / "out", lambda x, t, y: unet(x, t, y).sample) == 0


def test_attention_keys_of_old_diffusers_are_renamed(tmp_path):
    unet = patched()
    unet.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, old in names.items():
        state = {k.replace(f".{new}.", f".{old}."): v for k, v in state.items()}
    assert any(".query." in k for k in state)
    save_file(state, file)
    imported = import_model(tmp_path / "old", tmp_path / "out", schedule="linear")
    assert any("attention keys of old diffusers" in note for note in imported.notes)
    assert difference(tmp_path / "out", lambda x, t, y: unet(x, t, class_labels=y).sample) == 0


def test_a_conditioner_that_was_lost_is_asked_for_and_taken_from_its_own_file(tmp_path, embed_preset):
    from diffusers import UNet2DModel

    unet = patched()
    UNet2DModel(**UNET).save_pretrained(tmp_path / "old")
    linear = dict(unet.class_embedding.state_dict())
    unet.class_embedding = None
    unet.save_pretrained(tmp_path / "old")
    message = str(refused(tmp_path, tmp_path / "old", preset=embed_preset))
    assert "class_embedding.weight is missing" in message
    assert "--conditioner FILE" in message
    torch.save(
        {"net": {"label.weight": linear["weight"], "label.bias": linear["bias"]}, "epoch": 3}, tmp_path / "linear.pt"
    )
    options = {"preset": embed_preset, "conditioner": str(tmp_path / "linear.pt"), "allow_pickle": True}
    import_model(tmp_path / "old", tmp_path / "out", **options)
    unet.class_embedding = nn.Linear(LABELS, 32)
    unet.class_embedding.load_state_dict(linear)
    assert difference(tmp_path / "out", lambda x, t, y: unet(x, t, class_labels=y).sample) == 0


def test_a_two_layer_embedding_needs_the_preset_to_name_its_activation(tmp_path, embed_preset):
    unet = patched()
    unet.class_embedding = nn.Sequential(nn.Linear(LABELS, 10), nn.SiLU(), nn.Linear(10, 32))
    unet.save_pretrained(tmp_path / "old")
    assert "hidden = 10" in str(refused(tmp_path, tmp_path / "old", preset=embed_preset))
    embed_preset.write_text(embed_preset.read_text().replace('"class_embed"', '"class_embed"\nhidden = 10'))
    import_model(tmp_path / "old", tmp_path / "out", preset=embed_preset)
    assert difference(tmp_path / "out", lambda x, t, y: unet(x, t, class_labels=y).sample) == 0


def test_an_embedding_of_single_classes_is_not_taken_for_a_linear(tmp_path):
    unet = patched()
    unet.class_embedding = nn.Embedding(LABELS, 32)
    unet.save_pretrained(tmp_path / "old")
    imported = import_model(tmp_path / "old", tmp_path / "out", schedule="linear")
    assert any(f"a table (nn.Embedding) of {LABELS} classes" in note for note in imported.notes)
    model = load_model(tmp_path / "out")
    assert model.condition == Condition(classes={str(i): i for i in range(LABELS)})
    x, t, _ = inputs(model)
    ids = torch.tensor([0, 5, LABELS - 1])
    with torch.no_grad():
        assert torch.equal(model.networks()["unet"](x, t, ids), unet(x, t, class_labels=ids).sample)


def test_a_square_table_may_be_either_and_the_user_says_which(tmp_path):
    unet = patched()
    unet.class_embedding = nn.Embedding(32, 32)
    unet.save_pretrained(tmp_path / "old")
    message = str(refused(tmp_path, tmp_path / "old", schedule="linear"))
    assert "an nn.Embedding of 32 classes or a Linear on 32 labels; say which with --embed" in message
    import_model(tmp_path / "old", tmp_path / "out", schedule="linear", embed="embedding", null_class=31)
    condition = load_model(tmp_path / "out").condition
    assert (len(condition.classes), condition.null_class, condition.class_count) == (31, 31, 32)


def test_weights_that_do_not_match_are_listed_one_by_one(tmp_path, concat_preset):
    state = Concat().state_dict()
    state["model.extra.weight"] = torch.zeros(3)
    del state["model.conv_out.bias"]
    state["model.conv_in.weight"] = torch.zeros(8, 3, 3, 3)
    torch.save(state, tmp_path / "old.pt")
    error = refused(tmp_path, tmp_path / "old.pt", preset=concat_preset, allow_pickle=True)
    assert isinstance(error, MismatchError)
    assert sorted(error.lines()) == [
        "missing model.conv_out.bias (3,)",
        "shape model.conv_in.weight: found (8, 3, 3, 3), expected (8, 9, 3, 3)",
        "unexpected model.extra.weight (3,)",
    ]


def test_a_checkpoint_of_another_architecture_lists_twenty_keys_and_counts_the_rest(fastgen, tmp_path, embed_preset):
    unet = patched(block_out_channels=(16, 32))
    unet.class_embedding = nn.Linear(LABELS, 64)
    torch.save(unet.state_dict(), tmp_path / "old.pt")
    code, out, err = fastgen(
        "import", tmp_path / "old.pt", "--as", embed_preset, "--out", tmp_path / "out", "--allow-pickle"
    )
    *listed, last = err.strip().splitlines()
    assert (code, out) == (2, "")
    assert len(listed) == 21
    assert all(line.startswith("shape ") for line in listed[:20])
    assert listed[20].startswith("... and ")
    assert last.startswith("fastgen: error: ")
    assert not (tmp_path / "out").exists()


def test_a_network_that_is_no_diffusers_unet_is_refused_with_its_keys(tmp_path, embed_preset):
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 4)).state_dict(), tmp_path / "old.pt")
    error = refused(tmp_path, tmp_path / "old.pt", preset=embed_preset, allow_pickle=True)
    assert "no diffusers UNet" in str(error)
    assert "unexpected 1.weight (4, 4)" in error.lines()
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}, tmp_path / "sd.safetensors")
    assert "CompVis" in str(refused(tmp_path, tmp_path / "sd.safetensors", preset=embed_preset))


def test_a_config_that_differs_from_the_preset_is_listed_key_by_key(tmp_path, embed_preset):
    patched(layers_per_block=2, norm_eps=1e-6).save_pretrained(tmp_path / "old")
    message = str(refused(tmp_path, tmp_path / "old", preset=embed_preset))
    assert "layers_per_block = 2, preset 1" in message
    assert "norm_eps = 1e-06, preset 1e-05" in message


def test_the_noise_schedule_is_never_guessed(tmp_path):
    patched().save_pretrained(tmp_path / "old")
    message = str(refused(tmp_path, tmp_path / "old"))
    for word in ("--schedule", "linear", "scaled_linear", "squaredcos_cap_v2", "--as", "not in its weights"):
        assert word in message


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"schedule": "cosine"}, "squaredcos_cap_v2"),
        ({"schedule": "scaled_linear"}, "scaled_linear:0.00085:0.012"),
        ({"schedule": "linear:1:2:3"}, "BETA_START"),
        ({"schedule": "linear:a:2"}, "not a number"),
        ({"schedule": "beta_schedul=linear"}, "beta_schedule"),
        ({"schedule": "beta_start=0.1"}, "beta_schedule is missing"),
        ({"schedule": "missing.json"}, "no such file"),
        ({"schedule": "linear", "prediction_type": "noise"}, "epsilon"),
        ({"schedule": "linear", "vae": "somewhere"}, "give --vae FOLDER, or allow --download"),
        ({"schedule": "linear", "condition_first": True}, "--condition-first"),
        ({"schedule": "linear", "key": "ema"}, "ema"),
        ({"schedule": "linear", "objects": "objects.json"}, "25 objects, expected 24"),
        ({"schedule": "linear", "preset": "nothing"}, "unknown preset"),
    ],
)
def test_bad_options_are_one_clear_line(options, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    patched().save_pretrained(tmp_path / "old")
    (tmp_path / "objects.json").write_text(json.dumps({f"object {i}": i for i in range(25)}))
    assert word in str(refused(tmp_path, tmp_path / "old", **options))


def test_schedules_say_what_diffusers_does(tmp_path):
    from diffusers import DDPMScheduler

    from fastgen.models.importing.schedule import choose_schedule
    from fastgen.sampling.schedulers import make_scheduler

    DDPMScheduler(beta_schedule="sigmoid", num_train_timesteps=2000).save_pretrained(tmp_path / "scheduler")
    for named, arguments in [
        ("linear", {}),
        ("linear:1e-4:0.03", {"beta_end": 0.03}),
        ("squaredcos_cap_v2", {"beta_schedule": "squaredcos_cap_v2"}),
        ("scaled_linear:0.00085:0.012", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("beta_schedule=linear,beta_end=0.03,num_train_timesteps=300", {"beta_end": 0.03, "num_train_timesteps": 300}),
        (str(tmp_path), {"beta_schedule": "sigmoid", "num_train_timesteps": 2000}),
    ]:
        config = choose_schedule(named, None, latents=False)
        found = make_scheduler("DDPMScheduler", config)
        assert torch.equal(found.alphas_cumprod, DDPMScheduler(**arguments).alphas_cumprod), named


def test_several_state_dicts_are_listed_and_one_is_chosen_by_key(tmp_path, embed_preset):
    raw, ema = patched(), patched()
    nn.init.normal_(ema.conv_in.weight)
    torch.save({"model": raw.state_dict(), "ema": ema.state_dict()}, tmp_path / "old.pt")
    options = {"preset": embed_preset, "allow_pickle": True}
    message = str(refused(tmp_path, tmp_path / "old.pt", **options))
    assert "model (" in message
    assert "ema (" in message
    assert "--key" in message
    import_model(tmp_path / "old.pt", tmp_path / "out", key="ema", **options)
    assert difference(tmp_path / "out", lambda x, t, y: ema(x, t, class_labels=y).sample) == 0
    assert "unknown" in str(refused(tmp_path / "elsewhere", tmp_path / "old.pt", key="emma", **options))


def test_pickles_need_permission_and_may_hold_tensors_only(tmp_path, embed_preset):
    torch.save(patched().state_dict(), tmp_path / "old.pt")
    assert "--allow-pickle" in str(refused(tmp_path, tmp_path / "old.pt", preset=embed_preset))
    torch.save(patched(), tmp_path / "module.pt")
    message = str(refused(tmp_path, tmp_path / "module.pt", preset=embed_preset, allow_pickle=True))
    assert "save its state dict alone" in message
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 nothing")
    refused(tmp_path, tmp_path / "damaged.pt", preset=embed_preset, allow_pickle=True)
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    refused(tmp_path, tmp_path / "damaged.safetensors", preset=embed_preset)
    refused(tmp_path, tmp_path / "missing.pt", preset=embed_preset)
    assert "--as" in str(refused(tmp_path, tmp_path / "old.pt", schedule="linear", allow_pickle=True))


def test_broken_weights_are_refused(tmp_path, embed_preset):
    unet = patched()
    unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    unet.save_pretrained(tmp_path / "old")
    assert "NaN" in str(refused(tmp_path, tmp_path / "old", preset=embed_preset))


def test_text_encoder_and_vae_must_be_named_and_suit_the_unet(tmp_path, text_model):
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(**TEXT_UNET).save_pretrained(tmp_path / "old")
    UNet2DConditionModel(**TEXT_UNET | {"cross_attention_dim": 16}).save_pretrained(tmp_path / "narrow")
    options = {"text_encoder": str(text_model), "vae": str(text_model), "schedule": "linear"}
    for name, word in (("text_encoder", "--text-encoder"), ("vae", "--vae")):
        assert word in str(refused(tmp_path, tmp_path / "old", **options | {name: None}))
        message = str(refused(tmp_path, tmp_path / "old", **options | {name: str(tmp_path / "nowhere")}))
        assert f"give {word} FOLDER, or allow --download" in message
    assert "the text encoder gives 32 wide, but the UNet takes cross_attention_dim = 16" in str(
        refused(tmp_path, tmp_path / "narrow", **options)
    )


def test_a_whole_model_folder_and_a_taken_out_are_refused(tmp_path, text_model):
    assert "needs no import" in str(refused(tmp_path, text_model, schedule="linear"))
    patched().save_pretrained(tmp_path / "old")
    (tmp_path / "out").mkdir()
    assert "exists already" in str(refused(tmp_path, tmp_path / "old", schedule="linear"))


def test_the_command_prints_what_was_made_and_the_model_generates(fastgen, tmp_path):
    patched().save_pretrained(tmp_path / "old")
    code, out, err = fastgen("import", tmp_path / "old", "--out", tmp_path / "out", "--schedule", "squaredcos_cap_v2")
    assert (code, err) == (0, "")
    for word in (
        "labels -> pixels: UNet2DModel, 16 px",
        "squaredcos_cap_v2, 1000 timesteps, epsilon",
        "from the source network, called as the notes say, is 0",
    ):
        assert word in out, out
    (tmp_path / "test.json").write_text('[["red cube"], ["blue sphere", "gray cube"]]')
    arguments = ["--model", tmp_path / "out", "--out", tmp_path / "images", "--num-inference-steps", 2]
    assert fastgen("generate", tmp_path / "test.json", *arguments)[0] == 0
    assert (tmp_path / "images" / "1.png").is_file()


@pytest.mark.parametrize(
    ("preset", "word"),
    [
        (SimpleNamespace(name="p", conditioner=None, unet=None), "preset p describes an evaluator"),
        (
            SimpleNamespace(name="p", conditioner={"kind": "broadcast"}, unet=SimpleNamespace()),
            "only class_embed, concat, tokens",
        ),
    ],
)
def test_presets_of_other_networks_are_refused(preset, word, tmp_path):
    from fastgen.models.importing.architecture import decide

    with pytest.raises(InputError, match=word):
        decide(None, preset, tmp_path)
