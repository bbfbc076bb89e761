"""A real Triton on the CPU, without Docker, for demonstrations, tests and benchmarks.

    python -m tools.tritonserver --install     installs the binary in .triton (a download of 55 MB)
    python -m tools.tritonserver [ARGUMENTS]   runs Triton with the demo model, and dsd-serve ARGUMENTS in front of it

The binary and its libraries come from the wheel nvidia-pytriton; the rest of it is unused. The wheel requires numpy
< 2, so it is installed in a separate folder. Triton's Python backend runs this version of Python with the packages of
this environment.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from dsd_serve.files import demo_model

WHEEL = "nvidia-pytriton==0.7.0"
FOLDER = Path(os.environ.get("DSD_TRITON_FOLDER", ".triton"))  # DSD_TRITON is a setting of the server
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
START_SECONDS = 120


class TritonMissing(Exception):
    """Triton is not installed or does not run; the text says how to fix it."""


def install(folder: Path = FOLDER) -> None:
    """Download the wheel into the folder and make its binaries executable."""
    if not (folder / "pytriton").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), WHEEL], check=True)
    root = folder / "pytriton" / "tritonserver"
    stub = root / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    if not stub.exists():
        raise TritonMissing(f"{WHEEL} has no Python backend for Python {VERSION}; use Python 3.8 to 3.13")
    shutil.copy(stub, root / "backends" / "python")
    for file in (root / "bin" / "tritonserver", root / "backends" / "python" / stub.name):
        file.chmod(0o755)


def binary(folder: Path = FOLDER) -> Path:
    """The installed tritonserver. Raises TritonMissing."""
    file = (folder / "pytriton" / "tritonserver" / "bin" / "tritonserver").resolve()
    if not (file.parents[1] / "backends" / "python" / "triton_python_backend_stub").exists():
        raise TritonMissing(f"no Triton in {folder}; make test-triton installs it")
    return file


def write_repository(model: Path, repository: Path) -> None:
    """Write a repository for the CPU with dsd-export, in a separate process, because it imports torch."""
    command = [sys.executable, "-m", "export", str(model), "--triton", str(repository), "--triton-device", "cpu"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TritonServer:
    """A tritonserver process with a model repository. Use it as a context manager, or call `stop`.

    log: file for its output. ports: for HTTP, gRPC and metrics; None picks free ones.
    """

    def __init__(self, repository: Path, log: Path, ports: tuple[int, int, int] | None = None) -> None:
        self.repository, self.log = repository, log
        self.ports = ports or (free_port(), free_port(), free_port())
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports[1]}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def backends(self) -> list[int]:
        """Process ids of its Python backend, one per instance."""
        pids = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, _, rest = status.read_text().partition("(")[2].rpartition(")")
                if name.startswith("triton_python") and int(rest.split()[1]) == self.pid:
                    pids.append(int(status.parent.name))
        return pids

    @property
    def engines(self) -> list[int]:
        """Process ids of the engine processes of its instances."""
        pids: list[int] = []
        for backend in self.backends:
            for children in Path(f"/proc/{backend}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    pids += map(int, children.read_text().split())
        return pids

    def start(self) -> None:
        """Start it and wait until the model is ready. Raises TritonMissing when it ends or takes too long."""
        file = binary()
        root = file.parents[1]
        names = ("http", "grpc", "metrics")
        ports = [f"--{name}-port={port}" for name, port in zip(names, self.ports, strict=True)]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(root.parents[1] / "nvidia_pytriton.libs"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # on which the backend looks for Python
        }
        command = [str(file), f"--backend-directory={root / 'backends'}", f"--model-repository={self.repository}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *ports, "--exit-timeout-secs=5"],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise TritonMissing("Triton did not start:\n" + self.log.read_text(errors="replace")[-3000:])
            time.sleep(0.1)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.http}/v2/models/dsd/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """Kill Triton with SIGKILL, and then its orphaned backends."""
        self.end(signal.SIGKILL)

    def stop(self) -> None:
        self.end(signal.SIGTERM)

    def end(self, how: signal.Signals) -> None:
        if self.process is None:
            return
        backends = self.backends
        self.process.send_signal(how)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
        for pid in backends:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process = None

    def __enter__(self) -> "TritonServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tritonserver", description=__doc__.split("\n")[0])
    parser.add_argument("--install", action="store_true", help="only install the binary if it is missing")
    parser.add_argument("--model", type=Path, default=demo_model(), help="model directory (default: the demo model)")
    options, more = parser.parse_known_args()
    try:
        install()
        if not options.install:
            serve(options.model, more)
    except TritonMissing as error:
        sys.exit(f"tritonserver: {error}")


def serve(model: Path, arguments: list[str]) -> None:
    """Run Triton on ports 8010 to 8012, and dsd-serve in front of it, until a signal ends them."""
    repository = FOLDER / "repository"
    write_repository(model, repository)
    with TritonServer(repository, FOLDER / "triton.log", (8010, 8011, 8012)) as triton:
        print(f"Triton: {triton.http}/v2, log: {triton.log}", flush=True)
        front = subprocess.Popen([sys.executable, "-m", "server.main", "--triton", triton.grpc, *arguments])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: front.send_signal(number))
        front.wait()


if __name__ == "__main__":
    main()
