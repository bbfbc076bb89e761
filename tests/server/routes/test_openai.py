"""The routes under /v1, driven by the stock openai client over HTTP."""

import asyncio
import base64
import hashlib
import io
import json
import shutil
import struct
import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI, HTTPException
from PIL import Image

from dsd_serve.errors import ClosedError, DeadlineError, EngineError
from dsd_serve.imaging.codec import read_image, write_image
from server import error_responses
from tests.support.data import sample_image
from tests.support.servers import Server

PHOTO = sample_image(207, 0, size=16)  # of the tiny model's own size, so that nothing is resampled
DRAW = slice(4, 12), slice(4, 12)  # a square of whole tokens


def connect(url: str, **settings) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", **{"max_retries": 0, **settings})


@pytest.fixture(scope="module")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with connect(server_url) as client:
        yield client


def decoded(item) -> bytes:
    return base64.b64decode(item.b64_json)


def mask() -> bytes:
    """A PNG that is transparent in the square DRAW."""
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 3] = 255
    rgba[(*DRAW, 3)] = 0
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "PNG")
    return file.getvalue()


def test_images_are_those_of_the_native_route_to_the_byte(client, http):
    answer = client.images.generate(
        prompt="golden retriever",
        n=2,
        size="64x64",
        extra_body={
            "seed": 7,
            "num_inference_steps": 3,
            "sampler": "euler",
            "guidance_scale": 2,
            "guidance_interval": [0.1, 0.8],
        },
    )
    query = {"class": 207, "seed": 7, "steps": 3, "sampler": "euler", "guidance": 2, "size": 64}
    query |= {"guidance_start": 0.1, "guidance_stop": 0.8}
    assert len(answer.data) == 2
    for index, item in enumerate(answer.data):
        assert decoded(item) == http.get("/generate", params={**query, "index": index}).content
        assert (item.seed, item.index) == (7, index)
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")
    assert abs(answer.created - time.time()) < 60
    assert answer.usage.output_tokens == 2 * http.get("/model").json()["latent_shape"][0]


def test_prompts_name_classes_and_what_is_left_out_is_recommended(client, http):
    native = http.get("/generate", params={"class": 950, "seed": 1}).content
    for prompt, more in (
        ("950", {}),
        ("class:950", {}),
        ("n07747607", {}),
        ("Orange", {}),
        ("a red dog", {"class_id": 950}),
    ):
        answer = client.images.generate(prompt=prompt, model="tiny", extra_body={"seed": 1, **more})
        assert decoded(answer.data[0]) == native
    assert client.images.generate(prompt="950").data[0].seed != client.images.generate(prompt="950").data[0].seed


def test_what_changes_nothing_here_is_accepted(client):
    answer = client.images.generate(
        prompt="1",
        size="auto",
        quality="high",
        style="vivid",
        background="opaque",
        moderation="low",
        user="me",
        safety_identifier="me",
        response_format="b64_json",
        output_compression=100,
        extra_body={"n": None, "partial_images": None},
    )
    assert answer.size == "16x16"
    assert read_image(decoded(answer.data[0])).shape == (3, 16, 16)


def test_output_formats(client, http):
    sizes = []
    for kind, quality in (("jpeg", 95), ("jpeg", 10), ("webp", 95), ("webp", 0)):
        answer = client.images.generate(
            prompt="1", size="128x128", output_format=kind, output_compression=quality, extra_body={"seed": 1}
        )
        assert Image.open(io.BytesIO(decoded(answer.data[0]))).format == kind.upper()
        sizes.append(len(decoded(answer.data[0])))
    assert sizes[0] > sizes[1]
    assert sizes[2] > sizes[3]
    plain = client.images.generate(prompt="1", output_format="jpeg", extra_body={"seed": 1})
    assert decoded(plain.data[0]) == http.get("/generate", params={"class": 1, "seed": 1, "format": "jpeg"}).content


@pytest.mark.parametrize(
    ("steps", "options", "previews"),
    [
        (10, {"partial_images": 3}, [3, 6, 9]),
        (10, {"partial_images": 2}, [4, 8]),
        (2, {"partial_images": 3}, [1]),
        (4, {"partial_images": 2}, [2]),
        (10, {"partial_images": 0}, []),
        (10, {}, []),
        (10, {"preview_every": 2}, [2, 4, 6, 8]),
        (10, {"preview_every": 2, "partial_images": 1}, [5]),
    ],
)
def test_streams_show_partial_images_evenly(client, http, steps, options, previews):
    settings = {"seed": 5, "num_inference_steps": steps, **options}
    *partial, last = client.images.generate(prompt="207", stream=True, extra_body=settings)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * len(previews)
    assert [event.partial_image_index for event in partial] == list(range(len(previews)))
    assert last.type == "image_generation.completed"
    assert last.usage.total_tokens == last.usage.output_tokens > 0
    query = {"class": 207, "seed": 5, "steps": steps, "preview_every": 1, "format": "events"}
    shown = [json.loads(line[6:]) for line in http.get("/generate", params=query).text.splitlines() if "{" in line]
    native = {event["step"]: event["base64"] for event in shown if "step" in event}
    assert [event.b64_json for event in partial] == [native[step] for step in previews]
    assert decoded(last) == http.get("/generate", params={"class": 207, "seed": 5, "steps": steps}).content


def test_a_stream_of_several_images_says_which(client):
    events = list(client.images.generate(prompt="1", n=2, stream=True, partial_images=1))
    assert sorted((event.type.rpartition(".")[2], event.index) for event in events) == [
        ("completed", 0),
        ("completed", 1),
        ("partial_image", 0),
        ("partial_image", 1),
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's, for this route
def test_variations_are_edits_towards_no_class(client, http):
    photo = write_image(PHOTO)
    answer = client.images.create_variation(
        image=photo, n=2, size="auto", extra_body={"seed": 3, "num_inference_steps": 4, "strength": 0.4}
    )
    for index, item in enumerate(answer.data):
        query = {"seed": 3, "steps": 4, "strength": 0.4, "index": index}
        assert decoded(item) == http.post("/edit", params=query, content=photo).content
    assert answer.usage.input_tokens == answer.usage.output_tokens > 0
    assert decoded(answer.data[0]) != decoded(answer.data[1])


def test_edits_draw_where_the_mask_is_transparent(client, http):
    photo, settings = write_image(PHOTO), {"seed": 3, "guidance_interval": [0.2, 0.9], "strength": 0.9}
    answer = client.images.edit(image=[photo], mask=mask(), prompt="goldfish", extra_body=settings)
    drawn = read_image(decoded(answer.data[0]))
    outside = np.ones((16, 16), bool)
    outside[DRAW] = False
    assert np.array_equal(drawn[:, outside], PHOTO[:, outside])
    assert not np.array_equal(drawn[:, ~outside], PHOTO[:, ~outside])
    light = write_image(np.repeat(np.where(outside, 0, 255).astype(np.uint8)[None], 3, 0))
    query = {"class": 1, "seed": 3, "guidance_start": 0.2, "guidance_stop": 0.9, "strength": 0.9}
    native = http.post("/edit", params=query, files={"image": photo, "mask": light})
    assert decoded(answer.data[0]) == native.content


def test_edits_stream(client, http):
    photo = write_image(PHOTO)
    *partial, last = client.images.edit(
        image=photo, prompt="950", stream=True, partial_images=2, extra_body={"seed": 2, "num_inference_steps": 10}
    )
    assert [event.type for event in partial] == ["image_edit.partial_image"] * 2
    assert last.type == "image_edit.completed"
    native = http.post("/edit", params={"class": 950, "seed": 2, "steps": 10}, content=photo)
    assert decoded(last) == native.content


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny") == model


def test_the_async_client(server_url):
    async def send():
        async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
            one, two = await asyncio.gather(
                *(client.images.generate(prompt="1", extra_body={"seed": seed}) for seed in (1, 2))
            )
            stream = await client.images.generate(prompt="1", stream=True, extra_body={"seed": 1})
            return one, two, [event async for event in stream]

    one, two, (event,) = asyncio.run(send())
    assert one.data[0].b64_json == event.b64_json != two.data[0].b64_json


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"prompt": "golden retreiver"}, "prompt", "did you mean 207 (Golden Retriever)?"),
        ({"prompt": "tiger shark"}, "prompt", "which this model was not trained on; the model has 1 (goldfish), 207"),
        ({"prompt": ""}, "prompt", "class must be an index"),
        ({"class_id": 1000}, "class_id", "class must be an index"),
        ({"size": "16x32"}, "size", "auto or a square like 256x256, at least 8x8, got '16x32'"),
        ({"size": "4x4"}, "size", "at least 8x8"),
        ({"size": "2048x2048"}, "size", "size must be at most 1024 on this server, got 2048"),
        ({"n": 0}, "n", "n must be greater than or equal to 1"),
        ({"n": 11}, "n", "n must be less than or equal to 10"),
        ({"n": 9}, "n", "n must be at most 8 on this server"),
        ({"background": "transparent"}, "background", "images are always opaque"),
        ({"response_format": "url"}, "response_format", "response_format must be b64_json"),
        ({"output_format": "svg"}, "output_format", "must be 'png', 'jpeg' or 'webp', got 'svg'"),
        ({"output_format": "gif"}, "output_format", "must be 'png', 'jpeg' or 'webp', got 'gif'"),
        ({"output_compression": 50}, "output_compression", "png, which loses nothing"),
        ({"partial_images": 2}, "partial_images", "where stream is not true"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
        ({"num_inference_steps": 251}, "num_inference_steps", "num_inference_steps must be at most 250"),
        ({"sampler": "ddim"}, "sampler", "sampler must be one of euler, heun, dpmpp_2m"),
        ({"guidance_scale": 101}, "guidance_scale", "less than or equal to 100"),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval", "two times from 0 to 1 in this order"),
        ({"guidance_interval": 3}, "guidance_interval", "two times from 0 to 1 in this order"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"guidence_scale": 2}, "guidence_scale", "there is no parameter 'guidence_scale'"),
        ({"stream": "perhaps"}, "stream", "stream must be a valid boolean"),
    ],
)
def test_what_is_wrong_is_a_bad_request_with_its_parameter(client, options, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="1", extra_body=options)
    assert words in caught.value.message
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")


def test_wrong_uploads_are_bad_requests(client, http):
    photo = write_image(PHOTO)
    for options, param, words in (
        ({"image": b"hello"}, "image", "not a readable image"),
        ({"image": b""}, "image", "image is missing"),
        ({"image": photo, "mask": photo}, "mask", "opaque everywhere"),
        ({"image": photo, "mask": b"x"}, "mask", "not a readable image"),
        ({"image": [photo, photo]}, None, "the field image twice"),
        ({"image": photo, "n": 9}, "n", "n must be at most 8"),
        ({"image": photo, "extra_body": {"strength": 0}}, "strength", "greater than or equal to 0.001"),
        ({"image": photo, "extra_body": {"svg": 1}}, None, "unknown form field 'svg'"),
        ({"image": photo, "prompt": "lion?"}, "prompt", "must name a class"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(**{"prompt": "1", **options})
        assert words in caught.value.message
        assert caught.value.param == param
    with pytest.raises(openai.APIStatusError, match="larger than 2 MB") as large:
        client.images.edit(prompt="1", image=b"x" * 2_000_001)
    assert large.value.status_code == 413
    assert http.post("/v1/images/edits", json={"prompt": "1"}).status_code == 415
    text = http.post("/v1/images/edits", files={"image": (None, "dog.png"), "prompt": (None, "1")})
    assert "the form field image must be a file" in text.json()["error"]["message"]
    broken = {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=y"}}
    assert "form" in http.post("/v1/images/edits", **broken).json()["error"]["message"]


def test_other_models_and_paths_are_not_found(client, http):
    for call in (
        lambda: client.images.generate(prompt="1", model="dall-e-3"),
        lambda: client.images.edit(prompt="1", model="dall-e-3", image=write_image(PHOTO)),
        lambda: client.models.retrieve("dall-e-3"),
    ):
        with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3' here; this server has") as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="there is no /v1/chat/completions here"):
        client.chat.completions.create(model="tiny", messages=[])
    with pytest.raises(openai.APIStatusError, match="does not take DELETE") as caught:
        client.models.delete("tiny")
    assert caught.value.status_code == 405
    assert "detail" in http.get("/v2").json()  # elsewhere errors are problem documents


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{", None, "not valid JSON"),
        (b"[1]", None, "must be a JSON object"),
        (b"{}", "prompt", "prompt is missing"),
        (b'{"prompt": "1", "\\ud800": 1}', None, "must be a valid string"),
        (b'{"prompt": "\\ud800"}', "prompt", "prompt"),
    ],
)
def test_bodies_that_the_client_cannot_send(http, body, param, words):
    answer = http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert error["param"] == param


def test_a_full_queue_is_a_rate_limit_and_the_client_comes_back(tiny_dir):
    running = Server("--model", str(tiny_dir), "--max-waiting", "1", "--row-budget", "1", "--max-steps", "1000")
    crowd = [threading.Thread(target=hold, args=(running.url, 1000, seed)) for seed in range(2)]
    with connect(running.url) as hasty, connect(running.url, max_retries=8) as patient:
        hasty.models.list()
        for thread in crowd:
            thread.start()
        wait_for(running.url, running=1, waiting=1)
        with pytest.raises(openai.RateLimitError, match="at most 1 images") as caught:
            hasty.images.generate(prompt="1")
        answer = patient.images.with_raw_response.generate(prompt="1", extra_body={"num_inference_steps": 1})
    assert (caught.value.type, caught.value.code) == ("rate_limit_error", "rate_limit_exceeded")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert answer.retries_taken >= 1
    assert len(answer.parse().data) == 1
    for thread in crowd:
        thread.join()
    assert running.stop() == 0


def hold(url: str, steps: int, seed: int) -> None:
    while True:
        answer = httpx.get(f"{url}/generate", params={"class": 1, "steps": steps, "seed": seed}, timeout=60)
        if answer.status_code == 200:
            return
        time.sleep(0.01)


def wait_for(url: str, **counts: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        shown = httpx.get(f"{url}/debug/batcher").json()
        if all(len(shown[name]) == count for name, count in counts.items()):
            return
    raise AssertionError(f"the batcher never had {counts}")


def test_an_image_that_fails_is_not_tried_again(tiny_dir, tmp_path):
    """A model whose embedding of class 950 is not finite: that class fails, alone, each time."""
    model = tmp_path / "broken"
    shutil.copytree(tiny_dir, model)
    poison(model / "model.safetensors", "y_embed.embedding.weight", row=950)
    running = Server("--model", str(model))
    with connect(running.url, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError, match="not finite") as caught:
            client.images.generate(prompt="950")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"  # it was not repeated
        assert caught.value.type == "server_error"
        with pytest.raises(openai.APIError, match="not finite"):  # within a stream
            list(client.images.generate(prompt="950", stream=True))
        assert len(client.images.generate(prompt="1").data) == 1
    assert running.stop() == 0


def poison(path, name, row) -> None:
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    item = json.loads(data[8 : 8 + length])[name]
    assert item["dtype"] == "F16"
    start, width = 8 + length + item["data_offsets"][0], 2 * item["shape"][1]
    data[start + row * width : start + (row + 1) * width] = np.full(width // 2, np.nan, "<f2").tobytes()
    config = path.with_name("config.json")  # which names the file by its hash
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(data)
    config.write_text(config.read_text().replace(before, hashlib.sha256(data).hexdigest()))


def test_errors_of_middleware_and_of_the_engine_have_openais_form():
    """Errors that no request to a healthy server raises, through the handlers of a real application."""
    app = FastAPI()
    error_responses.install(app)
    raised: dict[str, Exception] = {
        "unauthorized": HTTPException(401, "this server needs an API key", {"WWW-Authenticate": "Bearer"}),
        "closed": ClosedError("the server is shutting down"),
        "late": DeadlineError("too late"),
        "engine": EngineError("it broke"),
        "bug": KeyError("secret"),
    }

    @app.get("/{prefix}/{name}")
    async def fail(prefix: str, name: str) -> None:
        raise raised[name]

    async def send(path: str) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    for name, status, kind, code, headers in (
        ("unauthorized", 401, "invalid_request_error", "invalid_api_key", {"www-authenticate": "Bearer"}),
        ("closed", 503, "server_error", None, {"retry-after": "5", "x-should-retry": None}),
        ("late", 504, "server_error", None, {"x-should-retry": "false"}),
        ("engine", 500, "server_error", None, {"x-should-retry": "false"}),
        ("bug", 500, "server_error", None, {"x-should-retry": "false"}),
    ):
        answer = asyncio.run(send(f"/v1/{name}"))
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (status, kind, code)
        assert {header: answer.headers.get(header) for header in headers} == headers
        assert error["message"] and "secret" not in error["message"]
        assert asyncio.run(send(f"/native/{name}")).json()["detail"] == error["message"]
