"""Imported checkpoints of every condition compute what their author's own call computes; what weights do not tell is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from fastgen.errors import InputError
from fastgen.models.folder import load_model
from fastgen.models.importing import import_model
from fastgen.models.saving import save_model

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
UNET = {
    "sample_size": 16,
    **BLOCKS,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CROSS = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    **BLOCKS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 10,
    "attention_head_dim": 2,
}
X, T = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 250.0, 600.0, 999.0])
IDS = torch.tensor([0, 3, 7, 9])


def unet(**config) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**UNET | config).eval()


def denoiser(folder: Path) -> nn.Module:
    return load_model(folder).networks()["unet"]


def same(folder: Path, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        found = denoiser(folder)(*inputs)
    assert expected.abs().max() > 0.1
    assert float((found - expected).abs().max()) <= 1e-5


def preset(folder: Path, unet_config: dict, conditioner: str) -> Path:
    lines = [f"{k} = {json.dumps(list(v) if isinstance(v, tuple) else v)}" for k, v in unet_config.items()]
    text = ["image_size = 16", "[conditioner]", conditioner, "[unet.config]", *lines]
    text += ["[unet.train]", "steps = 1", "[scheduler]", '_class_name = "DDPMScheduler"']
    (folder / "mine.toml").write_text("\n".join(text))
    return folder / "mine.toml"


@pytest.mark.parametrize("count", [10, 32])  # 32: the table is as square as a Linear on 32 labels would be
@torch.no_grad()
def test_num_class_embeds_are_class_ids_whatever_their_shape(count, tmp_path):
    network = unet(num_class_embeds=count)
    network.save_pretrained(tmp_path / "old")
    imported = import_model(tmp_path / "old", tmp_path / "out", schedule="linear")
    assert imported.difference == 0
    same(tmp_path / "out", network(X, T, class_labels=IDS).sample, X, T, IDS)
    assert load_model(tmp_path / "out").condition.classes == {str(i): i for i in range(count)}


@torch.no_grad()
def test_a_null_class_makes_guidance_possible(tmp_path):
    unet(num_class_embeds=11).save_pretrained(tmp_path / "old")
    names = {f"digit {i}": i for i in range(10)}
    (tmp_path / "names.json").write_text(json.dumps(names))
    import_model(tmp_path / "old", tmp_path / "out", schedule="linear", objects=tmp_path / "names.json", null_class=10)
    condition = load_model(tmp_path / "out").condition
    assert (condition.classes, condition.null_class) == (names, 10)
    condition.check_guided(3.0)
    with pytest.raises(InputError, match="null class 11: expected 0 to 10"):
        import_model(tmp_path / "old", tmp_path / "no", schedule="linear", null_class=11)


@torch.no_grad()
def test_a_number_a_vector_and_no_condition(tmp_path):
    network = unet(class_embed_type="timestep")
    network.save_pretrained(tmp_path / "number")
    import_model(tmp_path / "number", tmp_path / "out", schedule="linear")
    numbers = torch.tensor([0.0, 0.5, 3.0, 900.0])
    same(tmp_path / "out", network(X, T, class_labels=numbers).sample, X, T, numbers)
    network = unet()
    network.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="--unconditional if it has no condition"):
        import_model(tmp_path / "plain", tmp_path / "no", schedule="linear")
    import_model(tmp_path / "plain", tmp_path / "free", schedule="linear", unconditional=True)
    same(tmp_path / "free", network(X, T).sample, X, T)


class Planes(nn.Module):
    """The course's notebook: one class id -> nn.Embedding -> planes beside the image."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.class_emb = nn.Embedding(classes, width)
        self.model = unet(in_channels=3 + width, out_channels=3)

    def forward(self, x, t, y):
        planes = self.class_emb(y)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.model(torch.cat([x, planes], 1), t).sample


@pytest.mark.parametrize("width", [4, 10])
@torch.no_grad()
def test_a_table_of_classes_as_planes(width, tmp_path):
    network = Planes(10, width).eval()
    torch.save(network.state_dict(), tmp_path / "old.pt")
    config = UNET | {"in_channels": 3 + width, "out_channels": 3}
    options = {"preset": preset(tmp_path, config, f'kind = "concat"\ndim = {width}'), "allow_pickle": True}
    if width == 10:  # a Linear on ten labels would have this shape too
        with pytest.raises(InputError, match="--embed embedding or --embed linear"):
            import_model(tmp_path / "old.pt", tmp_path / "no", **options)
        options["embed"] = "embedding"
    import_model(tmp_path / "old.pt", tmp_path / "out", **options)
    same(tmp_path / "out", network(X, T, IDS), X, T, IDS)


@torch.no_grad()
def test_labels_themselves_as_planes_need_no_layer(tmp_path):
    network = unet(in_channels=27, out_channels=3)
    network.save_pretrained(tmp_path / "old")
    imported = import_model(tmp_path / "old", tmp_path / "out", schedule="linear")
    assert any("taken to be the labels themselves" in note for note in imported.notes)
    labels = (torch.rand(4, 24, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    planes = labels[:, :, None, None].expand(-1, -1, 16, 16)
    same(tmp_path / "out", network(torch.cat([X, planes], 1), T).sample, X, T, labels)
    unet(in_channels=8, out_channels=3).save_pretrained(tmp_path / "few")
    with pytest.raises(InputError, match="--embed identity if the 5 labels themselves are its planes"):
        import_model(tmp_path / "few", tmp_path / "no", schedule="linear")


@torch.no_grad()
def test_a_learned_variance_is_dropped(tmp_path):
    network = unet(out_channels=6)
    network.class_embedding = nn.Linear(24, 32)
    network.save_pretrained(tmp_path / "old")
    for schedule in ("linear", "beta_schedule=linear,variance_type=learned_range"):
        out = tmp_path / schedule.replace("=", "")
        import_model(tmp_path / "old", out, schedule=schedule)
        labels = torch.eye(24)[:4]
        same(out, network(X, T, class_labels=labels).sample[:, :3], X, T, labels)


@torch.no_grad()
def test_one_token_of_cross_attention_for_a_class(tmp_path):
    torch.manual_seed(0)
    network, table = UNet2DConditionModel(**CROSS).eval(), nn.Embedding(12, 10)
    network.save_pretrained(tmp_path / "old")
    with pytest.raises(InputError, match="give --text-encoder"):
        import_model(tmp_path / "old", tmp_path / "no", schedule="linear")
    torch.save(table.state_dict(), tmp_path / "table.pt")
    options = {"conditioner": str(tmp_path / "table.pt"), "allow_pickle": True, "vae": "none"}
    import_model(tmp_path / "old", tmp_path / "out", schedule="linear", **options)
    same(tmp_path / "out", network(X, T, table(IDS)[:, None]).sample, X, T, IDS)


@torch.no_grad()
def test_labels_on_latents_and_a_dit(tmp_path, text_model):
    network = unet(sample_size=8, in_channels=4, out_channels=4)
    network.class_embedding = nn.Linear(24, 32)
    network.save_pretrained(tmp_path / "old")
    import_model(tmp_path / "old", tmp_path / "out", schedule="linear", vae=f"{text_model}:vae")
    assert load_model(tmp_path / "out").space.latent
    x, labels = torch.randn(4, 4, 8, 8), torch.eye(24)[:4]
    same(tmp_path / "out", network(x, T, class_labels=labels).sample, x, T, labels)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "in_channels": 4, "out_channels": 8}
    dit = DiTTransformer2DModel(**sizes, sample_size=8, num_embeds_ada_norm=10).eval()
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    dit.save_pretrained(tmp_path / "dit")
    import_model(tmp_path / "dit", tmp_path / "dit-out", schedule="linear", vae=f"{text_model}:vae")
    expected = dit(x, timestep=T, class_labels=IDS).sample[:, :4]
    same(tmp_path / "dit-out", expected, x, T, IDS)
    with pytest.raises(InputError, match="the vae is not named"):
        import_model(tmp_path / "dit", tmp_path / "no", schedule="linear")


@torch.no_grad()
def test_counters_and_tables_beside_a_network_are_left_out_with_a_note(tmp_path):
    """As ema-pytorch and Lightning save them."""
    network = unet(num_class_embeds=10)
    network.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "diffusion_pytorch_model.safetensors"
    state = {f"ema_model.{key}": value for key, value in load_file(file).items()}
    save_file(state | {"step": torch.tensor(7), "initted": torch.tensor(True), "betas": torch.ones(1000)}, file)
    imported = import_model(tmp_path / "old", tmp_path / "out", schedule="linear")
    same(tmp_path / "out", network(X, T, class_labels=IDS).sample, X, T, IDS)
    assert any(all(word in note for word in ("left out", "step", "initted", "betas")) for note in imported.notes)
    save_file(state | {"head.weight": torch.ones(3, 4)}, file)  # a layer is no counter
    with pytest.raises(InputError, match=r"unexpected head\.weight"):
        import_model(tmp_path / "old", tmp_path / "no", schedule="linear")


def test_a_model_keeps_its_autoencoders_statistics_when_it_is_saved(tmp_path, text_model):
    """Stable Diffusion's pipeline would leave a shift out: the folder must not be called one."""
    model = load_model(text_model)
    assert json.loads((text_model / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    model.vae.register_to_config(shift_factor=0.25)
    save_model(model, tmp_path / "shifted")
    assert json.loads((tmp_path / "shifted" / "model_index.json").read_text())["_class_name"] == "LatentDiffusion"
    assert load_model(tmp_path / "shifted").space.shift_factor == 0.25
