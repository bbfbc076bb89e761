"""TensorRT plans and their manifests.

A plan is machine code for certain GPUs and one version of one library, made from one graph. What it is stands in the
manifest beside it (`model.plan.json` beside `model.plan`); without one, or where anything in it does not fit, a plan is
never loaded.
"""

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from dsd_serve.checkpoint import ModelDir, graph_names, read_text, sha256
from dsd_serve.engines.cuda import Gpu
from dsd_serve.errors import CheckpointError, EngineUnavailableError

FORMAT = "dsd-plan-1"
LIBRARIES = ("tensorrt", "tensorrt_rtx")
PRECISIONS = ("fp32", "fp16", "bf16")
HARDWARE = ("this", "same", "ampere+")


@dataclass(frozen=True)
class Manifest:
    """What a plan is, and where it may run.

    made_from: sha256 of its graph and weights by file. library, library_version: what built it and must load it; with
    `version_compatible`, a later one of the same major version may too. rows: of each kind in a call: fewest, those it
    is tuned for, most. hardware: "this" GPU model, GPUs of the "same" compute capability, or "ampere+". gpu,
    capability: where it was built; None without a GPU. targets: the compute capabilities that it was built for instead;
    empty for all that the library knows. types: the network's matrix products by the type of their result. plan: its
    sha256. gates: what each gate found; None where they were not run.
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
    gates: Mapping[str, Mapping[str, Any]] | None = None
    format: str = FORMAT

    @property
    def passed(self) -> bool:
        return bool(self.gates) and all(gate["passed"] for gate in (self.gates or {}).values())

    def same_build(self, other: "Manifest") -> bool:
        """Whether both were built from the same things in the same way, so that one plan serves for the other."""
        outcome = dict.fromkeys(("plan", "types", "gates"))
        return asdict(self) | outcome == asdict(other) | outcome

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def plan_path(directory: Path, precision: str) -> Path:
    return (directory / graph_names(precision)[1]).with_suffix(".plan")


def manifest_path(plan: Path) -> Path:
    return plan.with_name(plan.name + ".json")


def read_manifest(plan: Path) -> Manifest:
    """Raises CheckpointError when it is missing or does not say what a manifest says."""
    file = manifest_path(plan)
    again = f"build the plan again with dsd-export {plan.parent} --trt"
    try:
        values = json.loads(read_text(file))
    except FileNotFoundError:
        raise CheckpointError(f"{plan} has no manifest {file.name}, so nothing says what it is: {again}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): {again}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not of format {FORMAT!r}: {again}")
    try:
        for item in fields(Manifest):
            if isinstance(values.get(item.name), list):
                values[item.name] = tuple(values[item.name])
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


HOW_TO_INSTALL = {
    "tensorrt": "install NVIDIA's tensorrt wheel",
    "tensorrt_rtx": "pip install 'dsd-serve[tensorrt]'",
}


def find_library() -> ModuleType:
    """`tensorrt` where it is installed, else `tensorrt_rtx`.

    A tensorrt that is there and broken is an error, never replaced: its owner wants plans of that library.
    """
    for name in LIBRARIES:
        try:
            there = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):  # in sys.modules, as None
            there = False
        if there:
            return import_library(name)
    raise EngineUnavailableError(
        "neither tensorrt nor tensorrt_rtx is installed: pip install 'dsd-serve[tensorrt]', or NVIDIA's own tensorrt"
    )


def check_plan(manifest: Manifest, directory: ModelDir, version: str, gpu: Gpu) -> None:
    """Raises CheckpointError for a plan that was made from other files than this directory's, and
    EngineUnavailableError for one that was built for another GPU or version of its library. version: that of the
    library here.
    """
    plan = plan_path(directory.path, manifest.precision)
    again = build_again(plan, manifest.precision)
    if missing := check_sources(manifest, directory):
        raise CheckpointError(f"{plan} was made from another {missing} than the one beside it: {again}")
    built = f"{manifest.library} {manifest.library_version}"
    if not runs_with(manifest, version):
        raise EngineUnavailableError(f"{plan} was built with {built}, and here is {version}: {again}, or install that")
    if reason := not_for(manifest, gpu):
        raise EngineUnavailableError(f"{plan} was built for {reason}, and here is {gpu}: {again} on this machine")


def check_bytes(plan: Path, data: bytes, manifest: Manifest) -> None:
    """Raises CheckpointError when `data` is not the plan that the manifest describes."""
    if hashlib.sha256(data).hexdigest() != manifest.plan:
        raise CheckpointError(
            f"{plan} is not the plan of its manifest, it is damaged or was replaced: "
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
    """Whether a version of the library loads the plan: the same, or with `version_compatible` a later one."""
    if version == manifest.library_version:
        return True
    try:
        ours, theirs = ([int(part) for part in text.split(".")] for text in (version, manifest.library_version))
    except ValueError:
        return False
    return manifest.version_compatible and ours[0] == theirs[0] and ours > theirs


def not_for(manifest: Manifest, gpu: Gpu) -> str | None:
    """What the plan was built for, where that is not this GPU; None when it may run here."""
    if manifest.targets:
        return None if gpu.capability in manifest.targets else f"compute capability {', '.join(manifest.targets)}"
    if manifest.capability is None:  # ahead of time, for every GPU of the library: that one has to say
        return None
    if manifest.hardware == "ampere+":
        ampere = [int(part) for part in gpu.capability.split(".")] >= [8, 0]
        return None if ampere else "Ampere GPUs and later"
    if manifest.hardware == "same":
        return None if gpu.capability == manifest.capability else f"compute capability {manifest.capability}"
    there = (manifest.gpu, manifest.capability)
    return None if there == (gpu.name, gpu.capability) else f"{manifest.gpu} (compute capability {manifest.capability})"
