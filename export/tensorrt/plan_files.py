"""TensorRT plans of a model directory: built, run through the gates, and put in place with their manifests.

The gates (`export.tensorrt.gates`) are run before a plan is written, where this machine can run it, and by `check`
where not.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from dsd_serve import __version__
from dsd_serve.checkpoint import ModelDir, graph_names, read_model_dir, sha256
from dsd_serve.engines.cuda import find_gpu, import_runtime
from dsd_serve.engines.onnx_engine import OnnxEngine
from dsd_serve.engines.plan import (
    PRECISIONS,
    Manifest,
    check_plan,
    find_library,
    import_library,
    manifest_path,
    plan_path,
    read_manifest,
)
from dsd_serve.engines.tensorrt_engine import TensorRTEngine
from dsd_serve.errors import CheckpointError, EngineUnavailableError
from dsd_serve.files import atomic
from export.commit import drafting, held_signals
from export.tensorrt import gates
from export.tensorrt.compile import ROWS, BuildOptions, check_options, check_types, compile_graph

log = logging.getLogger(__name__)


def build(model_dir: Path, precision: str, options: BuildOptions | None = None) -> Path:
    """Build `model[.PRECISION].plan` and its manifest `.plan.json` in a model directory. Returns the plan.

    One that was made from the same graph and weights in the same way is kept, unless `options.force`. Raises
    EngineUnavailableError without TensorRT, or for options that it does not have; CheckpointError when the directory
    lacks the graph, TensorRT refuses it, or a gate fails; then nothing is written.
    """
    options = options or BuildOptions()
    if precision not in PRECISIONS:
        raise EngineUnavailableError(
            f"TensorRT plans are {', '.join(PRECISIONS)}, not {precision}: that is for the CPU"
        )
    trt = find_library()
    check_options(trt, options)
    with drafting(model_dir) as folder:
        directory = read_model_dir(model_dir)
        graph = directory.path / graph_names(precision)[1]
        if precision not in directory.precisions or not graph.exists():
            raise CheckpointError(
                f"{model_dir} has no graph in {precision}; `dsd-export {model_dir} --trt --precision {precision}` "
                "makes it"
            )
        directory.check(directory.files(precision))
        plan = plan_path(model_dir, precision)
        wanted = describe(trt, directory, precision, graph, options)
        if not options.force and is_current(plan, wanted):
            log.info("%s: unchanged", plan.name)
            return plan
        log.info("%s: building with %s %s ...", plan.name, trt.__name__, trt.__version__)
        data, types = compile_graph(trt, graph, options)
        check_types(precision, types)
        draft = folder / plan.name
        draft.write_bytes(data)
        manifest = replace(wanted, types=dict(types), plan=sha256(draft))
        manifest = pass_gates(data, manifest, directory, options.device)
        manifest_path(draft).write_text(manifest.to_json(), encoding="utf-8")
        place(draft, plan)
    log.info("%s: %.1f MB", plan.name, len(data) / 1e6)
    return plan


def describe(trt: ModuleType, directory: ModelDir, precision: str, graph: Path, options: BuildOptions) -> Manifest:
    """The manifest of a plan that is still to be built."""
    files = {graph, *(file for file in directory.files(precision) if file.suffix == ".safetensors")}
    gpu = None
    if not hasattr(trt, "ComputeCapability"):  # builds for the GPU that is there
        gpu = find_gpu(import_runtime(), options.device)
    return Manifest(
        precision=precision,
        made_from={file.name: sha256(file) for file in sorted(files)},
        library=trt.__name__,
        library_version=trt.__version__,
        dsd_version=__version__,
        rows=ROWS,
        hardware=options.hardware,
        version_compatible=options.version_compatible,
        gpu=gpu.name if gpu else None,
        capability=gpu.capability if gpu else None,
        targets=tuple(dict.fromkeys(options.targets)),
        flags=tuple(flag for flag in ("DISTRIBUTIVE_INDEPENDENCE",) if hasattr(trt.BuilderFlag, flag)),
    )


def is_current(plan: Path, wanted: Manifest) -> bool:
    """Whether the plan is there, is that of its manifest, and was built as wanted."""
    try:
        known = read_manifest(plan)
        return known.same_build(wanted) and known.plan == sha256(plan)
    except (OSError, CheckpointError):
        return False


def pass_gates(data: bytes, manifest: Manifest, directory: ModelDir, device: str) -> Manifest:
    """Run the gates, and put what they found into the manifest; where the plan cannot run here, say so and leave them
    out. Raises CheckpointError with the numbers when one fails."""
    try:
        trt, cuda = import_library(manifest.library), import_runtime()
        gpu = find_gpu(cuda, device)
        check_plan(manifest, directory, trt.__version__, gpu)
        engine = TensorRTEngine(data, manifest, directory.config, gpu, trt, cuda)
    except EngineUnavailableError as error:
        log.warning("the plan was NOT run: %s", error)
        for name in gates.NAMES:
            log.warning("  not checked: %s", name)
        log.warning("  no engine loads it before, on its GPU, this has been run: dsd-export %s --check", directory.path)
        return manifest
    found = gates.run_gates(
        engine, OnnxEngine.load(directory.path), manifest.precision, directory.defaults, engine.layers()
    )
    report(found)
    if failed := [gate for gate in found if not gate.passed]:
        raise CheckpointError(f"the plan is not accepted: {'; '.join(f'{gate.name}: {gate.text}' for gate in failed)}")
    return replace(manifest, gates=gates.record(found))


def report(found: list[gates.Gate]) -> None:
    for gate in found:
        log.info("  %s", gate)


def place(draft: Path, plan: Path) -> None:
    """Put a new plan and its manifest where the old ones are. At no moment is there a manifest of another plan."""
    for file in (draft, manifest_path(draft)):
        with file.open("rb+") as written:
            os.fsync(written.fileno())
    with held_signals():
        manifest_path(plan).unlink(missing_ok=True)
        draft.replace(plan)
        manifest_path(draft).replace(manifest_path(plan))


def check(model_dir: Path, precisions: tuple[str, ...] = (), device: str = "cuda") -> None:
    """Run the gates of the plans that a model directory has, on this machine, and record them.

    precisions: only those; none for all that there are. Raises EngineUnavailableError where a plan cannot run here. A
    plan that fails is removed, and CheckpointError has the numbers.
    """
    with drafting(model_dir):
        directory = read_model_dir(model_dir)
        plans = [path for path in (plan_path(model_dir, name) for name in precisions or PRECISIONS) if path.exists()]
        if not plans:
            raise CheckpointError(
                f"{model_dir} has no TensorRT plan{' in ' + ', '.join(precisions) if precisions else ''}; "
                f"dsd-export {model_dir} --trt builds one"
            )
        reference = OnnxEngine.load(model_dir)
        for plan in plans:
            manifest = read_manifest(plan)
            engine = TensorRTEngine.open(plan, manifest, device)
            log.info("%s on %s", plan.name, engine.gpu)
            found = gates.run_gates(engine, reference, manifest.precision, directory.defaults, engine.layers())
            report(found)
            if not all(gate.passed for gate in found):
                manifest_path(plan).unlink()
                plan.unlink()
                raise CheckpointError(f"{plan} did not pass its gates and was removed")
            with atomic(manifest_path(plan)) as draft:
                draft.write_text(replace(manifest, gates=gates.record(found)).to_json(), encoding="utf-8")
