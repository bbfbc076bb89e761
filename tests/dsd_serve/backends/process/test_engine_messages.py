import contextlib
import logging

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd_serve import errors
from dsd_serve.backends.process import engine_messages as messages
from dsd_serve.backends.process.engine_messages import BrokenMessage, from_frames, head_of, to_frames

MESSAGES = [
    (messages.Submit([messages.TaskMessage(3, float("inf"), True, {"seed": 2**63 - 1, "strength": 0.1}, {})]), []),
    (messages.Cancel(3), []),
    (messages.Stop(), []),
]


def test_bundles_arrive_as_they_were_sent():
    arrays = [
        np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)[:, ::2],  # not contiguous
        np.array([0.1 + 0.2]),
        np.array([[True, False]]),
        np.zeros((0, 3), np.uint8),
        np.array([-(2**62)]),
    ]
    task = messages.TaskMessage(1, 7.25, False, {}, {f"a{i}": head_of(array) for i, array in enumerate(arrays)})
    sent = [*MESSAGES, (messages.Submit([task, task]), arrays * 2), *MESSAGES]
    received = from_frames(to_frames(sent), messages.from_server)
    assert [message for message, _ in received] == [message for message, _ in sent]
    for expected, found in zip(arrays * 2, received[3][1], strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert np.array_equal(found, expected)
        assert found.flags.writeable


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([b""], "truncated"),
        ([b"\xc1"], "invalid"),
        ([msgspec.msgpack.encode([["Stop"], ["Nothing"]])], "Invalid value 'Nothing'"),
        ([msgspec.msgpack.encode([["Cancel", "x"]])], "Expected `int`, got `str`"),
        ([msgspec.msgpack.encode([["Cancel", b"\xff"]])], "Expected `int`, got `bytes`"),
        ([msgspec.msgpack.encode([["Stop"]]), b"abc"], "it has 1 arrays, not 0"),
        (
            [msgspec.msgpack.encode([["Submit", [[1, 0.0, False, {}, {"a": ["uint8", [3]]}]]]])],
            "it has 0 arrays, not 1",
        ),
        (
            [msgspec.msgpack.encode([["Submit", [[1, 0.0, False, {}, {"a": ["uint8", [2, 2]]}]]]]), b"abc"],
            r"an array uint8 \[2, 2\] in 3 bytes",
        ),
        (
            [msgspec.msgpack.encode([["Submit", [[1, 0.0, False, {}, {"a": ["uint8", [-1, -3]]}]]]]), b"abc"],
            r"an array uint8 \[-1, -3\] in 3 bytes",
        ),
        (
            [msgspec.msgpack.encode([["Submit", [[1, 0.0, False, {}, {"a": ["object", [1]]}]]]]), b"abcdefgh"],
            "Invalid enum value 'object'",
        ),
    ],
)
def test_what_cannot_be_read(frames, words):
    with pytest.raises(BrokenMessage, match=f"(?i){words}"):
        from_frames(frames, messages.from_server)


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=3))
def test_arbitrary_bytes_are_read_or_refused(frames):
    for decoder in (messages.from_server, messages.from_engine):
        try:
            for _, arrays in from_frames(frames, decoder):
                assert len(arrays) < 3
        except BrokenMessage:
            pass


plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9)
nested = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner))
names = st.sampled_from(["Finished", "Failed", "Ready", "Status", "Tick", "Started", "LogLine", "Dead", "PreviewMade"])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(names, st.lists(nested, max_size=6)), max_size=3), st.lists(st.binary(max_size=16), max_size=2)
)
def test_arbitrary_values_are_read_or_refused(made, arrays):
    frames = [msgspec.msgpack.encode([[name, *values] for name, values in made]), *arrays]
    with contextlib.suppress(BrokenMessage):
        from_frames(frames, messages.from_engine)


@pytest.mark.parametrize(
    "error",
    [
        errors.InputError("steps must be small, got 7", "steps"),
        errors.InputError("no parameter"),
        errors.QueueFullError("full", 2.25),
        *(kind("a sentence: ü") for kind in (errors.DeadlineError, errors.ClosedError, errors.CancelledError)),
        *(kind("a sentence") for kind in (errors.EngineError, errors.CheckpointError, errors.EngineUnavailableError)),
    ],
)
def test_errors_keep_their_kind_and_fields(error):
    found = messages.error_of(messages.failure_of(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_a_bug_shows_no_details():
    found = messages.error_of(messages.failure_of(ZeroDivisionError("a detail")))
    assert (type(found), str(found)) == (errors.EngineError, "internal error; see the server log")


@pytest.mark.parametrize("kind", ["ServerError", "Shown", "shown", "Any", "nothing", "__name__", ""])
def test_an_unknown_kind_of_error_is_one_of_the_engine(kind):
    found = messages.error_of(messages.Failure(kind, "a sentence"))
    assert (type(found), str(found)) == (errors.EngineError, "a sentence")


def test_lines_of_the_log(caplog):
    logger = logging.getLogger("dsd_serve.test")
    try:
        raise ValueError("wrong")
    except ValueError as error:
        record = logger.makeRecord("dsd_serve.test", 40, "f", 1, "%d %s", (7, "x" * 5000), (ValueError, error, None))
    messages.write_line(messages.line_of(record))
    (found,) = caplog.records
    assert (found.name, found.levelname, found.created) == ("dsd_serve.test", "ERROR", record.created)
    assert found.getMessage().startswith("7 xxx") and len(found.getMessage()) == messages.MAX_TEXT
    assert "ValueError: wrong" in found.exc_text
