"""The page without a browser: its endpoints through gradio_client, its parts, and many concurrent visitors."""

import asyncio
import os
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from dsd_serve import calls
from dsd_serve.client import AsyncClient, Client
from dsd_serve.errors import ConfigError, ServerError
from dsd_serve.imaging.codec import write_image
from tests.support.data import ROOT, sample_image
from tests.support.page_events import click_of, generate_inputs, pressed
from tests.support.servers import Server, until

pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[ui]'")


@pytest.fixture(scope="module")
def page_url(tiny_dir):
    """A server with the page, in a process of its own."""
    running = Server("--ui", "--model", str(tiny_dir), "--max-images", "8", "--port", "0", "--grace", "20")
    yield running.url
    began = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - began < 10  # visitors' streams do not delay it


@pytest.fixture(scope="module")
def gradio(page_url, tmp_path_factory):
    from gradio_client import Client as GradioClient

    return GradioClient(page_url, verbose=False, download_files=str(tmp_path_factory.mktemp("files")))


@pytest.fixture
def photo(tmp_path):
    from gradio_client import handle_file

    file = tmp_path / "photo.png"
    file.write_bytes(write_image(sample_image(207, 0, size=50)))
    return handle_file(str(file))


def test_generate_by_gradio_client_gives_the_servers_bytes(gradio, page_url):
    files, settings = gradio.predict("207", 5, 2, 3, "euler", 1.5, api_name="/generate")
    assert settings["seed"] == 5
    assert len(files) == 2
    with open(files[0]["image"], "rb") as file, Client(page_url) as client:
        settings = {"seed": 5, "steps": 3, "sampler": "euler", "guidance": 1.5}
        assert file.read() == client.generate(207, size=256, **settings)


def test_reconstruct_edit_walk_and_inspect_by_gradio_client(gradio, photo):
    kept, psnr = gradio.predict(photo, api_name="/reconstruct")
    assert Image.open(kept).size == (256, 256)
    assert psnr > 3
    edited, settings = gradio.predict(photo, None, "950", 0.5, 1, 4, "euler", 1.5, 2, api_name="/edit")
    assert Image.open(edited).size == (256, 256)
    assert [settings[name] for name in ("strength", "seed", "index", "steps", "sampler")] == [0.5, 1, 2, 4, "euler"]
    strip, animation = gradio.predict("207", 1, "1", 2, 4, api_name="/walk")
    assert len(strip) == 4
    assert Image.open(animation).is_animated
    found = gradio.predict(photo, api_name="/inspect")
    assert 1 <= found["effective_rank"] <= 8


def test_wrong_files_and_settings_get_the_server_s_error(gradio, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    wrong = tmp_path / "wrong.png"
    wrong.write_text("not an image")
    with pytest.raises(AppError, match="PNG, JPEG or WebP"):
        gradio.predict(handle_file(str(wrong)), api_name="/reconstruct")
    with pytest.raises(AppError, match="steps must be at most 250"):
        gradio.predict("207", 5, 1, 9999, "euler", 1.5, api_name="/generate")
    with pytest.raises(AppError, match=r"seed must be a whole number .* got 1\.5"):
        gradio.predict("207", 1.5, 1, None, None, None, api_name="/generate")
    with pytest.raises(AppError, match="class must be an index"):
        gradio.predict("no such thing", 5, 1, None, None, None, api_name="/generate")


def test_the_page_s_own_events_cannot_be_called_by_name(gradio):
    assert set(gradio.view_api(return_format="dict")["named_endpoints"]) == {
        f"/{name}" for name in ("generate", "reconstruct", "edit", "walk", "inspect", "classes", "model")
    }


def test_the_page_does_not_change_the_api(page_url, http):
    with httpx.Client(base_url=page_url, timeout=30) as client:
        assert "text/html" in client.get("/").headers["content-type"]
        for path in ("/health/ready", "/classes", "/openapi.json", "/nothing", "/generate?class=207&seed=1&n=9"):
            ours, theirs = client.get(path), http.get(path)
            assert (ours.status_code, ours.headers["content-type"]) == (
                theirs.status_code,
                theirs.headers["content-type"],
            )
        assert client.delete("/generate").status_code == 405
        assert client.get("/studio/state").json()["up"] is True
        assert client.get("/studio/class/207.png").headers["content-type"] == "image/png"
        assert client.get("/studio/class/5.png").status_code == 503  # not trained on


def test_stopped_work_says_so_in_its_last_update(page_url):
    """So that no update still in flight can hide it."""

    async def stop_one(http, go, stop, seed):
        messages, updates = [], 0
        async for message in pressed(http, f"stop-{seed}", go, generate_inputs(seed, n=8, steps=250)):
            messages.append(message)
            updates += message["msg"] == "process_generating"
            if message["msg"] == "process_generating" and updates == 1 + seed % 2:
                body = {"data": [None], "fn_index": stop, "session_hash": f"stop-{seed}"}
                (await http.post("/gradio_api/run/predict", json=body)).raise_for_status()
        return messages

    async def run():
        async with httpx.AsyncClient(base_url=page_url, timeout=60) as http:
            go, stop = await click_of(http, "generate-go"), await click_of(http, "generate-stop")
            return [await stop_one(http, go, stop, seed) for seed in range(4)]

    for messages in asyncio.run(run()):
        assert messages[-1]["msg"] == "process_completed"
        assert messages[-1]["success"], messages[-1]
        assert "Stopped" in str(messages[-1]["output"]) + str(messages[-2]["output"])

    def idle():
        batcher = httpx.get(f"{page_url}/debug/batcher").json()
        return not batcher["running"] and not batcher["waiting"]

    until(idle)  # cancelled images end at the next tick


@pytest.mark.thorough
def test_twenty_visitors_neither_block_the_page_nor_starve_the_api(page_url):
    """Each visitor presses Generate twice, as a browser does, while other clients open the page and call the API."""

    async def visitor(http, name, event):
        for seed in range(2):
            messages = [
                one async for one in pressed(http, f"{name}-{seed}", event, generate_inputs(seed, n=4, steps=8))
            ]
            assert messages[-1]["success"], messages[-1]
            assert any("step" in str(one["output"]) for one in messages if one["msg"] == "process_generating")

    async def timed(request):
        began = time.monotonic()
        assert (await request).status_code == 200
        return time.monotonic() - began

    async def everybody():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=page_url, timeout=60, limits=limits) as http:
            event = await click_of(http, "generate-go")
            visitors = [asyncio.create_task(visitor(http, name, event)) for name in range(20)]
            await asyncio.sleep(0.1)
            direct, opened, under_way = [], [], []

            async def others():
                while not all(task.done() for task in visitors):
                    direct.append(await timed(http.get("/generate?class=207&steps=4&seed=1")))
                    opened.append(await timed(http.get("/")))

            async def watch():
                while not all(task.done() for task in visitors):
                    found = (await http.get("/debug/batcher")).json()
                    under_way.append(len(found["running"]) + len(found["waiting"]))
                    await asyncio.sleep(0.01)

            await asyncio.gather(others(), watch(), *visitors)
            return direct, opened, under_way

    direct, opened, under_way = asyncio.run(everybody())
    assert len(direct) > 1  # answered while the visitors waited
    assert 4 < max(under_way) <= 17  # of 80, and one of `others`: so few are ahead of a client of the API
    assert max(opened) < 2
    assert max(direct) < 10


def test_the_client_streams_previews_and_leaving_cancels(server_url):
    with Client(server_url) as client:
        events = list(client.generate_events(207, seed=1, n=2, steps=4, preview_every=1))
        assert [event.name for event in events].count("preview") == 6
        assert events[-1].name == "done"
        z = client.encode(write_image(sample_image(1, 0)))
        assert z.shape == tuple(client.model()["latent_shape"])
        assert client.decode(z).startswith(b"\x89PNG")
        assert client.debug()["not_ready"] is None
        mask = np.zeros((3, 24, 24), np.uint8)
        mask[:, 12:] = 255
        assert (
            client.edit(write_image(sample_image(1, 0)), write_image(mask), class_=207, strength=1.0)["strength"] == 1
        )
        with pytest.raises(ServerError, match="n must be at most 8"):
            next(iter(client.generate_events(207, n=99)))

    async def leave():
        client = AsyncClient(server_url)
        stream = client.stream(calls.generate_events(207, n=8, steps=250, preview_every=1))
        assert (await anext(stream)).name == "preview"
        await stream.aclose()
        deadline = time.monotonic() + 5
        while (left := await client.do(calls.batcher()))["running"] or left["waiting"]:
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.02)
        await client.close()

    asyncio.run(leave())


def test_a_drawing_of_several_requests_shows_previews_and_errors(server_url):
    from ui.fair_limit import LimitedClient
    from ui.finished import FinishedImages
    from ui.requests import DrawRequest, draw

    async def run():
        client = AsyncClient(server_url)
        limited = LimitedClient(client)
        requests = [
            DrawRequest("dog", calls.generate_events(207, n=2, steps=4, preview_every=1), 2, 4),
            DrawRequest("none", calls.generate_events("nonsense"), 1, 4),
        ]
        seen = [
            (current.progress, [bool(one.preview) for one in current.images], current.images[0].done)
            async for current in draw(limited, requests, FinishedImages(client))
        ]
        last = [current async for current in draw(limited, requests, FinishedImages(client))][-1]
        await client.close()
        return seen, last

    seen, last = asyncio.run(run())
    assert [progress for progress, *_ in seen] == sorted(progress for progress, *_ in seen)
    assert [one.done for one in last.images] == [True, True, False]
    assert "nonsense" in last.error
    assert last.images[2].error == last.error
    assert not last.running


def test_principal_components_give_like_tokens_like_colours():
    from ui.display import principal_components

    z = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    z[3] = z[0]
    colours = principal_components(z)
    assert colours.shape == (3, 2, 2)
    assert (colours[:, 0, 0] == colours[:, 1, 1]).all()
    assert colours.max() == 255


def test_names_are_escaped():
    from ui.html import callout

    evil = "<img src=x onerror=alert(1)>"
    assert "<img src=x" not in callout(evil)


def test_the_page_and_api_keys_do_not_go_together(tiny_dir, monkeypatch):
    from server.main import serve
    from server.settings import parse_settings

    monkeypatch.setenv("DSD_API_KEYS", "somebody:0123456789abcdef")
    with pytest.raises(ConfigError, match="dsd-ui"):
        serve(parse_settings(["--ui", "--model", str(tiny_dir), "--port", "0"]))


@pytest.mark.parametrize("command", [["server.main", "--ui"], ["ui.main"]])
def test_without_gradio_an_error_says_what_to_install(command, tiny_dir, tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('no gradio here')")
    model = ["--model", str(tiny_dir)] if "--ui" in command else []
    done = subprocess.run(
        [sys.executable, "-m", *command, *model],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "pip install '.[ui]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_zip_of_images_that_are_not_there_says_so(page_url):
    for query, status, sentence in (
        ("", 400, "ids must name images"),
        ("?ids=" + "0" * 32, 404, "no longer on the server"),
    ):
        answer = httpx.get(f"{page_url}/studio/images.zip{query}")
        assert answer.status_code == status and sentence in answer.text


def test_the_head_names_no_file_of_gradio_and_starts_addresses_at_the_prefix(page_url):
    html = httpx.get(f"{page_url}/", headers={"X-Forwarded-Prefix": "/dsd"}).text
    assert '<base href="/dsd/" />' in html
    assert 'rel="manifest"' not in html
    assert '<base href="./" />' in httpx.get(f"{page_url}/").text
