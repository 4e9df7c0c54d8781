"""Other people's tools read what we write: the layout and names of optimum's pipelines, and diffusers' loaders."""

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx")

from fastgen.files.jsonfiles import read_json  # noqa: E402

# What optimum's ORTStableDiffusionPipeline feeds and reads, by folder.
NAMES = {
    "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
    "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
    "vae_decoder": (["latent_sample"], ["sample"]),
    "vae_encoder": (["sample"], ["latent_parameters"]),
}
SHAPES = {
    "input_ids": ["batch", 77],
    "latent_sample": ["batch", 4, 8, 8],
    "out_sample": ["batch", 4, 8, 8],
    "timestep": ["batch"],
    "encoder_hidden_states": ["batch", 77, 32],
    "last_hidden_state": ["batch", 77, 32],
    "pooler_output": ["batch", 32],
    "latent_parameters": ["batch", 8, 8, 8],
}


def axes(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", NAMES)
def test_networks_have_optimum_s_folders_and_names_and_only_the_batch_is_dynamic(text_bundle, name):
    model = onnx.load(text_bundle / name / "model.onnx")
    onnx.checker.check_model(model)
    inputs, outputs = NAMES[name]
    assert [v.name for v in model.graph.input] == inputs
    assert [v.name for v in model.graph.output] == outputs
    for value in (*model.graph.input, *model.graph.output):
        shape = axes(value)
        assert shape[0] == "batch"
        assert all(isinstance(axis, int) and axis > 0 for axis in shape[1:])
        if value.name in SHAPES:
            assert shape == SHAPES[value.name]
        kind = onnx.TensorProto.INT64 if value.name == "input_ids" else onnx.TensorProto.FLOAT
        assert value.type.tensor_type.elem_type == kind
    assert (text_bundle / name / "config.json").is_file()


def test_the_label_network_has_its_own_third_input(label_bundle):
    model = onnx.load(label_bundle / "unet" / "model.onnx")
    assert [(v.name, axes(v)) for v in model.graph.input] == [
        ("sample", ["batch", 3, 16, 16]),
        ("timestep", ["batch"]),
        ("class_labels", ["batch", 24]),
    ]
    assert [(v.name, axes(v)) for v in model.graph.output] == [("out_sample", ["batch", 3, 16, 16])]


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_graphs_use_standard_operators_and_hold_none_of_the_exporter_s_notes(exports, kind):
    for file in exports(kind)[0].glob("*/model.onnx"):
        model = onnx.load(file)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert not model.functions
        assert not model.metadata_props
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_diffusers_and_transformers_load_the_components_of_a_bundle(text_bundle, text_model):
    diffusers = pytest.importorskip("diffusers")
    from transformers import AutoConfig, CLIPTokenizer

    index = read_json(text_bundle / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert read_json(text_model / "model_index.json") == index
    assert diffusers.UNet2DConditionModel.load_config(text_bundle / "unet")["sample_size"] == 8
    assert diffusers.AutoencoderKL.load_config(text_bundle / "vae_decoder")["scaling_factor"] == 0.7
    assert diffusers.DDIMScheduler.from_pretrained(text_bundle / "scheduler").config.beta_end == 0.012
    assert AutoConfig.from_pretrained(text_bundle / "text_encoder").hidden_size == 32
    assert CLIPTokenizer.from_pretrained(text_bundle / "tokenizer").model_max_length == 77
