"""Attributes: what files say of them, the evaluator that learns them, and the scores of images by them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scoring_helpers import ATTRIBUTES, make_attribute_evaluator, make_clip, make_images

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from fastgen.data import read_dataset, split  # noqa: E402
from fastgen.data.attributes import outputs, read_attributes, with_labels  # noqa: E402
from fastgen.errors import InputError  # noqa: E402
from fastgen.models.evaluator import ResNet18, load, save  # noqa: E402
from fastgen.scoring import Scorer, compare, score  # noqa: E402
from fastgen.scoring.metrics import attribute_hits  # noqa: E402
from fastgen.training.classifier import AttributeTask  # noqa: E402

ASKED = [("cat", "red"), ("slime", "red"), ("cat", "blue"), ("cat", "red"), ("slime", "green")]
ENTRIES = {f"{i}_main": {"body": body, "colour": colour, "mood": "?"} for i, (body, colour) in enumerate(ASKED)}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return make_attribute_evaluator(tmp_path_factory.mktemp("attributes"))


@pytest.fixture(scope="module")
def always_red_cats(tmp_path_factory):
    """An evaluator that sees a red cat in every image."""
    folder = tmp_path_factory.mktemp("red-cats")
    module = ResNet18(5, width=8).eval()
    with torch.no_grad():
        module.fc[0].weight.zero_()
        module.fc[0].bias.copy_(torch.tensor([0.2, 0.1, 25.0, 24.0, 40.0]))  # a sigmoid of the last three is 1 for all
    values = {"body": ("cat", "slime"), "colour": ("blue", "green", "red")}
    save(module, folder, values, {})
    return folder


@pytest.fixture
def images(tmp_path):
    folder = make_images(tmp_path / "out")
    for i in range(5):
        (folder / f"{i}.png").rename(folder / f"{i}_main.png")
    return folder


@pytest.fixture
def requests(tmp_path):
    """Five prompts; what they ask for is in attributes.json beside the file."""
    (tmp_path / "attributes.json").write_text(json.dumps(ENTRIES))
    path = tmp_path / "test.json"
    path.write_text(json.dumps({key: {"image_name": f"{key}.png", "text_prompt": f"monster {key}"} for key in ENTRIES}))
    return path


# --- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"found \[\]; expected \{\"0_main\""),
        ({"a": "cat"}, "key 'a': found 'cat'"),
        ({"a": {}}, r"key 'a': found \{\}"),
        ({"a": {"body": 3}}, "key 'a': body: found 3, expected text"),
        ({"a": {"body": ""}}, "key 'a': body: is empty"),
        ({"a": {"fid": "cat"}}, "key 'a': attribute 'fid': this is the name of a metric"),
        ({"a": {"attributes": "cat"}}, "this is the name of a metric"),
    ],
)
def test_what_is_wrong_with_a_file_of_attributes_is_named(tmp_path, content, message):
    path = tmp_path / "attributes.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        read_attributes(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def monsters(tmp_path):
    """Five monsters in two animations of one frame, and their attributes."""
    root, info, entries = tmp_path / "monsters", {}, {}
    (root / "train").mkdir(parents=True)
    for i, (body, colour) in enumerate(ASKED):
        for action in ("main", "die1"):
            key = f"{i}_{action}"
            info[key] = {"given_description": [f"A {colour} {body}."], "action_description": "", "num_frames": 1}
            entries[key] = {"body": body, "colour": colour, "action": action}
            Image.new("RGB", (40, 40), colour).save(root / "train" / f"{key}_0.png")
    (root / "train_info.json").write_text(json.dumps(info))
    (root / "attributes.json").write_text(json.dumps({**entries, "99_main": {**entries["0_main"], "colour": "pink"}}))
    return root


def test_a_dataset_with_attributes_has_their_values_as_labels(monsters):
    dataset = with_labels(read_dataset(monsters))
    assert dataset.attributes == {
        "body": ("cat", "slime"),
        "colour": ("blue", "green", "pink", "red"),
        "action": ("die1", "main"),
    }
    assert dataset.objects == outputs(dataset.attributes)
    assert [dataset.objects["body: cat"], dataset.objects["colour: red"], dataset.objects["action: main"]] == [0, 5, 7]
    assert dataset.examples[3].labels == ("body: slime", "colour: red", "action: die1")
    train, validation = ({example.subject for example in part.examples} for part in split(dataset, 0.4))
    assert (len(train), train & validation) == (3, set())
    changed = json.loads((monsters / "attributes.json").read_text())
    changed["0_die1"]["colour"] = "blue"
    (monsters / "attributes.json").write_text(json.dumps(changed))
    assert with_labels(read_dataset(monsters)).fingerprint != dataset.fingerprint


def test_captions_without_attributes_or_without_some_of_them_are_refused(monsters):
    path = monsters / "attributes.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps({key: entry for key, entry in entries.items() if not key.endswith("die1")}))
    with pytest.raises(InputError, match=r"attributes\.json: 5 animations have no entry: 0_die1, 1_die1"):
        with_labels(read_dataset(monsters))
    path.write_text(json.dumps({**entries, "1_main": {"body": "cat"}}))
    with pytest.raises(InputError, match="key '1_main' has body, but '0_main' body, colour, action: expected the same"):
        with_labels(read_dataset(monsters))
    path.unlink()
    with pytest.raises(
        InputError, match=r"holds images with captions; an evaluator learns from labels, or from attributes"
    ):
        with_labels(read_dataset(monsters))


# --- the evaluator


def test_scores_are_a_softmax_over_the_values_of_each_attribute(judge):
    evaluator = load(judge)
    assert evaluator.attributes == ATTRIBUTES
    assert evaluator.objects is None
    images = np.random.default_rng(0).uniform(-1, 1, (3, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        logits = evaluator.module.fc[0](torch.from_numpy(evaluator.features(images)))
    wanted = torch.cat([logits[:, :2].softmax(dim=1), logits[:, 2:].softmax(dim=1)], dim=1).numpy()
    np.testing.assert_allclose(evaluator.predict(images), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"body": ["cat"], "colour": ["red"]}, "found 2 values, expected one for each of the 5 outputs"),
        ({"body": ["cat", "cat"], "colour": ["red", "blue", "green"]}, "body: found .* a list of different values"),
        ({"body": [], "colour": ["red"]}, r"body: found \[\], expected a list"),
        ({"body": ["cat", "dog"], "colour": 2}, "colour: found 2, expected a list"),
        ({"kid": ["cat", "dog"]}, "this is the name of a metric"),
    ],
)
def test_attributes_that_do_not_fit_the_outputs_are_refused(judge, tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        save(load(judge).module, tmp_path / "other", values, {})
    assert not (tmp_path / "other").exists()


def test_the_loss_is_the_sum_of_torchs_cross_entropy_of_each_attribute():
    rng = np.random.default_rng(0)
    classes = np.stack([rng.integers(2, size=4), rng.integers(3, size=4)], axis=1)
    targets = np.concatenate([np.eye(2)[classes[:, 0]], np.eye(3)[classes[:, 1]]], axis=1).astype(np.float32)
    rows = np.arange(4), np.arange(4)
    nothing = np.zeros((4, 64, 64, 3), np.uint8)
    task = AttributeTask(ResNet18(5, width=8), nothing, targets, rows, torch.device("cpu"), attributes=ATTRIBUTES)
    logits = torch.from_numpy(rng.normal(size=(4, 5)).astype(np.float32))
    entropy = torch.nn.CrossEntropyLoss(reduction="none")
    wanted = entropy(logits[:, :2], torch.from_numpy(classes[:, 0])) + entropy(
        logits[:, 2:], torch.from_numpy(classes[:, 1])
    )
    torch.testing.assert_close(task.loss(logits, torch.from_numpy(targets)), wanted)
    assert task.judge(targets, targets) == {"accuracy_body": 1, "accuracy_colour": 1, "accuracy_lowest": 1}
    turned = np.concatenate([targets[:, :2], np.roll(targets[:, 2:], 1, axis=1)], axis=1)
    assert task.judge(turned, targets) == {"accuracy_body": 1, "accuracy_colour": 0, "accuracy_lowest": 0}


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 8), st.integers(0, 1000))
def test_a_hit_is_where_the_largest_score_of_an_attribute_is_that_of_its_value(sizes, n, seed):
    rng = np.random.default_rng(seed)
    classes = np.stack([rng.integers(size, size=n) for size in sizes], axis=1)
    targets = np.concatenate([np.eye(size)[classes[:, i]] for i, size in enumerate(sizes)], axis=1)
    scores = rng.random(targets.shape)
    wanted = [
        [int(part.argmax()) == truth for part, truth in zip(torch.from_numpy(row).split(sizes), true, strict=True)]
        for row, true in zip(scores, classes, strict=True)
    ]
    np.testing.assert_array_equal(attribute_hits(scores, targets, sizes), np.array(wanted))


def test_an_image_with_two_values_of_an_attribute_has_no_hits():
    with pytest.raises(InputError, match="expected one true value of each attribute"):
        attribute_hits(np.zeros((1, 3)), np.array([[1, 1, 0]]), [3])


# --- scores


def test_a_score_is_the_share_of_images_with_the_value_that_was_asked_for(always_red_cats, images, requests):
    result = score(images, requests, evaluator=always_red_cats)
    assert {key: figure.value for key, figure in result.metrics.items()} == pytest.approx(
        {"attributes": 0.6, "body": 3 / 5, "colour": 3 / 5}
    )
    hits = np.array([[1, 1], [0, 1], [1, 0], [1, 1], [0, 0]])
    for key, values in (("attributes", hits.mean(axis=1)), ("body", hits[:, 0]), ("colour", hits[:, 1])):
        figure = result.metrics[key]
        assert figure.standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(5))
        assert (figure.over, figure.better) == ("images", "higher")
    assert {name: (share.hits, share.total) for name, share in result.by_value.items()} == {
        "body: cat": (3, 3),
        "body: slime": (0, 2),
        "colour: blue": (0, 1),
        "colour: green": (0, 1),
        "colour: red": (3, 3),
    }


def test_several_folders_are_seeds_and_what_was_asked_for_may_lie_elsewhere(judge, images, requests, tmp_path):
    pytest.importorskip("torchmetrics")
    folders = [images, make_images(tmp_path / "second", seed=1)]
    for i in range(5):
        (folders[1] / f"{i}.png").rename(folders[1] / f"{i}_main.png")
    elsewhere = tmp_path / "asked.json"
    (tmp_path / "attributes.json").rename(elsewhere)
    scorer = Scorer(evaluator=judge, attributes=elsewhere, reference=images, features="evaluator")
    result = scorer.score(folders, requests)
    assert scorer.planned(requests) == tuple(result.metrics) == ("attributes", "body", "colour", "fid", "kid")
    pixels = [np.stack([np.asarray(Image.open(f / f"{key}.png")) for key in ENTRIES]) for f in folders]
    scores = [load(judge).predict((x.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)) for x in pixels]
    colours = ATTRIBUTES["colour"]
    values = [
        np.mean([colours[row[2:].argmax()] == asked[1] for row, asked in zip(one, ASKED, strict=True)])
        for one in scores
    ]
    assert list(result.metrics["colour"].folders.values()) == pytest.approx(values)
    assert result.metrics["colour"].over == "seeds"
    assert result.metrics["colour"].standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(2))
    other = scorer.score(folders[0], requests)
    assert list(compare(result, other).metrics) == list(result.metrics)


def test_requests_are_found_by_their_image_names_too(always_red_cats, images, requests, tmp_path):
    listed = [{"prompt": "x", "image_name": f"{key}.png"} for key in ENTRIES]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    assert score(images, tmp_path / "list.json", evaluator=always_red_cats).metrics["body"].value == pytest.approx(0.6)


def test_the_command_prints_and_writes_every_attribute(fastgen, always_red_cats, images, requests):
    code, out, err = fastgen(
        "score", images, "--requests", requests, "--evaluator", always_red_cats, "--against", images
    )
    assert (code, err) == (0, "")
    value = json.loads((images / "score.json").read_text())
    assert list(value["metrics"]) == list(value["comparison"]["metrics"]) == ["attributes", "body", "colour"]
    assert value["metrics"]["colour"]["better"] == "higher"
    assert value["by_value"]["body: cat"] == {"accuracy": 1.0, "hits": 3, "labels": 3}
    assert "attributes (mean of 2)" in out
    assert "body: slime" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: (d / "attributes.json").unlink(), "attributes.json: no such file, which says what was asked for"),
        (
            lambda d: (d / "attributes.json").write_text(json.dumps({"0_main": ENTRIES["0_main"]})),
            "attributes.json: 4 requests have no entry: 1_main, 2_main, 3_main, 4_main",
        ),
        (
            lambda d: (d / "attributes.json").write_text(json.dumps(ENTRIES).replace("slime", "slim")),
            "attributes.json: key '1_main': unknown body 'slim'; did you mean 'slime'",
        ),
        (
            lambda d: (d / "attributes.json").write_text(json.dumps(ENTRIES).replace("colour", "color")),
            "key '0_main': colour is missing",
        ),
        (
            lambda d: (d / "test.json").write_text('[{"labels": ["red cube"], "image_name": "0_main.png"}]'),
            "holds labels; attributes need requests with prompts",
        ),
    ],
)
def test_what_cannot_be_judged_is_one_line(fastgen, always_red_cats, images, requests, tmp_path, change, words):
    change(tmp_path)
    code, out, err = fastgen("score", images, "--requests", requests, "--evaluator", always_red_cats)
    assert (code, out) == (2, "")
    assert err.startswith("fastgen: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (images / "score.json").exists()


def test_options_that_do_not_belong_together_are_refused(judge, images, requests, tmp_path):
    from scoring_helpers import make_evaluator

    of_objects = make_evaluator(tmp_path / "objects")
    with pytest.raises(InputError, match="add --evaluator E"):
        Scorer(clip="anything", attributes=requests)
    with pytest.raises(InputError, match="judges objects; --attributes is for evaluators of attributes"):
        Scorer(evaluator=of_objects, attributes=requests)
    with pytest.raises(InputError, match="judges attributes; objects are for evaluators of objects"):
        Scorer(evaluator=judge, objects={"red cube": 0})
    with pytest.raises(InputError, match="attributes need the requests"):
        Scorer(evaluator=judge).score(images)
    with pytest.raises(InputError, match="or --evaluator FOLDER of an evaluator of attributes"):
        Scorer(evaluator=of_objects).score(images, requests)


def test_an_evaluator_given_for_its_features_judges_nothing_where_nothing_is_known(judge, images, requests, tmp_path):
    pytest.importorskip("torchmetrics")
    (tmp_path / "attributes.json").unlink()
    scorer = Scorer(evaluator=judge, reference=images, features="evaluator")
    assert list(scorer.score(images, requests).metrics) == ["fid", "kid"]
    assert list(scorer.score(images).metrics) == ["fid", "kid"]


def test_attributes_stand_beside_the_cosines_of_clip(judge, images, requests, tmp_path):
    pytest.importorskip("transformers")
    result = score(images, requests, evaluator=judge, clip=make_clip(tmp_path / "clip"))
    assert list(result.metrics) == ["attributes", "body", "colour", "clip_t"]
