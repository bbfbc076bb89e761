"""TensorRT plans and their manifests.

A plan is machine code for certain GPUs and one version of one library, made from one graph. A manifest describes it
(`model.plan.json` next to `model.plan`). A plan without a manifest, or with one that does not fit, is never loaded.
"""

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from dsd_serve.checkpoint import ModelDir, read_text, sha256
from dsd_serve.engines.cuda import Gpu
from dsd_serve.errors import CheckpointError, EngineUnavailableError
from dsd_serve.precision import find_precision

FORMAT = "dsd-plan-1"
LIBRARIES = ("tensorrt", "tensorrt_rtx")
HARDWARE = ("this", "same", "ampere+")
MOST_ROWS = 64  # of each kind in a call: the batcher's largest tick
TUNED_ROWS = 8  # by default
FILE_KEYS = {"checks": "gates"}  # field -> key in the file, if they differ


HOW_TO_INSTALL = {
    "tensorrt": "pip install '.[tensorrt]'",
    "tensorrt_rtx": "pip install '.[tensorrt-rtx]'",
}

# Compute capabilities of tensorrt_rtx: all for which it builds, and those for which it does by default. Of the GPUs of
# data centres it has the A100 (8.0), the L4 and the L40 (8.9), but no H100, H200 or B200.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
RTX_DEFAULT = ("8.6", "8.9", "12.0")


@dataclass(frozen=True)
class Manifest:
    """Description of a plan, and of the machines that may run it.

    made_from: sha256 of its graph and weights by file name. library, library_version: the library that built it and
    must load it; with `version_compatible`, a later release of the same major version may too. rows: fewest, tuned-for
    and most rows of each kind in a call. hardware: "this" GPU model, GPUs of the "same" compute capability, or
    "ampere+". gpu, capability: the GPU it was built on; None without one. targets: compute capabilities that it was
    built for instead, by tensorrt_rtx; empty in manifests of earlier versions for all that it has. types: number of the
    network's matrix products by the type of their result. plan: its sha256. checks: results by the name of the check,
    `gates` in the file; None if they have not run.
    """

    precision: str
    made_from: Mapping[str, str]
    library: str
    library_version: str
    dsd_version: str
    rows: tuple[int, int, int]
    hardware: str = "this"
    version_compatible: bool = False
    gpu: str | None = None
    capability: str | None = None
    targets: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    types: Mapping[str, int] = field(default_factory=dict)
    plan: str = ""
    checks: Mapping[str, Mapping[str, Any]] | None = None
    format: str = FORMAT

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check["passed"] for check in (self.checks or {}).values())

    def same_build(self, other: "Manifest") -> bool:
        """Whether both were built from the same files in the same way, so that one plan can stand for the other."""
        outcome = dict.fromkeys(("plan", "types", "checks"))
        return asdict(self) | outcome == asdict(other) | outcome

    def to_json(self) -> str:
        values = {FILE_KEYS.get(name, name): value for name, value in asdict(self).items()}
        return json.dumps(values, indent=2) + "\n"


def plan_path(directory: Path, precision: str) -> Path:
    """The TensorRT plan of a model directory in a precision, whether it exists or not."""
    return directory / find_precision(precision).plan


def manifest_path(plan: Path) -> Path:
    """The manifest of a plan, whether it exists or not."""
    return plan.with_name(plan.name + ".json")


def read_manifest(plan: Path) -> Manifest:
    """The manifest of a plan. Raises CheckpointError when it is missing or broken."""
    file = manifest_path(plan)
    again = f"build the plan again with dsd-export {plan.parent} --trt"
    try:
        values = json.loads(read_text(file))
    except FileNotFoundError:
        raise CheckpointError(f"{plan} has no manifest {file.name}: {again}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): {again}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not of format {FORMAT!r}: {again}")
    try:
        names = {key: name for name, key in FILE_KEYS.items()}
        values = {
            names.get(key, key): tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        manifest = Manifest(**values)
        low, best, most = (int(number) for number in manifest.rows)
        if not 0 <= low <= best <= most or not isinstance(manifest.made_from, dict):
            raise ValueError(f"rows {manifest.rows}")
        return manifest
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} does not describe a plan ({error}): {again}") from None


def import_library(name: str) -> ModuleType:
    """`tensorrt` or `tensorrt_rtx`. Raises EngineUnavailableError when it is missing or cannot be loaded."""
    if name not in LIBRARIES:
        raise EngineUnavailableError(f"a plan's library must be one of {', '.join(LIBRARIES)}, got {name!r}")
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise EngineUnavailableError(f"{name} cannot be imported ({error}): {HOW_TO_INSTALL[name]}") from None


def find_library() -> ModuleType:
    """`tensorrt` if it is installed, else `tensorrt_rtx`.

    A tensorrt that is installed and broken is an error and never replaced by the other library.
    """
    for name in LIBRARIES:
        try:
            installed = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):  # None in sys.modules
            installed = False
        if installed:
            return import_library(name)
    raise EngineUnavailableError(
        f"neither tensorrt nor tensorrt_rtx is installed: {HOW_TO_INSTALL['tensorrt']}, or for GeForce RTX and RTX PRO "
        f"GPUs {HOW_TO_INSTALL['tensorrt_rtx']}"
    )


def check_plan(manifest: Manifest, directory: ModelDir, version: str, gpu: Gpu) -> None:
    """Check that a plan fits its directory and this machine.

    version: of the library that is installed here. Raises CheckpointError for a plan made from other files than this
    directory's, EngineUnavailableError for one built for another GPU or version of its library.
    """
    plan = plan_path(directory.path, manifest.precision)
    again = build_again(plan, manifest.precision)
    if missing := check_sources(manifest, directory):
        raise CheckpointError(f"{plan} was made from another {missing} than this directory's: {again}")
    built = f"{manifest.library} {manifest.library_version}"
    if not runs_with(manifest, version):
        raise EngineUnavailableError(f"{plan} was built with {built}, but {version} is installed: {again}")
    if reason := other_gpus(manifest, gpu):
        fix = f"{again} on this machine"
        if manifest.library == "tensorrt_rtx":
            fix = f"{again} --targets {gpu.capability}"
            if gpu.capability not in RTX_CAPABILITIES:
                fix = f"tensorrt_rtx does not support that GPU; {HOW_TO_INSTALL['tensorrt']}, and {again}"
        raise EngineUnavailableError(f"{plan} was built for {reason}, but the GPU is {gpu}: {fix}")


def check_bytes(plan: Path, data: bytes, manifest: Manifest) -> None:
    """Raises CheckpointError when `data` is not the plan that the manifest describes."""
    if hashlib.sha256(data).hexdigest() != manifest.plan:
        raise CheckpointError(
            f"{plan} is not the plan of its manifest: it is damaged or was replaced; "
            f"{build_again(plan, manifest.precision)}"
        )


def build_again(plan: Path, precision: str) -> str:
    return f"build it again with dsd-export {plan.parent} --trt --precision {precision}"


def check_sources(manifest: Manifest, directory: ModelDir) -> str | None:
    """The first file of the directory that is not the one that the plan was made from, or None."""
    for name, known in manifest.made_from.items():
        file = directory.path / Path(name).name
        if not file.exists() or sha256(file) != known:
            return name
    return None


def runs_with(manifest: Manifest, version: str) -> bool:
    """Whether a version of the library can load the plan: the same, or with `version_compatible` a later one."""
    if version == manifest.library_version:
        return True
    try:
        ours, theirs = ([int(part) for part in text.split(".")] for text in (version, manifest.library_version))
    except ValueError:
        return False
    compatible = manifest.version_compatible and manifest.library == "tensorrt"
    return compatible and ours[0] == theirs[0] and ours > theirs


def other_gpus(manifest: Manifest, gpu: Gpu) -> str | None:
    """The GPUs that the plan was built for, in words, if this one is not among them; otherwise None."""
    if manifest.targets or manifest.capability is None:
        targets = manifest.targets or RTX_CAPABILITIES
        return None if gpu.capability in targets else f"compute capability {', '.join(targets)}"
    if manifest.hardware == "ampere+":
        ampere = [int(part) for part in gpu.capability.split(".")] >= [8, 0]
        return None if ampere else "Ampere GPUs and later"
    if manifest.hardware == "same":
        return None if gpu.capability == manifest.capability else f"compute capability {manifest.capability}"
    built_on = (manifest.gpu, manifest.capability)
    return (
        None if built_on == (gpu.name, gpu.capability) else f"{manifest.gpu} (compute capability {manifest.capability})"
    )
