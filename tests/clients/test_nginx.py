"""Behind nginx: the API and the page below a path, streams, and OpenAI's client."""

import base64
import json

import httpx
import openai
import pytest

from dsd_serve.client import Client

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("how", ["default", "kept", "unbuffered"])
def test_answers_pass_through(nginx, photo, drawn, reconstructed, how):
    with httpx.Client(base_url=nginx.plain[how], timeout=60) as http:
        for _ in range(3):
            assert http.get("/generate?class=207&seed=7").content == drawn
            assert http.post("/generate", json={"class": 207, "seed": 7}).content == drawn
            assert http.post("/reconstruct", files={"image": photo.read_bytes()}).content == reconstructed
        assert http.head("/generate?class=207&seed=7").status_code == 200
        etag = http.get("/generate?class=207&seed=7").headers["etag"]
        assert http.get("/generate?class=207&seed=7", headers={"if-none-match": etag}).status_code == 304


@pytest.mark.parametrize("how", ["default", "kept"])
def test_events_are_not_buffered(nginx, plain, how):
    """Without directives for buffering in nginx's configuration."""
    query = {"class": 207, "n": 8, "steps": 250, "preview_every": 1, "format": "events"}
    with httpx.stream("GET", f"{nginx.plain[how]}/generate", params=query, timeout=60) as answer:
        pieces = answer.iter_bytes()
        assert next(pieces)
        assert httpx.get(f"{plain}/debug/batcher").json()["running"]  # more is to come


def test_the_openai_client_below_a_path(nginx, plain, photo, drawn):
    with openai.OpenAI(base_url=f"{nginx.below}/dsd/v1", api_key="none", max_retries=0) as client:
        raw = client.images.with_raw_response.generate(prompt="207", extra_body={"seed": 7})
        assert raw.headers["x-request-id"] == raw.request_id
        asked = {"format": "json", "class": 207, "seed": 7}
        native = httpx.get(f"{plain}/generate", params=asked).json()["images"][0]["base64"]
        assert raw.parse().data[0].b64_json == native
        assert base64.b64decode(native) == drawn
        *partial, last = client.images.generate(prompt="207", stream=True, partial_images=2, extra_body={"seed": 7})
        assert (len(partial), last.b64_json) == (1, native)  # of two: four steps are spread over intervals of two
        with client.images.with_streaming_response.edit(image=photo, prompt="1", extra_body={"seed": 7}) as streamed:
            edited = json.loads(b"".join(streamed.iter_bytes()))["data"][0]["b64_json"]
        assert edited == client.images.edit(image=photo, prompt="1", extra_body={"seed": 7}).data[0].b64_json
        assert [model.id for model in client.models.list().data] == ["dsd-demo"]


@pytest.mark.parametrize("how", ["default", "kept", "unbuffered"])
def test_the_openai_client_reads_errors(nginx, big, how):
    asked = {"api_key": "wrong", "max_retries": 0}
    for url, status in ((nginx.plain[how], 413), (nginx.guarded[how], 401)):
        with (
            openai.OpenAI(base_url=f"{url}/v1", **asked) as client,
            pytest.raises(openai.APIStatusError) as refused,
        ):
            client.images.edit(image=big, prompt="1")
        assert refused.value.status_code == status


def test_links_stay_below_the_path(nginx):
    with httpx.Client(base_url=nginx.below, timeout=60) as http:
        index = http.get("/dsd/").json()
        links = [url for url in strings(index) if url.startswith(("/", "http"))]
        assert links
        for url in links:
            assert httpx.URL(nginx.below).join(url).path.startswith("/dsd/"), url
            assert httpx.URL(nginx.below).join(url).host == "127.0.0.1", url
        assert http.get(index["try"]).headers["content-type"] == "image/png"
        answer = http.get("/dsd/generate/", params={"class": 207}, follow_redirects=True)
        assert answer.status_code == 404 or answer.headers["content-type"] == "image/png"
        (server,) = http.get("/dsd/openapi.json").json()["servers"]
        assert server["url"] == "/dsd"


def strings(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inside for text in strings(one)]


def test_our_own_client_below_a_path(nginx, drawn):
    with Client(f"{nginx.below}/dsd") as client:
        assert client.generate(207, seed=7) == drawn
        assert [event.name for event in client.generate_events(207, seed=7)][-1] == "done"


def test_the_page_below_a_path(nginx):
    config = httpx.get(f"{nginx.below}/ui/config").json()
    assert httpx.URL(config["root"]).path == "/ui"
    assert httpx.get(f"{nginx.below}/ui/gradio_api/info").status_code == 200
    assert httpx.get(f"{nginx.below}/ui/studio/state").json()["up"] is True


def test_gradio_s_python_client_below_a_path(nginx, plain, photo, tmp_path):
    from gradio_client import Client as GradioClient
    from gradio_client import handle_file

    client = GradioClient(f"{nginx.below}/ui/", verbose=False, download_files=str(tmp_path))
    (shown,), settings = client.predict("207", 7, 1, None, None, None, api_name="/generate")
    with open(shown["image"], "rb") as file:
        assert file.read() == httpx.get(f"{plain}/generate?class=207&seed=7&size=256").content
    assert settings["seed"] == 7
    kept, psnr = client.predict(handle_file(str(photo)), api_name="/reconstruct")
    assert psnr > 3
    with open(kept, "rb") as file:
        assert file.read(4) == b"\x89PNG"
