"""dsd-generate and dsd-image as a shell runs them, in this process or in one of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.data import ROOT

GENERATE, IMAGE = "dsd_serve.shell.generate_command", "dsd_serve.shell.image_command"


def start(module: str, *arguments: object, **options: Any) -> "subprocess.Popen[bytes]":
    """A process of its own in the root of the project, whose stdout is buffered as a user's is."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        command, **{"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    )


def finish(process: "subprocess.Popen[bytes]") -> tuple[int, bytes, str]:
    """(exit status, stdout, stderr) of a process that ends."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err.decode()


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder by path, without manifests."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".json"
    }
