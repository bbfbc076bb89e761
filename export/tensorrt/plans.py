"""TensorRT plans of a model directory: they are built, checked, and put in place with their manifests.

The checks (`export.tensorrt.checks`) run before a plan is written if this machine can run it, otherwise in `check`. A
plan that fails them is kept in the folder `rejected`, from which no engine loads it: a build may take an hour, and its
layers show what went wrong.
"""

import logging
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from dsd_serve import __version__
from dsd_serve.checkpoint import ModelDir, read_model_dir, sha256
from dsd_serve.engines import Engine
from dsd_serve.engines.cuda import call, find_gpu, import_runtime
from dsd_serve.engines.onnx_engine import OnnxEngine
from dsd_serve.engines.plan import (
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
from dsd_serve.precision import check_runs, find_precision, precisions_of
from export.commit import REJECTED, drafting, move, sync
from export.tensorrt import checks
from export.tensorrt.compile import BuildOptions, check_options, check_types, compile_graph, flags_of, targets_of

log = logging.getLogger(__name__)


def build(model_dir: Path, precision: str, options: BuildOptions | None = None) -> Path:
    """Build `model[.PRECISION].plan` and its manifest `.plan.json` in a model directory. Returns the plan.

    A plan that was made from the same graph and weights in the same way is kept, unless `options.force`. Raises
    EngineUnavailableError without TensorRT, or for options that it does not have; CheckpointError when the directory
    lacks the graph, TensorRT refuses it, or a check fails; then the directory keeps its plan.
    """
    options = options or BuildOptions()
    check_runs(precision, "tensorrt")
    trt = find_library()
    check_options(trt, options)
    with drafting(model_dir) as folder:
        directory = read_model_dir(model_dir)
        graph = directory.path / find_precision(precision).plain
        if precision not in directory.precisions or not graph.exists():
            raise CheckpointError(
                f"{model_dir} has no graph in {precision}; `dsd-export {model_dir} --trt --precision {precision}` "
                "makes it"
            )
        directory.check(directory.files(precision))
        plan = plan_path(model_dir, precision)
        expected = describe(trt, directory, precision, graph, options)
        if not options.force and is_current(plan, expected):
            log.info("%s: unchanged", plan.name)
            return plan
        log.info("%s: building with %s %s ...", plan.name, trt.__name__, trt.__version__)
        data, types = compile_graph(trt, graph, options)
        check_types(precision, types)
        draft = folder / plan.name
        draft.write_bytes(data)
        manifest = replace(expected, types=dict(types), plan=sha256(draft))
        manifest = checked(data, manifest, directory, options.device)
        manifest_path(draft).write_text(manifest.to_json(), encoding="utf-8")
        place(draft, plan)
    log.info("%s: %.1f MB", plan.name, len(data) / 1e6)
    return plan


def describe(trt: ModuleType, directory: ModelDir, precision: str, graph: Path, options: BuildOptions) -> Manifest:
    """The manifest of a plan before it is built; the GPU that it is for, if any, is then the current one."""
    files = {graph, *(file for file in directory.files(precision) if file.suffix == ".safetensors")}
    gpu = None
    if not hasattr(trt, "ComputeCapability"):  # it builds for the current GPU
        cuda = import_runtime()
        gpu = find_gpu(cuda, options.device)
        call(cuda.cudaSetDevice(gpu.number))
    return Manifest(
        precision=precision,
        made_from={file.name: sha256(file) for file in sorted(files)},
        library=trt.__name__,
        library_version=trt.__version__,
        dsd_version=__version__,
        rows=options.rows,
        hardware=options.hardware,
        version_compatible=options.version_compatible,
        gpu=gpu.name if gpu else None,
        capability=gpu.capability if gpu else None,
        targets=targets_of(trt, options),
        flags=flags_of(trt),
    )


def is_current(plan: Path, expected: Manifest) -> bool:
    """Whether the plan exists, belongs to its manifest, and was built as expected."""
    try:
        known = read_manifest(plan)
        return known.same_build(expected) and known.plan == sha256(plan)
    except (OSError, CheckpointError):
        return False


def checked(data: bytes, manifest: Manifest, directory: ModelDir, device: str) -> Manifest:
    """Run the checks and record their results in the manifest. If the plan cannot run here, log a warning and record
    none. Raises CheckpointError with the numbers when a check fails."""
    try:
        trt, cuda = import_library(manifest.library), import_runtime()
        gpu = find_gpu(cuda, device)
        check_plan(manifest, directory, trt.__version__, gpu)
        engine = TensorRTEngine(data, manifest, directory.config, gpu, trt, cuda)
    except EngineUnavailableError as error:
        log.warning("the plan was NOT run: %s", error)
        for name in checks.NAMES:
            log.warning("  not checked: %s", name)
        log.warning("  engines load the plan only after this has run on its GPU: dsd-export %s --check", directory.path)
        return manifest
    return judged(engine, data, manifest, directory, OnnxEngine.load(directory.path))


def judged(engine: TensorRTEngine, data: bytes, manifest: Manifest, directory: ModelDir, reference: Engine) -> Manifest:
    """Run the checks, and record their results in the manifest. Raises CheckpointError with the numbers when one
    fails; the plan is then kept in the folder `rejected`, with this manifest and the layers that TensorRT built."""
    layers = engine.layers()
    found = checks.run_checks(engine, reference, manifest.precision, directory.defaults, layers)
    for check in found:
        log.info("  %s", check)
    manifest = replace(manifest, checks=checks.to_record(found))
    if failed := [check for check in found if not check.passed]:
        folder = directory.path / REJECTED
        folder.mkdir(exist_ok=True)
        kept = plan_path(folder, manifest.precision)
        kept.write_bytes(data)
        manifest_path(kept).write_text(manifest.to_json(), encoding="utf-8")
        kept.with_name(f"{kept.name}.layers.json").write_text(layers, encoding="utf-8")
        reasons = "; ".join(f"{check.name}: {check.text}" for check in failed)
        raise CheckpointError(f"{kept.name} failed its checks and was moved to {folder}: {reasons}")
    return manifest


def place(draft: Path, plan: Path) -> None:
    """Replace a plan and its manifest. At no moment is there a manifest of another plan."""
    new, old = manifest_path(draft), manifest_path(plan)
    sync(draft)
    sync(new)
    replaced = draft.parent / "replaced"
    replaced.mkdir()
    move([(old, replaced / old.name), (plan, replaced / plan.name), (draft, plan), (new, old)])


def check(model_dir: Path, precisions: tuple[str, ...] = (), device: str = "cuda") -> None:
    """Run the checks of a model directory's plans on this machine, and record the results.

    precisions: those to check; empty for all plans. Raises EngineUnavailableError when a plan cannot run here. A plan
    that fails is moved to the folder `rejected`, and CheckpointError is raised.
    """
    with drafting(model_dir):
        directory = read_model_dir(model_dir)
        plans = [
            path
            for path in (plan_path(model_dir, name) for name in precisions or precisions_of("tensorrt"))
            if path.exists()
        ]
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
            try:
                manifest = judged(engine, plan.read_bytes(), manifest, directory, reference)
            except CheckpointError:
                manifest_path(plan).unlink()
                plan.unlink()
                raise
            with atomic(manifest_path(plan)) as draft:
                draft.write_text(manifest.to_json(), encoding="utf-8")
