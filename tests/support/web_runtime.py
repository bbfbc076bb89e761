"""ONNX Runtime Web for tests: the installed npm package, or a package of the same form that cannot run."""

import json
from pathlib import Path

import pytest

from export.web_runtime import BUILDS, PACKAGE, pinned_version
from tests.support.data import ROOT

INSTALLED = ROOT / "export/npm"


def installed_runtime() -> Path:
    """The folder that `make web` installs it into, or a skipped test without it."""
    if not (INSTALLED / "node_modules" / PACKAGE).exists():
        pytest.skip("the tests of the web page need onnxruntime-web: make export/npm/node_modules/.done")
    return INSTALLED


def empty_runtime(folder: Path, version: str = "") -> Path:
    """A folder whose node_modules has the package, with files of a few bytes."""
    package = folder / "node_modules" / PACKAGE
    (package / "dist").mkdir(parents=True)
    values = {"name": PACKAGE, "version": version or pinned_version()}
    (package / "package.json").write_text(json.dumps(values))
    (package / "README.md").write_text("ONNX Runtime Web")
    for name in (name for build in BUILDS.values() for name in (build.script, build.loader, build.binary)):
        (package / "dist" / name).write_bytes(name.encode())
    return folder
