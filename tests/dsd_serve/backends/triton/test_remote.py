"""A KServe server that gives wrong answers, breaks off and vanishes: every job ends once, with a result or an error."""

import asyncio
import contextlib
import itertools
import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent import futures

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsd_serve.backends import ModelInfo, Observer
from dsd_serve.backends.task_messages import from_wire
from dsd_serve.backends.triton import connection
from dsd_serve.backends.triton import remote as remote_
from dsd_serve.backends.triton.addresses import channel_options, is_local, proxy_of
from dsd_serve.backends.triton.remote import TritonBackend
from dsd_serve.backends.triton.results import WrongAnswer, read_description
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.engines.selftest import BatchInvariance
from dsd_serve.errors import CancelledError, ClosedError, DSDError, EngineError, InputError, QueueFullError
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Generate
from dsd_serve.rows import Encode
from tests.support.data import ROOT
from tests.support.servers import until

grpc = pytest.importorskip("grpc", reason="the extra triton is not installed")
pytest.importorskip("tritonclient.grpc", reason="the extra triton is not installed")
from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: E402

KINDS = {"uint8": "UINT8", "int64": "INT64", "float32": "FP32", "float64": "FP64"}
DRAW = Generate(1, SamplingParams(num_steps=2))


def response(tensors):
    """A response of (name, type, shape, bytes) each."""
    answer = service_pb2.ModelInferResponse(model_name="dsd")
    for name, kind, shape, data in tensors:
        answer.outputs.add(name=name, datatype=kind, shape=shape)
        if data is not None:
            answer.raw_output_contents.append(data)
    return service_pb2.ModelStreamInferResponse(infer_response=answer)


def arrays(**named):
    return [(name, KINDS[array.dtype.name], array.shape, array.tobytes()) for name, array in named.items()]


class Liar(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Sends `description` to `describe`, in turn if it is a list, and `answers` to every other request: lists of
    tensors, texts of errors, and at the end perhaps a status to break off with. `turns` replaces `answers` for the next
    requests."""

    def __init__(self, description):
        self.honest, self.description, self.answers = description, description, []
        self.turns, self.asked, self.described = [], 0, itertools.count()

    def ModelStreamInfer(self, requests, context):
        for request in requests:
            if request.parameters["operation"].string_param == "describe":
                told = self.description
                told = told[next(self.described) % len(told)] if isinstance(told, list) else told
                if isinstance(told, str):
                    yield service_pb2.ModelStreamInferResponse(error_message=told)
                    continue
                text = told if isinstance(told, bytes) else json.dumps(told).encode()
                yield response([("text", "UINT8", (len(text),), text)])
                continue
            self.asked += 1
            for answer in self.turns.pop(0) if self.turns else self.answers:
                if isinstance(answer, grpc.StatusCode):
                    context.abort(answer, "broken off")
                elif isinstance(answer, str):
                    yield service_pb2.ModelStreamInferResponse(error_message=answer)
                else:
                    yield response(answer)


class Count(Observer):
    """Counts the outcomes of jobs, and records the least number under way."""

    def __init__(self):
        self.outcomes, self.least, self.batcher = Counter(), 0, None

    def finished(self, outcome):
        self.outcomes[outcome] += 1
        self.least = min(self.least, self.batcher.num_under_way)


@pytest.fixture(scope="module")
def config(demo_dir):
    return read_model_dir(demo_dir).config


@pytest.fixture(scope="module")
def liar(demo_dir, config):
    directory = read_model_dir(demo_dir)
    about = ModelInfo(
        "demo", config, directory.defaults, "0" * 64, {"engine": "onnx"}, BatchInvariance(4, 0, 0.0), 8, "card", 1
    )
    liar = Liar(
        {"about": about.to_dict(), "not_ready": None, "running": 0, "waiting": 0, "seconds_ahead": 0.0, "instance": "x"}
    )
    server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.max_send_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(liar, server)
    liar.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield liar
    server.stop(0)


@pytest.fixture
def remote(liar):
    """A TritonBackend for the liar, which is honest at first, and its Count."""
    liar.description, liar.answers, liar.turns, liar.asked = liar.honest, [], [], 0
    count = Count()
    batcher = count.batcher = TritonBackend([liar.address], observer=count)
    batcher.wait(10)
    yield batcher, count
    assert batcher.close(5)
    assert batcher.num_under_way == 0 == count.least and not batcher.jobs


def good(config):
    return arrays(image=np.zeros((1, *config.pixel_shape), np.uint8), seconds=np.array([0.1, 0.2]))


def outcome(batcher, task=DRAW, **more):
    until(lambda: batcher.ready, 10)
    (job,) = batcher.submit_tasks([task], timeout=30, **more)
    return job.future.exception(10) or job.future.result()


def test_a_valid_answer_is_accepted(remote, liar, config):
    batcher, count = remote
    liar.answers = [good(config)]
    assert outcome(batcher).shape == config.pixel_shape
    assert count.outcomes == {"done": 1}


@pytest.mark.parametrize(
    ("answers", "kind", "words"),
    [
        (lambda c: [], EngineError, "it ends before the result"),
        (lambda c: [[]], EngineError, r"the tensors \[\], not image, seconds"),
        (lambda c: [good(c), good(c)], EngineError, "a response follows the result"),
        (lambda c: [good(c)[:1]], EngineError, "the tensors"),
        (lambda c: [[*good(c), *good(c)]], EngineError, "two tensors have the same name"),
        (
            lambda c: [arrays(image=np.zeros((2, *c.pixel_shape), np.uint8), seconds=np.ones(2))],
            EngineError,
            "image is",
        ),
        (lambda c: [arrays(image=np.zeros((1, 3, 8, 8), np.uint8), seconds=np.ones(2))], EngineError, "image is uint8"),
        (lambda c: [arrays(image=np.zeros((1, *c.pixel_shape), np.int64), seconds=np.ones(2))], EngineError, "int64"),
        (lambda c: [[*good(c)[:1], *arrays(seconds=np.array([np.nan, 1.0]))]], EngineError, "seconds of nan and 1"),
        (lambda c: [[*good(c)[:1], *arrays(seconds=np.array([0.0, -1.0]))]], EngineError, "seconds of 0 and -1"),
        (lambda c: [[*good(c)[:1], *arrays(seconds=np.array([0.0, 1e300]))]], EngineError, "seconds of"),
        (lambda c: [[*good(c)[:1], *arrays(seconds=np.ones(3))]], EngineError, "seconds is float64"),
        (lambda c: [[("image", "UINT8", (1, 3, 2**40, 2**40), b"x")]], EngineError, "a tensor cannot be read"),
        (lambda c: [[("image", "BYTES", (1,), b"\xff\xff\xff\xff")]], EngineError, "invalid answer"),
        (lambda c: [[("image", "FP99", (1,), b"x")]], EngineError, "invalid answer"),
        (lambda c: [[("image", "UINT8", (3,), None)]], EngineError, "a tensor cannot be read"),
        (
            lambda c: [arrays(preview=np.zeros(c.pixel_shape, np.uint8), step=np.array([1])), good(c)],
            EngineError,
            "step 1",
        ),
        (lambda c: [arrays(image=np.zeros(70_000_000, np.uint8))], ClosedError, "larger than max"),
        (lambda c: ["QueueFullError(2.500): too much; wait"], QueueFullError, "too much; wait"),
        (lambda c: ["InputError: no such class"], InputError, "no such class"),
        (lambda c: ["Stub process is not healthy\nat all"], ClosedError, "answers: Stub process is not healthy at all"),
        (lambda c: ["SystemExit: 1"], ClosedError, "answers: SystemExit"),
        (lambda c: [grpc.StatusCode.INTERNAL], ClosedError, "broken off"),
        (lambda c: [grpc.StatusCode.UNAVAILABLE], ClosedError, "broken off"),
        (lambda c: [grpc.StatusCode.CANCELLED], ClosedError, "send the request again"),
    ],
)
def test_a_wrong_answer_gets_a_sentence_and_ends_the_job_once(remote, liar, config, answers, kind, words):
    batcher, count = remote
    liar.answers = answers(config)
    with pytest.raises(kind, match=words) as error:
        raise outcome(batcher)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    assert sum(count.outcomes.values()) == 1 and not count.outcomes["done"]
    liar.answers = [good(config)]
    assert outcome(batcher).dtype == np.uint8, "it serves on"


def test_non_finite_latents_are_rejected_as_by_the_batcher(remote, liar, config):
    batcher, _ = remote
    latents = np.zeros((1, *config.latent_shape), np.float32)
    encode = Encode(np.zeros(config.pixel_shape, np.uint8))
    liar.answers = [arrays(latents=latents, seconds=np.ones(2))]
    assert outcome(batcher, encode).shape == config.latent_shape
    for value in (np.nan, np.inf):
        latents[0, 0, 0] = value
        liar.answers = [arrays(latents=latents, seconds=np.ones(2))]
        with pytest.raises(EngineError, match="not finite"):
            raise outcome(batcher, encode)
        with pytest.raises(InputError, match="the input latents must be finite numbers"):
            from_wire({"latents": latents}, {"operation": "decode"}, config, SamplingParams())


def test_preview_steps_are_checked(remote, liar, config):
    batcher, _ = remote
    seen = []
    task = Generate(1, SamplingParams(num_steps=3, preview_every=1))
    pixels = np.zeros(config.pixel_shape, np.uint8)
    one, two = (arrays(preview=pixels, step=np.array([step])) for step in (1, 2))
    liar.answers = [one, two, good(config)]
    outcome(batcher, task, on_preview=lambda number, step, _: seen.append((number, step)))
    assert seen == [(0, 1), (0, 2)]
    for answers in ([one, one], [two, one], [arrays(preview=pixels, step=np.array([4]))], [one, two] * 9):
        liar.answers = [*answers, good(config)]
        with pytest.raises(EngineError, match="a preview of step"):
            raise outcome(batcher, task)


tensor = st.tuples(
    st.sampled_from(["image", "latents", "seconds", "preview", "step", "text", "x", ""]),
    st.sampled_from(["UINT8", "FP32", "FP64", "INT64", "BOOL", "BYTES", "FP16", "BF16", "", "int"]),
    st.lists(st.sampled_from([-1, 0, 1, 2, 3, 16, 32, 2**40]), max_size=5),
    st.none() | st.binary(max_size=64) | st.just(bytes(3 * 32 * 32)),
)
answer = (
    st.lists(tensor, max_size=4)
    | st.text(min_size=1, max_size=60)
    | st.sampled_from(["EngineError: x", "QueueFullError(1e): x", "DSDError: ", "Exception: x", "ServerError: x"])
    | st.sampled_from([grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(answer, max_size=3), count=st.integers(1, 4), cancel=st.booleans())
def test_any_answer(remote, liar, config, caplog, answers, count, cancel):
    batcher, seen = remote
    caplog.set_level(logging.INFO)
    liar.answers = [good(config) if item == [] else item for item in answers]
    until(lambda: batcher.ready, 10)
    before = sum(seen.outcomes.values())
    jobs = batcher.submit_tasks([DRAW] * count, timeout=30)
    if cancel:
        jobs[0].cancel()
    for job in jobs:
        error = job.future.exception(10)
        assert isinstance(error, DSDError) or job.future.result().shape == config.pixel_shape
        assert error is None or "\n" not in str(error)
    until(lambda: batcher.num_under_way == 0)
    assert sum(seen.outcomes.values()) == before + count
    assert "unexpected state" not in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "lie",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 10_000,
        b"[]",
        b"null",
        {"about": None},
        {"about": 5},
        {"about": []},
        {"running": -1},
        {"running": 1.5},
        {"running": True},
        {"waiting": 10**30},
        {"waiting": None},
        {"seconds_ahead": math.nan},
        {"seconds_ahead": math.inf},
        {"seconds_ahead": -1},
        {"seconds_ahead": "soon"},
        {"not_ready": ["x" * 10_000]},
        *({"about": {name: None}} for name in ("name", "config", "fingerprint", "described", "invariance", "budget")),
        *({"about": {"budget": value}} for value in (0, -1, "8", 10**30, True)),
        {"about": {"described": {"engine": 5}}},
        {"about": {"config": {"image_size": 10**9}}},
        {"about": {"card": 5}},
        {"about": {"created": -1}},
        {"about": {"more": 1}},
    ],
)
def test_a_server_with_an_invalid_description_is_left_out_until_it_is_valid(remote, liar, config, lie):
    batcher, _ = remote
    if isinstance(lie, dict):
        about = lie.get("about", {})
        merged = {**liar.honest["about"], **about} if isinstance(about, dict) else about
        lie = {**liar.honest, **lie, "about": merged}
    liar.description = lie
    batcher.wake(batcher.servers[0].check_now.set)
    until(lambda: not batcher.ready, 10)
    assert len(batcher.not_ready) < 500 and "\n" not in batcher.not_ready
    assert (batcher.num_running, batcher.num_waiting, batcher.seconds_ahead()) == (0, 0, 0.0)
    with pytest.raises(ClosedError, match="no Triton server is ready"):
        batcher.submit_tasks([DRAW])
    liar.description, liar.answers = liar.honest, [good(config)]
    assert outcome(batcher).shape == config.pixel_shape


def instance(liar, name, **changes):
    return {**liar.honest, "instance": name, **changes}


def known(batcher):
    """The reasons of the instances that are known, by their names."""
    (server,) = batcher.servers
    batcher.wake(server.check_now.set)
    return {name: one.not_ready for name, one in server.instances.items()}


DEAD = "Stub process 'b' is not healthy."


@pytest.mark.parametrize("how", ["says so", "its process is dead"])
def test_a_server_is_lost_only_when_all_its_instances_are(remote, liar, config, how, caplog):
    batcher, _ = remote
    a, b = instance(liar, "a", running=1), instance(liar, "b", running=2, budget=16)
    liar.description = [a, b]
    until(lambda: known(batcher).keys() >= {"a", "b"})
    (server,) = batcher.servers
    server.instances.pop("x")  # of the description before
    assert (batcher.num_running, batcher.budget) == (3, 16)
    gate = futures.Future()
    liar.answers = waiting_for(gate, good(config))
    (job,) = batcher.submit_tasks([DRAW])
    until(lambda: liar.asked)
    gone = {**b, "not_ready": "its GPU fell off the bus"} if how == "says so" else DEAD
    liar.description = [a, gone]
    until(lambda: known(batcher)["b"] is not None)
    for _ in range(8):
        before = next(liar.described)
        batcher.wake(server.check_now.set)
        until(lambda before=before: next(liar.described) > before + 2)
        assert batcher.ready
    assert (batcher.num_running, batcher.budget) == (1, 8)
    shown = batcher.snapshot()["servers"][0]["instances"]
    assert shown["a"]["not_ready"] is None and ("GPU" in shown["b"]["not_ready"] or DEAD in shown["b"]["not_ready"])
    assert caplog.text.count("its instance b does no work") == 1
    assert not job.future.done(), "the other instance goes on"
    gate.set_result(None)
    assert job.future.result(10).shape == config.pixel_shape
    gate = futures.Future()
    liar.answers = waiting_for(gate, good(config))
    (job,) = batcher.submit_tasks([DRAW])
    until(lambda: liar.asked == 2)
    liar.description = [{**a, "not_ready": "its GPU has gone too"}, gone]
    until(lambda: known(batcher)["a"] is not None)
    assert not batcher.ready and len(batcher.not_ready) < 500
    assert isinstance(job.future.exception(10), ClosedError)
    gate.set_result(None)
    liar.description, liar.answers = [a, b], [good(config)]
    assert outcome(batcher).shape == config.pixel_shape


def waiting_for(gate, answer):
    """Answers of which the first comes once the gate is open."""
    gate.result(20)
    yield answer


def test_a_task_that_an_instance_refuses_goes_to_another_and_one_that_was_begun_does_not(
    remote, liar, config, monkeypatch
):
    batcher, count = remote
    liar.description = [instance(liar, "a"), instance(liar, "b")]
    until(lambda: known(batcher).keys() >= {"a", "b"})
    batcher.servers[0].instances.pop("x")
    liar.answers = [good(config)]
    refused = ["NotReadyError: the engine process is starting"]
    liar.turns = [refused]
    assert outcome(batcher).shape == config.pixel_shape
    assert liar.asked == 2
    liar.turns = [refused] * 5
    assert outcome(batcher).shape == config.pixel_shape
    assert liar.asked == 8, "Triton may choose the same instance several times"
    monkeypatch.setattr(remote_, "REFUSED_FOR", 0.2)
    liar.turns = [refused] * 1000
    with pytest.raises(ClosedError, match="the engine process is starting"):
        raise outcome(batcher)
    assert 10 <= liar.asked < 30
    liar.turns = []
    for failure in ("ClosedError: the engine process was ended by SIGSEGV; send the request again", DEAD):
        asked = liar.asked
        liar.turns = [[failure]]
        with pytest.raises(ClosedError, match="send the request again"):
            raise outcome(batcher)
        assert liar.asked == asked + 1, "it may have died of the task"
    liar.description = [instance(liar, "a"), DEAD]
    until(lambda: known(batcher)["b"] is not None)
    liar.turns = [[DEAD]]
    assert outcome(batcher).shape == config.pixel_shape, "it was dead before"
    assert count.outcomes == {"done": 3, "failed": 3}


def test_an_instance_of_which_nothing_is_heard_is_forgotten(remote, liar, monkeypatch):
    batcher, _ = remote
    monkeypatch.setattr(connection, "FORGET_AFTER", 0.5)
    liar.description = [instance(liar, "a"), instance(liar, "b")]
    until(lambda: known(batcher).keys() >= {"a", "b"})
    liar.description = instance(liar, "a")
    until(lambda: known(batcher).keys() == {"a"})


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(10**400)
    | st.just("x" * 2000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def paths(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*path, key))


def replaced(value, path, new):
    return {**value, path[0]: replaced(value[path[0]], path[1:], new)} if path else new


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_description(liar, data):
    """It is read completely, or refused with a sentence; what is read serves a front."""
    told = liar.honest
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(paths(told) if isinstance(told, dict) else [()])))
        told = replaced(told, path, data.draw(anything))
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    try:
        description = read_description({"text": text})
    except WrongAnswer as error:
        assert len(str(error)) < 300 and "\n" not in str(error)
        return
    info = description.info
    json.dumps(info.to_dict(), allow_nan=False)
    info.table.prepare()
    info.settings_of(info.find_class(None, optional=True), info.defaults)
    assert str(info.invariance) and all(isinstance(word, str) for item in info.described.items() for word in item)
    assert 1 <= description.budget < 1e9 and 0 <= description.running < 1e9 and 0 <= description.waiting < 1e9
    assert 0 <= description.seconds_ahead < 1e9 and isinstance(description.not_ready, str | None)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_description_ends_the_watch(remote, liar, config, data):
    batcher, _ = remote
    told = [
        replaced(liar.honest, data.draw(st.sampled_from(list(paths(liar.honest)))), data.draw(anything))
        for _ in range(3)
    ]
    liar.description = [one if isinstance(one, dict | str) and one else b"" for one in told]
    before = next(liar.described)
    batcher.wake(batcher.servers[0].check_now.set)
    until(lambda: next(liar.described) > before + 3, 10)
    liar.description, liar.answers = liar.honest, [good(config)]
    until(lambda: batcher.ready or not batcher.wake(batcher.servers[0].check_now.set), 10)
    assert not any(watcher.done() for watcher in batcher.watchers)
    assert outcome(batcher).shape == config.pixel_shape


def test_a_broken_stream_ends_only_its_own_job(remote, liar, config):
    """A request that fails in Triton must not end concurrent ones."""
    batcher, _ = remote
    gate = futures.Future()

    def slow():
        yield arrays(preview=np.zeros(config.pixel_shape, np.uint8), step=np.array([1]))
        gate.result(20)
        yield good(config)

    liar.answers = slow()
    previews = []
    task = Generate(1, SamplingParams(num_steps=2, preview_every=1))
    (first,) = batcher.submit_tasks([task], on_preview=lambda *preview: previews.append(preview))
    until(lambda: previews)
    liar.answers = ["out of memory"]
    with pytest.raises(ClosedError, match="out of memory"):
        raise outcome(batcher)
    gate.set_result(None)
    assert first.future.result(10).shape == config.pixel_shape


def test_close_ends_although_a_health_check_is_answered_at_that_moment(remote):
    batcher, _ = remote
    (server,) = batcher.servers

    async def answer_and_cancel():
        answer = asyncio.get_running_loop().create_future()

        async def describe():
            server.check_now.clear()
            return await answer

        server.describe = describe
        server.check_now.set()
        await asyncio.sleep(0.05)
        answer.set_result(server.instances["x"])
        for watcher in batcher.watchers:
            watcher.cancel()
        _, left = await asyncio.wait(batcher.watchers, timeout=2)
        return left

    assert not asyncio.run_coroutine_threadsafe(answer_and_cancel(), batcher.loop).result(10)


def test_jobs_submitted_during_close_end_too(liar, config):
    liar.description, liar.answers = liar.honest, [good(config)]
    batcher = TritonBackend([liar.address])
    batcher.wait(10)
    with futures.ThreadPoolExecutor(1) as pool:
        jobs = []

        def send():
            with contextlib.suppress(ClosedError):
                while True:
                    jobs.extend(batcher.submit_tasks([DRAW]))
                    time.sleep(0.001)

        sending = pool.submit(send)
        until(lambda: len(jobs) > 20)
        batcher.close(0)
        sending.result(10)
        for job in jobs:
            assert isinstance(job.future.exception(10), ClosedError | CancelledError | None)
    batcher.closed = False  # as if they were submitted a moment before
    (late,) = batcher.submit_tasks([DRAW])
    assert isinstance(late.future.exception(1), ClosedError)
    assert batcher.num_under_way == 0


# Proxies.


@pytest.mark.parametrize(
    ("address", "local"),
    [
        *((address, True) for address in ("localhost:1", "LOCALHOST:1", "a.localhost:1", "127.0.0.1:1", "127.9.9.9:1")),
        *((address, True) for address in ("[::1]:1", "[::1%lo]:1", "[::ffff:127.0.0.1]:1", "0.0.0.0:1", "[::]:1")),
        *((address, True) for address in ("localhost.:1", f"{socket.gethostname()}:1")),
        *((address, False) for address in ("triton:1", "10.0.0.1:1", "127.evil.example:1", "localhost.evil.example:1")),
    ],
)
def test_this_machine_is_never_reached_through_a_proxy(monkeypatch, address, local):
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert is_local(address) == local
    assert (("grpc.enable_http_proxy", 0) in channel_options(address)) == local
    assert proxy_of(address) == (None if local else "http_proxy")
    monkeypatch.setenv("no_proxy", "triton,10.0.0.1,example")
    assert proxy_of(address) is None


def test_only_a_local_triton_bypasses_the_proxy(liar):
    """In a separate process, because gRPC reads the variables once."""
    liar.description = liar.honest
    code = (
        "import sys; from dsd_serve.backends.triton.remote import TritonBackend\n"
        "local = TritonBackend([sys.argv[1]]); local.wait(20); local.close(1)\n"
        "other = TritonBackend(['triton.invalid:8001'])\n"
        "import time\n"
        "end = time.monotonic() + 20\n"
        "while 'does not answer' not in str(other.not_ready) and time.monotonic() < end: time.sleep(0.1)\n"
        "print(other.not_ready); other.close(1)"
    )
    environment = {**os.environ, "http_proxy": "http://user:secret@127.0.0.1:1", "no_proxy": ""}
    command = [sys.executable, "-c", code, liar.address]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "it is reached through the proxy of http_proxy; exceptions belong in no_proxy" in done.stdout
    assert "secret" not in done.stdout
