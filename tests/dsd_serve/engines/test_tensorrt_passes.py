"""Passes of the TensorRT engine on a simulated GPU: two under way, their order and failures, and graphs of ticks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsd_serve.backends.batcher import Batcher
from dsd_serve.engines import cuda_graphs, load_engine
from dsd_serve.engines.selftest import mixture
from dsd_serve.errors import EngineDeadError, EngineError, InputError
from dsd_serve.params import SAMPLER_NAMES, SamplingParams
from dsd_serve.programs import Generate, Reconstruct, run
from dsd_serve.rows import DeviceEngine, RowCounts
from tests.support.gpu_double import Context, Status

ALL_GRAPHS = (
    "encode 1, 2, 4, 8; denoise 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64; decode 1, 2, 4, 8"  # of /model
)


def same(ours, theirs):
    return len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def rows_of(engine, *counts, seed=0):
    return mixture(engine.config, counts, seed)


def calls_of(cuda, act):
    """The calls of the network that `act` makes: (in a graph, rows of each kind)."""
    before = len(cuda.calls)
    act()
    return cuda.calls[before:]


def test_only_engines_on_devices_start_passes(engine, tiny_dir):
    assert isinstance(engine, DeviceEngine)
    pytest.importorskip("torch")
    for name in ("onnx", "torch"):
        assert not isinstance(load_engine(name, tiny_dir), DeviceEngine)


@pytest.mark.parametrize("graphs", [True, False])
def test_two_passes_under_way_give_the_outputs_of_each_alone(engine, cuda, graphs):
    """The simulated device copies nothing before it is waited for, and finds memory that was overwritten before."""
    if not graphs:
        engine.graphs.captured.clear()
    counts = [(0, 5, 0), (2, 3, 1), (0, 64, 0), (0, 1, 4), (0, 7, 0), (1, 0, 0)]
    ticks = [rows_of(engine, *count, seed=seed) for seed, count in enumerate(counts)]
    alone = [engine.run(rows) for rows in ticks]
    allocated = cuda.num_allocations
    waits = [engine.start(ticks[0])]
    for number, rows in enumerate(ticks[1:]):
        waits.append(engine.start(rows))
        assert same(waits.pop(0)(), alone[number])
        assert cuda.queue, "only the first was waited for"
    assert same(waits.pop()(), alone[-1])
    assert cuda.num_allocations == allocated, "a tick allocates nothing"


def test_the_device_runs_passes_in_their_order(engine, cuda):
    def act():
        first, second = engine.start(rows_of(engine, 0, 3, 1)), engine.start(rows_of(engine, 1, 1, 0))
        first()
        second()

    assert calls_of(cuda, act) == [(True, rows) for rows in ((0, 3, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0))]


def test_a_third_pass_is_rejected_and_the_others_go_on(engine):
    ticks = [rows_of(engine, 0, 3, 0, seed=seed) for seed in range(3)]
    alone = [engine.run(rows) for rows in ticks]
    first, second = engine.start(ticks[0]), engine.start(ticks[1])
    with pytest.raises(EngineError, match="2 passes are under way; wait for the first of them"):
        engine.start(ticks[2])
    assert same(first(), alone[0])
    assert same(second(), alone[1])
    assert same(engine.run(ticks[2]), alone[2])


@pytest.mark.parametrize("counts", [(0, 130, 0), (70, 65, 129), (0, 0, 0)], ids=str)
def test_more_rows_than_the_plan_takes_while_another_pass_is_under_way(engine, counts):
    few, many = rows_of(engine, 0, 3, 1), rows_of(engine, *counts, seed=1)
    expected = engine.run(few), engine.run(many)
    first, second = engine.start(few), engine.start(many)
    assert same(first(), expected[0])
    third = engine.start(few)
    assert same(second(), expected[1])
    assert same(third(), expected[0])


FAILING = ["cudaMemcpyAsync", "cudaGraphLaunch", "cudaEventRecord"]


@pytest.mark.parametrize("name", [*FAILING, "execute_async_v3", "set_input_shape"])
def test_a_pass_that_cannot_start_leaves_its_memory_to_the_next(engine, cuda, monkeypatch, name):
    rows, others = rows_of(engine, 0, 3, 0, seed=1), rows_of(engine, 0, 4, 0, seed=2)
    expected, expected_others = engine.run(rows), engine.run(others)
    if name not in FAILING:
        engine.graphs.captured.clear()
    under_way = engine.start(others)
    with monkeypatch.context() as broken:
        if name in FAILING:
            broken.setattr(cuda, name, lambda *_: (Status.cudaErrorInvalidValue,))
        else:
            broken.setattr(Context, name, lambda *_: False)
        for _ in range(3):
            with pytest.raises(EngineError):
                engine.start(rows)
    assert same(under_way(), expected_others)
    first, second = engine.start(rows), engine.start(others)
    assert same(first(), expected) and same(second(), expected_others)


def test_a_row_of_another_network_leaves_all_memory_free(engine):
    (row,) = rows_of(engine, 0, 1, 0)
    for _ in range(3):
        with pytest.raises(InputError, match="latents of a denoise row"):
            engine.start([dataclasses.replace(row, z_t=row.z_t[:1])])
    assert len(engine.free) == 2


def test_a_failure_on_the_device_is_found_by_whoever_waits(engine, cuda):
    rows = rows_of(engine, 0, 1, 0)
    for status, kind in (
        (Status.cudaErrorMemoryAllocation, EngineError),
        (Status.cudaErrorIllegalAddress, EngineDeadError),
    ):
        waits = [engine.start(rows), engine.start(rows)]
        cuda.broken = status
        for wait in waits:
            with pytest.raises(EngineError, match=status.name) as caught:
                wait()
            assert type(caught.value) is kind
        assert len(engine.free) == 2
        cuda.broken = Status.cudaSuccess
        assert len(engine.run(rows)) == 1


def test_graphs_of_all_sizes_are_captured_once(engine, cuda, directory, caplog):
    assert engine.describe()["cuda_graphs"] == ALL_GRAPHS
    caplog.set_level("INFO")
    load_engine("tensorrt", directory, "cuda")
    assert "22 CUDA graphs captured in " in caplog.text


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(st.integers(0, 10), st.integers(0, 64), st.integers(0, 10)), st.integers(0, 99))
def test_a_tick_of_graphs_gives_the_bits_of_one_without(engine, cuda, counts, seed):
    rows = rows_of(engine, *counts, seed=seed)
    graphs = engine.graphs.captured
    launched = engine.run(rows)
    engine.graphs.captured = {}
    try:
        assert same(launched, engine.run(rows))
    finally:
        engine.graphs.captured = graphs


@pytest.mark.parametrize(
    ("host_ms", "counts", "launched"),
    [
        (5.0, (0, 1, 0), [(0, 1, 0)]),
        (5.0, (0, 33, 0), [(0, 40, 0)]),
        (5.0, (3, 20, 5), [(4, 0, 0), (0, 24, 0), (0, 0, 8)]),
        (5.0, (0, 20, 9), None),  # no graph is that large
        (0.0, (0, 5, 0), [(0, 6, 0)]),  # 7 % longer
        (0.0, (0, 33, 0), None),  # 17 % longer
        (0.0, (0, 35, 0), [(0, 40, 0)]),
        (0.0, (0, 2, 1), None),  # a second call of the network costs more than the host's time
        (0.0, (0, 64, 2), [(0, 64, 0), (0, 0, 2)]),
    ],
)
def test_graphs_run_a_tick_where_padding_and_calls_cost_little(directory, cuda, host_ms, counts, launched):
    cuda.host_ms = host_ms  # a call without a graph takes longer by this, which the engine measures
    engine = load_engine("tensorrt", directory, "cuda")
    calls = calls_of(cuda, lambda: engine.run(rows_of(engine, *counts)))
    assert calls == ([(False, counts)] if launched is None else [(True, rows) for rows in launched])


def test_a_graph_that_cannot_be_made_ends_the_capture(directory, cuda, tiny_dir, monkeypatch, caplog):
    made = []

    def instantiate(graph, flags):
        made.append(graph)
        return (Status.cudaErrorMemoryAllocation, None) if len(made) > 4 else (Status.cudaSuccess, graph)

    monkeypatch.setattr(cuda, "cudaGraphInstantiate", instantiate)
    engine = load_engine("tensorrt", directory, "cuda")
    assert engine.describe()["cuda_graphs"] == "denoise 1, 2, 3, 4" and len(made) == 5
    assert "ticks of 6 denoise rows and more run without a CUDA graph: CUDA failed" in caplog.text
    assert calls_of(cuda, lambda: engine.run(rows_of(engine, 0, 3, 0))) == [(True, (0, 3, 0))]
    assert calls_of(cuda, lambda: engine.run(rows_of(engine, 1, 3, 0))) == [(False, (1, 3, 0))]


def test_a_slow_capture_ends(directory, cuda, monkeypatch, caplog):
    monkeypatch.setattr(cuda_graphs, "MOST_SECONDS", -1.0)
    assert load_engine("tensorrt", directory, "cuda").describe()["cuda_graphs"] == "none"
    assert "no more CUDA graphs are captured" in caplog.text


def test_a_plan_of_few_rows_has_few_graphs():
    assert [size for kind, size in cuda_graphs.wanted(4) if RowCounts._fields[kind] == "denoise"] == [1, 2, 3, 4]


def test_programs_in_the_batcher_give_the_bytes_of_each_alone(engine, monkeypatch):
    under_way = []
    submit = engine.submit

    def watched(staging, counts):
        under_way.append(2 - len(engine.free))
        submit(staging, counts)

    monkeypatch.setattr(engine, "submit", watched)
    tasks = [
        Generate(
            207,
            SamplingParams(seed=i, num_steps=6 - i % 3, sampler=SAMPLER_NAMES[i % 3], guidance_scale=1 + i % 2),
        )
        for i in range(14)
    ]
    tasks.append(Reconstruct(np.full(engine.config.pixel_shape, 99, np.uint8)))
    alone = [run(engine, task.program(engine.config)).tobytes() for task in tasks]
    assert set(under_way) == {1}
    batcher = Batcher(engine, budget=4)
    try:
        results = [job.future.result(60).tobytes() for job in batcher.submit_tasks(tasks)]
    finally:
        batcher.close(10)
    assert results == alone
    assert set(under_way) == {1, 2}, "two ticks were under way"
