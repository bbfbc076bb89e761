"""Compilation of an ONNX graph into a TensorRT plan.

`tensorrt` builds for the GPU of this machine. `tensorrt_rtx` has the same interface, builds for other GPUs too, and
needs none. Networks are strongly typed in both: the graph decides the precision, not a flag.
"""

import contextlib
import logging
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from dsd_serve.engines.plan import HARDWARE, MOST_ROWS, RTX_DEFAULT, TUNED_ROWS
from dsd_serve.errors import CheckpointError, EngineUnavailableError
from dsd_serve.files import atomic
from dsd_serve.precision import PRECISIONS

log = logging.getLogger(__name__)

WORKSPACE = 4 << 30  # bytes
# A row must not depend on its neighbours; and no memory may be allocated in a call, which could not be captured.
FLAGS = ("DISTRIBUTIVE_INDEPENDENCE", "REQUIRE_USER_ALLOCATION")


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    hardware: "this" GPU model only, GPUs of the "same" compute capability, or "ampere+"; each is slower than the one
    before. version_compatible: later releases of the library with the same major version may load the plan. targets:
    compute capabilities ("8.9") to build for ahead of time, with tensorrt_rtx; empty for RTX_DEFAULT. timing_cache:
    a file of measured tactics that makes the next build on this machine faster, with tensorrt. device: the GPU that
    runs the checks. tuned_rows: rows of each kind in a call that the plan is fastest for, from 1 to MOST_ROWS. There is
    one profile for all row counts, because a row would have other bits in another. force: build even if the plan is up
    to date.
    """

    hardware: str = "this"
    version_compatible: bool = False
    targets: tuple[str, ...] = ()
    timing_cache: Path | None = None
    device: str = "cuda"
    tuned_rows: int = TUNED_ROWS
    force: bool = False

    @property
    def rows(self) -> tuple[int, int, int]:
        """Fewest, tuned-for and most rows of each kind in a call."""
        return 0, self.tuned_rows, MOST_ROWS


def check_options(trt: ModuleType, options: BuildOptions) -> None:
    """Raises EngineUnavailableError for options that this library does not have."""
    if options.hardware not in HARDWARE:
        raise EngineUnavailableError(f"--hardware must be one of {', '.join(HARDWARE)}, got {options.hardware!r}")
    if not 1 <= options.tuned_rows <= MOST_ROWS:
        raise EngineUnavailableError(
            f"--tuned-rows must be from 1 to {MOST_ROWS}, the most rows of a tick, got {options.tuned_rows}"
        )
    ahead = hasattr(trt, "ComputeCapability")
    if options.targets and not ahead:
        raise EngineUnavailableError(
            f"{trt.__name__} builds for the GPU of this machine only; --targets is for tensorrt_rtx, "
            "use --hardware same or ampere+ for a plan that runs on more GPUs"
        )
    if ahead and options.version_compatible:
        raise EngineUnavailableError(
            f"--version-compatible is for tensorrt: a plan of {trt.__name__} runs with its own version only"
        )
    if ahead and (options.hardware != "this" or options.timing_cache):
        raise EngineUnavailableError(
            f"--hardware and --timing-cache are for tensorrt; plans of {trt.__name__} run on all GPUs that it "
            "supports, or on those of --targets, and its builds measure no times"
        )
    for target in options.targets:
        if capability_name(target) not in trt.ComputeCapability.__members__:
            known = sorted((name for name in trt.ComputeCapability.__members__ if name.startswith("SM")), key=int_of)
            allowed = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known)
            raise EngineUnavailableError(f"--targets of {trt.__name__} must be among {allowed}; got {target!r}")


def targets_of(trt: ModuleType, options: BuildOptions) -> tuple[str, ...]:
    """The compute capabilities that a plan is built for ahead of time; none with a library that builds on a GPU."""
    return tuple(dict.fromkeys(options.targets or (RTX_DEFAULT if hasattr(trt, "ComputeCapability") else ())))


def flags_of(trt: ModuleType) -> tuple[str, ...]:
    """The flags of every build, of those that the library has."""
    return tuple(flag for flag in FLAGS if flag in trt.BuilderFlag.__members__)


def int_of(name: str) -> int:
    return int(name.removeprefix("SM"))


def capability_name(target: str) -> str:
    return "SM" + target.replace(".", "")


def compile_graph(trt: ModuleType, graph: Path, options: BuildOptions | None = None) -> tuple[bytes, "Counter[str]"]:
    """Build the plan of an ONNX file. Returns it with the number of matrix products by the type of their result."""
    options = options or BuildOptions()
    logger = logger_of(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # the factory returned nothing, as it does without a GPU
        raise EngineUnavailableError(f"{trt.__name__} cannot build on this machine: {logger.reasons()}") from None
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
    for name in flags_of(trt):
        config.set_flag(trt.BuilderFlag.__members__[name])
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the check of the precision that was built
    aim(trt, config, options)
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        profile.set_shape(tensor.name, *((rows, *tuple(tensor.shape)[1:]) for rows in options.rows))
    if config.add_optimization_profile(profile) < 0:
        raise CheckpointError(
            f"{trt.__name__} does not take the row counts {options.rows} for {graph.name}: {logger.reasons()}"
        )
    with timing_cache(config, options.timing_cache), progress(trt) as (monitor, stopped):
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if stopped.is_set():
        raise KeyboardInterrupt
    if plan is None:
        raise CheckpointError(f"{trt.__name__} cannot build {graph.name}: {logger.reasons()}")
    return bytes(plan), types


def aim(trt: ModuleType, config: Any, options: BuildOptions) -> None:
    """Set the GPUs and the versions of the library that the plan is for."""
    if options.version_compatible:
        # The plan then holds the lean runtime, which a later version of the library loads and runs it with.
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    levels = trt.HardwareCompatibilityLevel
    if options.hardware != "this":
        config.hardware_compatibility_level = {
            "same": levels.SAME_COMPUTE_CAPABILITY,
            "ampere+": levels.AMPERE_PLUS,
        }[options.hardware]
    if targets := targets_of(trt, options):
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            if not config.set_compute_capability(trt.ComputeCapability.__members__[capability_name(target)], index):
                raise EngineUnavailableError(f"{trt.__name__} does not take {target} with {', '.join(targets)}")


@contextlib.contextmanager
def timing_cache(config: Any, file: Path | None) -> Iterator[None]:
    """Let a build read a timing cache, and write it back if the build ended well."""
    if file is None:
        yield
        return
    known = file.read_bytes() if file.exists() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        raise CheckpointError(f"{file} is not a timing cache of this library and GPU; delete it, or give another file")
    yield
    with atomic(file) as draft:
        draft.write_bytes(bytes(config.get_timing_cache().serialize()))


def check_types(precision: str, types: "Counter[str]") -> None:
    """Raises CheckpointError for a network whose matrix products are not in the given precision."""
    if not types or types.most_common(1)[0][0] != PRECISIONS[precision].tensorrt[0]:
        raise CheckpointError(f"the network is not in {precision}: its matrix products are {dict(types)}")


def logger_of(trt: ModuleType) -> Any:
    """A TensorRT logger that writes to ours and keeps the errors."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())
            log.debug("%s: %s", severity, message)

        def reasons(self) -> str:
            return "; ".join(self.errors) or "it gives no reason"

    return Logger()


@contextlib.contextmanager
def progress(trt: ModuleType) -> Iterator[tuple[Any, threading.Event]]:
    """A progress bar over the steps of a build. Ctrl-C and SIGTERM end the build at its next step and set the event."""
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
