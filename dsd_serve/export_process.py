"""dsd-export in a separate process, for applications that may not import it: the command and its requirements."""

import importlib.util
import os
import sys
from pathlib import Path

NEEDED = ("torch", "onnx", "onnxscript", "ml_dtypes", "safetensors")  # packages


def missing_packages() -> list[str]:
    """The packages that dsd-export needs and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def export_command(checkpoint: Path, target: Path, *options: str) -> list[str]:
    """The command that makes the model directory `target` of a checkpoint.

    -P: never the modules of the folder that this process happens to be in, but those that it has itself, with
    `export_environment`.
    """
    return [sys.executable, "-P", "-m", "export", str(checkpoint), "-o", str(target), *options]


def export_environment() -> dict[str, str]:
    """The environment of `export_command`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
