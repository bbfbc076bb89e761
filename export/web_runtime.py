"""ONNX Runtime Web: the npm package that runs the network in a browser, and the files of it that a page needs.

export/npm/ pins its version, with a lock file for `npm ci`. The package is not part of ours: it is found where npm
installed it.
"""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dsd_serve.errors import DSDError, EngineUnavailableError, shown

PACKAGE = "onnxruntime-web"
MODULES = "node_modules"


@dataclass(frozen=True)
class Build:
    """A build of the runtime: the names of its files in the package's folder dist/.

    script: what a page imports. loader: what the script imports. binary: WebAssembly.
    """

    script: str
    loader: str
    binary: str


# The plain build has no GPU code and is the smallest. Of those with WebGPU, the one that waits for the GPU by
# JavaScript Promise Integration is 10 MB smaller than the one that every browser runs.
BUILDS = {
    "wasm": Build("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": Build("ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm"),
}
README = "README.md"


def pinned_version() -> str:
    """The version that this package was tested with."""
    text = resources.files("export").joinpath("npm", "package.json").read_text(encoding="utf-8")
    return str(json.loads(text)["dependencies"][PACKAGE])


def find_runtime(folder: Path | None) -> Path:
    """The folder of the installed npm package, in its pinned version.

    folder: the package itself, or a folder with a node_modules that has it; None: the working directory and its
    parents are searched, as Node does. Raises EngineUnavailableError.
    """
    if folder is None:
        places = [parent / MODULES / PACKAGE for parent in (Path.cwd(), *Path.cwd().parents)]
        where = f"{MODULES} of this directory and its parents"
    else:
        places = [folder, folder / PACKAGE, folder / MODULES / PACKAGE]
        where = str(folder)
    version = pinned_version()
    install = f"npm install --ignore-scripts {PACKAGE}@{version}"
    for place in places:
        values = read_package(place / "package.json")
        if values.get("name") != PACKAGE:
            continue
        if values.get("version") != version:
            raise EngineUnavailableError(
                f"--web needs {PACKAGE} {version}, and {place} is version {shown(values.get('version'))}: {install}"
            )
        for name in (name for build in BUILDS.values() for name in (build.script, build.loader, build.binary)):
            if not (place / "dist" / name).is_file():
                raise EngineUnavailableError(f"{place} is incomplete, dist/{name} is missing: {install}")
        return place
    raise EngineUnavailableError(f"--web needs the npm package {PACKAGE}, which is not in {where}: {install}")


def read_package(file: Path) -> dict[str, Any]:
    """A package.json; {} if there is none, or none that can be read."""
    from dsd_serve.checkpoint import read_text

    try:
        values = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError, DSDError):
        return {}
    return values if isinstance(values, dict) else {}
