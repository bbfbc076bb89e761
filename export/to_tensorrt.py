"""A TensorRT plan of a model directory's graph, and beside it a manifest that says what it is.

With `tensorrt` where that is installed, else with `tensorrt_rtx`: the same interface, and it builds without a GPU.
Networks are strongly typed in both: the graph decides the precision, no flag does.
"""

import contextlib
import importlib
import json
import logging
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from dsd_serve import __version__
from dsd_serve.checkpoint import ModelDir, atomic, graph_names, read_model_dir, sha256
from dsd_serve.errors import CheckpointError, EngineUnavailableError

log = logging.getLogger(__name__)

LIBRARIES = ("tensorrt", "tensorrt_rtx")
PRECISIONS = ("fp32", "fp16", "bf16")
ROWS = (0, 8, 64)  # of each kind in a call: fewest, those that the plan is tuned for, most (the batcher's largest tick)
WORKSPACE = 4 << 30  # bytes
GATES = (
    "finite outputs for every class",
    "error of each row against float32",
    "rows that do not depend on their neighbours",
    "the picture after a whole generation",
)


def build(model_dir: Path, precision: str, *, force: bool = False) -> Path:
    """Build `model[.PRECISION].plan` and its manifest `.plan.json` in a model directory. Returns the plan.

    One that was made from the same graph and weights by the same versions is kept, unless `force`. The plan is not
    run: that needs the GPU that it is for. Raises EngineUnavailableError without TensorRT, CheckpointError when the
    directory lacks the graph or TensorRT refuses it; then nothing is written.
    """
    if precision not in PRECISIONS:
        raise EngineUnavailableError(
            f"TensorRT plans are {', '.join(PRECISIONS)}, not {precision}: that is for the CPU"
        )
    trt = find_library()
    directory = read_model_dir(model_dir)
    graph = directory.path / graph_names(precision)[1]
    if precision not in directory.precisions or not graph.exists():
        raise CheckpointError(
            f"{model_dir} has no graph in {precision}; `dsd-export {model_dir} --trt --precision {precision}` makes it"
        )
    directory.check(directory.files(precision))
    plan = graph.with_suffix(".plan")
    manifest = plan.with_name(plan.name + ".json")
    made_from = describe(trt, directory, precision, graph)
    if not force and is_current(plan, manifest, made_from):
        log.info("%s: unchanged", plan.name)
        return plan
    log.info("%s: building with %s %s ...", plan.name, trt.__name__, trt.__version__)
    data, types = compile_graph(trt, graph)
    check_types(precision, types)
    manifest.unlink(missing_ok=True)  # a plan without manifest is not loaded
    with atomic(plan) as draft:
        draft.write_bytes(data)
    written = {**made_from, "types": dict(types), "plan": sha256(plan), "gates": dict.fromkeys(GATES, "not run")}
    with atomic(manifest) as draft:
        draft.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    waiting = "; ".join(GATES)
    log.info("%s: %.1f MB; it was NOT run, these gates wait for a GPU: %s", plan.name, len(data) / 1e6, waiting)
    return plan


def find_library() -> ModuleType:
    """`tensorrt`, else `tensorrt_rtx`."""
    reasons = []
    for name in LIBRARIES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {error}")
    raise EngineUnavailableError(
        f"--trt needs TensorRT ({'; '.join(reasons)}): pip install 'dsd-serve[tensorrt]', or NVIDIA's own tensorrt"
    )


def describe(trt: ModuleType, directory: ModelDir, precision: str, graph: Path) -> dict[str, Any]:
    """What decides a plan: the part of the manifest that must match for it to be kept."""
    files = {graph, *(file for file in directory.files(precision) if file.suffix == ".safetensors")}
    return {
        "precision": precision,
        "made_from": {file.name: sha256(file) for file in sorted(files)},
        "library": trt.__name__,
        "library_version": trt.__version__,
        "dsd_version": __version__,
        "rows": dict(zip(("min", "opt", "max"), ROWS, strict=True)),
        "flags": [flag for flag in ("DISTRIBUTIVE_INDEPENDENCE",) if hasattr(trt.BuilderFlag, flag)],
        "tf32": False,
        "built_on": gpu_name(),
    }


def gpu_name() -> str | None:
    """The first GPU of this machine, as its driver names it; None without one."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = cards[0].read_text().splitlines() if cards else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model:")), None)


def is_current(plan: Path, manifest: Path, made_from: dict[str, Any]) -> bool:
    try:
        known = json.loads(manifest.read_text(encoding="utf-8"))
        return all(known[key] == value for key, value in made_from.items()) and known["plan"] == sha256(plan)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def compile_graph(trt: ModuleType, graph: Path) -> tuple[bytes, "Counter[str]"]:
    """Parse an ONNX file and build it: the plan, and the matrix products of the network by the type of their result."""
    logger = logger_of(trt)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise CheckpointError(f"{trt.__name__} cannot read {graph.name}: {parser.get_error(0)}")
    types: Counter[str] = Counter()
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.MATRIX_MULTIPLY:
            types[str(layer.get_output(0).dtype).rpartition(".")[2]] += 1
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if hasattr(trt.BuilderFlag, "DISTRIBUTIVE_INDEPENDENCE"):  # a row must not depend on its neighbours
        config.set_flag(trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        profile.set_shape(tensor.name, *((rows, *tuple(tensor.shape)[1:]) for rows in ROWS))
    if config.add_optimization_profile(profile) < 0:
        raise CheckpointError(f"{trt.__name__} does not take the row counts {ROWS} for {graph.name}: {logger.said()}")
    with progress(trt) as (monitor, stopped):
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if stopped.is_set():
        raise KeyboardInterrupt
    if plan is None:
        raise CheckpointError(f"{trt.__name__} cannot build {graph.name}: {logger.said()}")
    return bytes(plan), types


def check_types(precision: str, types: "Counter[str]") -> None:
    """Refuse a network whose products are not in the precision that it is said to have."""
    wanted = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}[precision]
    if not types or types.most_common(1)[0][0] != wanted:
        raise CheckpointError(f"the network is not in {precision}: its matrix products are {dict(types)}")


def logger_of(trt: ModuleType) -> Any:
    """TensorRT's logger, which goes to ours and keeps the errors."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())
            log.debug("%s: %s", severity, message)

        def said(self) -> str:
            return "; ".join(self.errors) or "it gives no reason"

    return Logger()


@contextlib.contextmanager
def progress(trt: ModuleType) -> Iterator[tuple[Any, threading.Event]]:
    """A bar over the steps of a build. Ctrl-C and SIGTERM end the build at its next step and set the event."""
    stopped = threading.Event()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.bar = tqdm(unit="step", leave=False)

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            self.steps[phase] = num_steps
            self.bar.total = (self.bar.total or 0) + num_steps
            self.bar.set_description(phase[:40])

        def step_complete(self, phase: str, step: int) -> bool:
            self.bar.update()
            return not stopped.is_set()

        def phase_finish(self, phase: str) -> None:
            self.bar.refresh()

    monitor = Monitor()
    main = threading.current_thread() is threading.main_thread()
    before = {}
    if main:  # Python's signals reach the main thread only
        before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield monitor, stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        monitor.bar.close()
