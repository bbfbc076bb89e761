"""A visitor of the page cannot take resources from the others: raw requests that no browser sends."""

import asyncio
import contextlib
import html
import json
import re
import socket
import threading
import time
from base64 import b64encode
from collections import Counter
from datetime import datetime, timedelta
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn

from dsd_serve import calls
from dsd_serve.client import AsyncClient
from dsd_serve.errors import InputError, ServerError
from dsd_serve.imaging.codec import write_image
from dsd_serve.params import SAMPLER_NAMES

pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[ui]'")

import gradio as gr

from tests.support.page_events import click_of, generate_inputs
from tests.support.servers import Server
from ui import visitors
from ui.app import MAX_WAITING, Thumbnails, create_page
from ui.controls import Sampling, Stop, sampling_of
from ui.fair_limit import IN_FLIGHT, PER_CLICK, PER_VISITOR, TOTAL, VISITOR, FairLimit, LimitedClient, images_of
from ui.finished import FinishedImages
from ui.requests import Drawing, DrawnImage, DrawRequest, draw
from ui.server_info import ModelFacts, ServerInfo
from ui.tabs.generate import check_count
from ui.tabs.inside import watching
from ui.values import number_of, whole


@pytest.fixture(scope="module")
def page(tiny_dir):
    """A server with the page, in a process of its own."""
    running = Server("--ui", "--model", str(tiny_dir), "--max-images", "8", "--grace", "20")
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log, running.log[running.log.index("Traceback") :][:8000]


@pytest.fixture
def inside(server_url):
    """The page in this process, so that tests can inspect its parts: its URL and its gr.Blocks."""
    app = create_page(AsyncClient(server_url))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        eventually(lambda: httpx.get(f"{url}/config").status_code == 200 if server.started else False)
        yield SimpleNamespace(url=url, blocks=app.routes[-1].app.get_blocks(), app=app.routes[-1].app)
        app.state.stop.set()
        server.should_exit = True
        thread.join(20)


def eventually(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, holds
        time.sleep(0.05)


def join(http, session, event, data, **more):
    body = {"data": data, "fn_index": event, "session_hash": session, **more}
    headers = {"Content-Type": "application/json"}
    return http.post("/gradio_api/queue/join", content=json.dumps(body), headers=headers)  # with NaN, too


async def outcomes(http, session, count):
    """The last messages of `count` events of a session: their outputs, by event."""
    found = {}
    async with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        async for line in stream.aiter_lines():
            message = json.loads(line[5:]) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                found[message["event_id"]] = message
            if len(found) == count:
                return found
    raise AssertionError(f"the stream ended after {len(found)} of {count} events")


HOSTILE = (
    None, True, -5, 2.5, float("nan"), float("-inf"), 1e308, 10**400, "x" * 20_000, "\u202e\x00", [[[[]]]],
    {"value": {"value": []}}, list(range(2000)),
)  # fmt: skip
PRESSED = (None, 7, "x", [], {}, {"value": None}, {"value": "x"}, {"value": 1e99}, {"value": -1}, {"value": [1]},
           {"value": True}, {"act": {}, "value": 0}, {"act": "again", "value": float("nan")})  # fmt: skip


def test_hostile_values_for_any_event_get_an_answer_and_no_traceback(page):
    async def attack(http, dependency, boards):
        """Send all hostile values to one event, in sessions of as many events as each may have."""
        event, count = dependency["id"], len(dependency["inputs"])
        sent = [([value] * count, None) for value in (HOSTILE if count else [None])]
        sent += [([None] * (count + 1), None), ([0] * max(count - 1, 0), None)]
        sent += [([0] * count, pressed) for pressed in PRESSED if dependency["targets"][0][0] in boards]
        for part in range(0, len(sent), visitors.MAX_EVENTS):
            session = f"hostile-{event}-{part}"
            batch = sent[part : part + visitors.MAX_EVENTS]
            if dependency["queue"]:
                for data, pressed in batch:
                    (await join(http, session, event, data, event_data=pressed)).raise_for_status()
                answers = (await outcomes(http, session, len(batch))).values()
                errors = [answer["output"].get("error") for answer in answers if not answer["success"]]
            else:
                answers = [
                    await http.post(
                        "/gradio_api/run/predict",
                        content=json.dumps({"data": data, "fn_index": event, "event_data": pressed, "batched": True}),
                        headers={"Content-Type": "application/json"},
                    )
                    for data, pressed in batch
                ]
                errors = [answer.json()["error"] for answer in answers if answer.status_code != 200]
            for error in errors:
                assert isinstance(error, str), errors
                assert 10 < len(error) < 500, error

    async def run():
        async with httpx.AsyncClient(base_url=page.url, timeout=60) as http:
            config = (await http.get("/config")).json()
            boards = [one["id"] for one in config["components"] if one["type"] == "html"]
            for dependency in config["dependencies"]:
                await attack(http, dependency, boards)

    asyncio.run(run())
    assert httpx.get(f"{page.url}/health/ready").status_code == 200


def test_requests_for_unknown_events_get_a_sentence(page):
    with httpx.Client(base_url=page.url, timeout=30) as http:
        wrong = [
            join(http, "somebody", 999, []),
            join(http, "somebody", -1, []),
            join(http, "x" * 10_000, 1, []),
            join(http, "a<gradio-sep>b", 1, []),
            http.post("/gradio_api/run/predict", json={"data": [], "fn_index": 999}),
            http.post("/gradio_api/run/generate", json={"data": ["207", 1, 1, 2, "euler", 1]}),  # past the queue
            http.post("/gradio_api/call/nothing", json={"data": []}),
        ]
        for answer in wrong:
            assert answer.status_code in (400, 404), answer
            assert 8 < len(answer.json()["detail"]) < 300, answer.text
        for path in ("queue/data?session_hash=nobody", "call/generate/nobody"):
            assert "404" in http.get(f"/gradio_api/{path}").text  # a message, and an end


def test_a_pressed_button_must_name_an_image_and_an_action(page):
    gone, unknown = "no longer on the server", "must be one of"

    async def run():
        async with httpx.AsyncClient(base_url=page.url, timeout=60) as http:
            config = (await http.get("/config")).json()
            board = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "board")
            details = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "details")
            for place, data, sentence in (
                (board, {"image": "0" * 32}, gone),
                (board, {"image": {"a": 1}}, gone),
                (board, {"image": "../../etc/passwd", "query": ["class=1"]}, "no longer on the server"),
                (board, {"image": "0" * 32, "query": "class=207&seed=-1"}, "seed in the link must be from 0"),
                (board, None, gone),
                (details, {"act": "again", "image": "0" * 32}, gone),
                (details, {"act": "nothing", "image": "0" * 32}, unknown),
                (details, {"act": {"a": 1}}, unknown),
                (details, None, unknown),
            ):
                event = next(one["id"] for one in config["dependencies"] if [place, "click"] in one["targets"])
                count = len(config["dependencies"][event]["inputs"])
                (await join(http, "one", event, [None] * count, event_data=data)).raise_for_status()
                (answer,) = (await outcomes(http, "one", 1)).values()
                assert sentence in str(answer["output"]), data

    asyncio.run(run())


def test_an_event_without_an_open_stream_does_not_start_and_delays_nobody(page):
    async def run():
        async with httpx.AsyncClient(base_url=page.url, timeout=60) as http:
            go = await click_of(http, "generate-go")
            statuses = Counter()
            for number in range(30):
                answer = await join(http, "silent", go, generate_inputs(number, n=8, steps=250))
                statuses[answer.status_code] += 1
                await join(http, f"silent-{number}", go, generate_inputs(number, n=8, steps=250))
                await http.post("/gradio_api/call/generate", json={"data": ["207", 1, 8, 250, "heun", 3]})
            await asyncio.sleep(0.5)
            load = (await http.get("/debug/batcher")).json()
            (await join(http, "listener", go, generate_inputs(1, n=2, steps=2))).raise_for_status()
            (answer,) = (await outcomes(http, "listener", 1)).values()
            return statuses, answer_of(await join(http, "silent", go, generate_inputs(1, 1, 1))), load, answer

    statuses, refused, load, answer = asyncio.run(run())
    assert statuses == {200: visitors.MAX_EVENTS, 429: 30 - visitors.MAX_EVENTS}
    assert "wait for one of them" in refused
    assert not load["running"]
    assert not load["waiting"]
    assert answer["success"]


def answer_of(answer):
    return answer.json()["detail"]


def test_a_call_by_two_requests_starts_with_the_second(page):
    with httpx.Client(base_url=page.url, timeout=60) as http:
        joined = http.post("/gradio_api/call/classes", json={"data": ["goldfish"]}).json()["event_id"]
        time.sleep(0.3)
        answer = http.get(f"/gradio_api/call/classes/{joined}").text
        assert "event: complete" in answer
        assert "goldfish" in answer


def test_leaving_cancels_waiting_requests(page):
    """Three visitors request 8 images each, of which 16 are in flight: when they leave, all 24 are cancelled."""

    async def visitor(http, go, name, started):
        (await join(http, name, go, generate_inputs(3, n=8, steps=250))).raise_for_status()
        async with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": name}) as stream:
            async for line in stream.aiter_lines():
                if "process_generating" in line:
                    started.release()
                    await asyncio.sleep(60)

    async def run():
        async with httpx.AsyncClient(base_url=page.url, timeout=60) as http:
            go, started = await click_of(http, "generate-go"), asyncio.Semaphore(0)
            three = [asyncio.create_task(visitor(http, go, f"leaver-{name}", started)) for name in range(3)]
            for _ in three:
                await started.acquire()
            for task in three:
                task.cancel()
            await asyncio.gather(*three, return_exceptions=True)
            deadline = time.monotonic() + 10
            quiet = 0
            while quiet < 10:  # and nothing starts any more
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
                found = (await http.get("/debug/batcher")).json()
                quiet = 0 if found["running"] or found["waiting"] else quiet + 1

    asyncio.run(run())


def test_a_visitor_who_never_opens_the_stream_is_dropped(inside, monkeypatch):
    monkeypatch.setattr(visitors, "UNOPENED_S", 0.5)
    queue = inside.blocks._queue
    with httpx.Client(base_url=inside.url, timeout=30) as http:
        go = next(
            one["id"]
            for one in http.get("/config").json()["dependencies"]
            if len(one["inputs"]) == len(generate_inputs(1, 1, 1))
        )
        join(http, "silent", go, generate_inputs(1, 1, 1)).raise_for_status()
        assert queue.event_ids_to_events
        eventually(lambda: not queue.event_ids_to_events)
        assert not queue.pending_messages_per_session
        assert not queue.pending_event_ids_session
        assert "session_not_found" in http.get("/gradio_api/queue/data?session_hash=silent").text


def test_of_unopened_streams_the_oldest_is_dropped_first(inside, monkeypatch):
    monkeypatch.setattr(visitors, "MAX_UNOPENED", 5)
    queue = inside.blocks._queue
    with httpx.Client(base_url=inside.url, timeout=30) as http:
        for number in range(9):
            join(http, f"silent-{number}", 1, [""] * 2).raise_for_status()
    assert [event.session_hash for event in queue.waiting()] == [f"silent-{number}" for number in range(4, 9)]


@pytest.mark.parametrize("content", [b" " * 2_000_000, [b" " * 100_000] * 20])  # the second without a length
def test_an_event_has_at_most_a_megabyte(inside, content):
    with httpx.Client(base_url=inside.url, timeout=30) as http:
        answer = http.post("/gradio_api/queue/join", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        assert http.get("/config").status_code == 200


def test_the_total_queue_is_bounded(inside, monkeypatch):
    monkeypatch.setattr(visitors, "MAX_EVENTS_OF_ALL", 3)
    with httpx.Client(base_url=inside.url, timeout=30) as http:
        answers = [join(http, f"silent-{number}", 1, [""] * 2) for number in range(4)]
    assert [one.status_code for one in answers] == [200, 200, 200, 429]
    assert "try again soon" in answers[-1].json()["detail"]


def test_an_update_waits_until_the_previous_one_is_read():
    async def run():
        box = visitors.Mailbox()
        queue = SimpleNamespace(pending_messages_per_session={"slow": box})
        for message in ("one", "two"):
            box.put_nowait(message)
        waiting = asyncio.create_task(visitors.EventQueue.all_read(queue, "slow"))
        await box.get()
        await asyncio.sleep(0)
        assert not waiting.done()
        await box.get()
        await asyncio.wait_for(waiting, 5)
        assert not box.abandoned(time.monotonic() + visitors.STALLED_S - 1)
        assert box.abandoned(time.monotonic() + visitors.STALLED_S + 1)

    asyncio.run(run())


# The fair limit


async def request(limit, visitor, name, n, order, seconds=0.0):
    VISITOR.set(visitor)
    async with limit.turn(n):
        order.append(name)
        await asyncio.sleep(seconds)


def test_visitors_take_turns_and_none_delays_another():
    async def run():
        limit, order = FairLimit(), []
        tasks = [asyncio.create_task(request(limit, "a", f"a{number}", IN_FLIGHT, order, 0.02)) for number in range(6)]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(request(limit, "b", f"b{number}", 1, order)) for number in range(2)]
        tasks += [asyncio.create_task(request(limit, "c", "c0", 40, order))]
        await asyncio.gather(*tasks)
        assert limit.free == IN_FLIGHT
        assert not limit.waiting
        return order

    order = asyncio.run(run())
    assert order == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4", "a5"]


def test_a_cancelled_request_frees_its_turn():
    async def run():
        limit, order = FairLimit(), []
        first = asyncio.create_task(request(limit, "a", "a", IN_FLIGHT, order, 60))
        await asyncio.sleep(0)
        others = [asyncio.create_task(request(limit, name, name, 16, order)) for name in "bcd"]
        await asyncio.sleep(0)
        others[0].cancel()
        others[2].cancel()
        await asyncio.sleep(0)
        assert list(limit.waiting) == ["c"]
        first.cancel()
        await asyncio.wait_for(others[1], 5)
        assert limit.free == IN_FLIGHT
        # A request whose turn comes at the moment of its cancellation.
        last = asyncio.create_task(request(limit, "e", "e", IN_FLIGHT, order))
        await asyncio.sleep(0)
        last.cancel()
        await asyncio.gather(first, *others, last, return_exceptions=True)
        assert limit.free == IN_FLIGHT
        return order

    assert asyncio.run(run())[:2] == ["a", "c"]


def test_a_stream_takes_its_turn_and_can_be_left_while_it_waits():
    class Never:
        async def stream(self, call):
            raise AssertionError("its turn has not come")
            yield

    async def run():
        limit = FairLimit()
        async with limit.turn(IN_FLIGHT):
            watching = asyncio.create_task(anext(LimitedClient(Never(), limit).stream(calls.generate_events(1))))
            await asyncio.sleep(0.05)
            assert limit.unfinished.total() == 1
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            assert not limit.waiting
            assert not limit.unfinished

    asyncio.run(run())


def test_calls_are_counted_by_their_images():
    assert images_of(calls.interpolate({"class": 1}, {"class": 2}, n=9)) == 9
    assert images_of(calls.interpolate_images(b"", b"", n=9)) == 9
    assert images_of(calls.generate_json("1", n=10**30)) == PER_CLICK
    for other in (calls.encode(b""), calls.generate_json("1", n=-4), calls.generate_json("1", n=2.5)):
        assert images_of(other) == 1


def test_unfinished_images_are_bounded_by_visitor_and_in_total():
    limit = FairLimit()
    with contextlib.ExitStack() as stack:
        for visitor in range(TOTAL // PER_VISITOR):
            VISITOR.set(str(visitor))
            stack.enter_context(limit.counting(PER_VISITOR))
            with pytest.raises(ServerError, match="press Stop"), limit.counting(1):
                pass
        VISITOR.set("another")
        with pytest.raises(ServerError, match="too many visitors"), limit.counting(PER_VISITOR):
            pass
    assert not limit.unfinished
    VISITOR.set("")


def test_a_drawing_that_is_too_large_ends_with_an_error_before_anything_is_sent():
    async def run():
        requests = [DrawRequest("dog", None, PER_CLICK, 4)] * 3
        return [current async for current in draw(LimitedClient(None), requests, FinishedImages(None))]

    (last,) = asyncio.run(run())
    assert not last.running
    assert "at most 320" in last.error
    check_count(10, PER_CLICK // 10)
    with pytest.raises(InputError, match="at most 160 images can be drawn at once, got 16 of each of 1000"):
        check_count(16, 1000)


# Sessions


def test_the_state_of_all_visitors_is_bounded(inside, monkeypatch):
    monkeypatch.setattr(visitors, "MAX_STATE_MB", 1)
    monkeypatch.setattr(visitors, "MAX_SESSIONS", 30)
    sessions = visitors.Sessions()
    sessions.set_blocks(inside.blocks)
    (key,) = [
        block._id for block in inside.blocks.blocks.values() if type(block).__name__ == "State" and block.value == [-1]
    ]
    for number in range(25):
        sessions[f"visitor-{number}"][key] = Drawing([DrawnImage("dog", 4, preview=bytes(60_000))])
    sessions.delete_all_expired_state()
    sizes = {name: session.size for name, session in sessions.session_data.items()}
    assert sum(sizes.values()) <= 1e6
    assert list(sizes) == [f"visitor-{number}" for number in range(9, 25)]  # the latest
    for number in range(1000):
        sessions[f"nobody-{number}"]
    assert len(sessions.session_data) == 30
    assert sum(session.size for session in sessions.session_data.values()) == sum(
        sizes.values()
    )  # nobody lost images because of them
    sessions.time_last_used["visitor-20"] -= timedelta(seconds=visitors.IDLE_S + 1)
    sessions.time_last_used["visitor-21"] -= timedelta(seconds=visitors.CLOSED_S + 1)
    sessions.time_last_used["visitor-22"] = datetime.now() - timedelta(seconds=visitors.CLOSED_S + 1)
    sessions.session_data["visitor-21"].is_closed = True
    sessions.delete_all_expired_state()
    assert {"visitor-20", "visitor-21"}.isdisjoint(sessions.session_data)
    assert "visitor-22" in sessions.session_data  # still open
    assert set(sessions.time_last_used) == set(sessions.session_data)


def test_a_visitor_costs_kilobytes_and_images_outlive_the_session(inside):
    """Whoever names a finished image may see its details, in a new session too; nothing of it is in the session."""

    async def run():
        async with httpx.AsyncClient(base_url=inside.url, timeout=60) as http:
            config = (await http.get("/config")).json()
            board = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "board")
            choose = next(one["id"] for one in config["dependencies"] if [board, "click"] in one["targets"])
            go = await click_of(http, "generate-go")
            (await join(http, "one", go, generate_inputs(1, n=4, steps=2))).raise_for_status()
            (drawn,) = (await outcomes(http, "one", 1)).values()
            session = inside.app.state_holder.session_data["one"]
            assert session.size < 4 * 20_000
            assert not session.config_values  # Gradio keeps boards with their images there
            image = re.search('data-image="([0-9a-f]{32})" data-query="([^"]+)"', str(drawn["output"]["data"]))
            named = {"image": image[1], "query": html.unescape(image[2])}
            texts = []
            for visitor, data in (("one", named), ("two", named), ("two", {"image": image[1][::-1]})):
                (await join(http, visitor, choose, [], event_data=data)).raise_for_status()
                (answer,) = (await outcomes(http, visitor, 1)).values()
                texts.append(str(answer["output"]["data"]))
            return texts

    one, two, unknown = asyncio.run(run())
    assert "Seed" in one
    assert len(one) < 20_000  # neither the board nor the image is sent again
    assert "Seed" in two
    assert "no longer on the server" in unknown


# Values


async def sampling_controls(url):
    """A client, what the page knows of its server, and sampling settings."""
    client = AsyncClient(url)
    info = ServerInfo(LimitedClient(client), FinishedImages(client))
    with gr.Blocks():
        sampling = Sampling.build("test")
    await info.refresh()
    return client, info, sampling


def test_the_menu_has_the_samplers_of_the_model(server_url):
    async def run():
        client, info, sampling = await sampling_controls(server_url)
        without = sampling.fitted(info)[sampling.sampler]
        model = {**info.model, "samplers": list(SAMPLER_NAMES)}
        info.facts[""] = ModelFacts(model={**model, "defaults": {**model["defaults"], "sampler": "flow_map"}})
        await client.close()
        return without, sampling.fitted(info)[sampling.sampler]

    without, with_flow_map = asyncio.run(run())
    assert without["choices"] == ["euler", "heun", "dpmpp_2m"]
    assert (with_flow_map["choices"][-1], with_flow_map["value"]) == ("flow_map", "flow_map")


def test_the_controls_have_the_interval_of_guidance_that_the_model_recommends(server_url):
    async def run():
        client, info, sampling = await sampling_controls(server_url)
        recommended = {"guidance_start": 0.25, "guidance_stop": 0.8}
        info.facts[""] = ModelFacts(model={**info.model, "defaults": {**info.model["defaults"], **recommended}})
        await client.close()
        shown = {name: sampling.fitted(info)[getattr(sampling, name)]["value"] for name in vars(sampling)}
        return shown, sampling_of(info, *shown.values()), sampling_of(info, *{**shown, "guidance_stop": 1}.values())

    shown, untouched, changed = asyncio.run(run())
    assert (shown["guidance_start"], shown["guidance_stop"]) == (0.25, 0.8)
    assert "guidance_start" not in untouched and "guidance_stop" not in untouched, "the server uses the model's"
    assert (changed["guidance_start"], changed["guidance_stop"]) == (0.25, 1)


def test_a_sample_of_one_step_is_shown_from_noise_to_image(server_url):
    async def run():
        client = AsyncClient(server_url)
        info = ServerInfo(LimitedClient(client), FinishedImages(client))
        with gr.Blocks():
            way, message, stop = gr.HTML(), gr.HTML(), Stop(gr.Button())
        await info.refresh()
        shown = [update[way] async for update in watching(info, way, message, stop)(207, 1, 0, 1) if way in update]
        await client.close()
        return shown

    shown = asyncio.run(run())
    assert len(shown) == 2
    assert [shown[-1].count(f">{words}<") for words in ("noise", "image")] == [1, 1]


@pytest.mark.parametrize("value", [None, "7", True, 2.5, -1, 2**53, 1e308, float("nan"), float("inf"), [7], 10**400])
def test_an_invalid_number_is_quoted_in_the_error(value):
    with pytest.raises(InputError, match=r"seed must be a whole number from 0 to 9007199254740991, got .{1,90}$"):
        whole("seed", value)


def test_a_pressed_button_must_have_a_valid_number():
    import gradio as gr

    assert number_of(SimpleNamespace(_data={"value": 3}), range(4)) == 3
    for data in PRESSED:
        with pytest.raises(gr.Error) as raised:
            number_of(SimpleNamespace(_data=data), range(0))
        assert not raised.value.print_exception


# Thumbnails


class Drawer:
    """A client of a server that has 20 classes."""

    def __init__(self):
        self.fingerprint, self.drawn, self.free = "a", [], asyncio.Event()

    async def do(self, call):
        if call.path == "/model":
            return {"fingerprint": self.fingerprint, "num_classes": 20}
        await self.free.wait()
        self.drawn.append(call.arguments["json"]["class"])
        png = write_image(np.zeros((3, 8, 8), np.uint8))
        return {"fingerprint": self.fingerprint, "images": [{"base64": b64encode(png).decode()}]}


def test_thumbnails_are_drawn_once_bounded_and_of_the_current_model(monkeypatch):
    monkeypatch.setattr("ui.app.FRESH_S", 0.0)
    monkeypatch.setattr("ui.app.MAX_CACHED", 10)

    async def run():
        client = Drawer()
        thumbnails = Thumbnails(client)
        for wrong in (-1, 20, 10**30):
            with pytest.raises(ServerError, match="class must be from 0 to 19") as raised:
                await thumbnails.of(wrong)
            assert raised.value.status == 404
        tasks = [asyncio.create_task(thumbnails.of(number % 20)) for number in range(MAX_WAITING + 5)]
        await asyncio.sleep(0.1)
        assert sum(task.done() for task in tasks) == 5
        client.free.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum("too many" in str(answer) for answer in answers if isinstance(answer, ServerError)) == 5
        assert len(thumbnails.cache) == 10
        client.drawn.clear()
        _, last = next(reversed(thumbnails.cache))
        await thumbnails.of(last)
        assert not client.drawn
        client.fingerprint = "b"
        await thumbnails.of(last)
        assert client.drawn == [last]
        assert next(reversed(thumbnails.cache)) == ("b", last) and len(thumbnails.cache) == 10

    asyncio.run(run())


def test_a_thumbnail_of_an_unknown_class_is_not_found(page):
    for index, status in ((5, 503), (99_999, 404), (-1, 404), (10**30, 404)):  # 5 is a class, but not trained on
        assert httpx.get(f"{page.url}/studio/class/{index}.png").status_code == status, index
