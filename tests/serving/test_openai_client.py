"""OpenAI's own client works unchanged."""

from __future__ import annotations

import base64

import openai
import pytest
from fake_service import FakeService, picture
from serving_client import Client

from fastgen.serving.errors import ApiError
from fastgen.serving.security import Policy

KEY = "sk-0123456789"


@pytest.fixture
def service():
    return FakeService()


@pytest.fixture
def images(service):
    with (
        Client(service, Policy(keys=(KEY,))) as server,
        openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY) as client,
    ):
        yield client.images


def test_it_generates(images, service):
    answer = images.generate(prompt="a dragon", model="monsters-64", n=3, size="64x48", extra_body={"seed": 8})
    task = service.submitted[0].task
    assert [base64.b64decode(image.b64_json) for image in answer.data] == [picture(task, 8 + i) for i in range(3)]
    assert answer.usage.total_tokens == 24
    assert answer.size == "64x48"
    assert service.submitted[0].key.startswith("key ")


def test_it_streams_partial_images(images, service):
    service.row_s = 0.02
    found = list(images.generate(prompt="a dragon", model="monsters-64", stream=True, partial_images=3))
    assert [event.type for event in found] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in found[:-1]] == [0, 1, 2]
    task = service.submitted[0].task
    assert base64.b64decode(found[-1].b64_json) == picture(task, task.seed)
    assert found[-1].usage.output_tokens == 8


def test_it_lists_models(images):
    assert [model.id for model in images._client.models.list()][:2] == ["monsters-64", "iclevr-64"]
    assert images._client.models.retrieve("digits").owned_by == "fastgen"


def test_errors_have_their_classes(images):
    with pytest.raises(openai.BadRequestError, match="this model makes 64x48") as caught:
        images.generate(prompt="x", model="monsters-64", size="1024x1024")
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "size",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError, match="unknown model 'gpt-image-1'"):
        images.generate(prompt="x", model="gpt-image-1")
    with pytest.raises(openai.AuthenticationError):
        images._client.with_options(api_key="another-key").images.generate(prompt="x")


def test_a_refusal_for_now_is_a_rate_limit_error(images, service):
    service.room = 2
    with pytest.raises(openai.RateLimitError):
        images._client.with_options(max_retries=0).images.generate(prompt="x", model="monsters-64", n=3)


def test_it_tries_again_by_itself_when_the_server_says_so(images, service):
    submit, refusals = service.submit, []

    def busy_twice(request):
        if len(refusals) < 2:
            refusals.append(request)
            raise ApiError(429, "busy", kind="rate_limit_error", retry_after=1)
        return submit(request)

    service.submit = busy_twice
    assert len(images.generate(prompt="x", model="monsters-64").data) == 1
    assert len(refusals) == 2


def test_it_does_not_repeat_what_would_fail_again(images, service):
    service.failing[3] = ApiError(500, "not finite", kind="server_error", code="not_finite")
    with pytest.raises(openai.InternalServerError):
        images.generate(prompt="x", model="monsters-64", extra_body={"seed": 3})
    assert len(service.submitted) == 1


def test_an_error_within_a_stream_is_raised_after_the_images_that_are_done(images, service):
    service.failing[4] = ApiError(500, "not finite", kind="server_error", code="not_finite")
    stream = images.generate(prompt="x", model="monsters-64", n=2, stream=True, extra_body={"seed": 3})
    assert next(stream).type == "image_generation.completed"
    with pytest.raises(openai.APIError, match="seed 4: not finite"):
        next(stream)
