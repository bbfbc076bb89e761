"""A real Triton on the CPU, without Docker: for people who want to see it, for tests and for measurements.

    python -m tools.tritonserver --install     puts the binary into .triton (55 MB to download)
    python -m tools.tritonserver [ARGUMENTS]   Triton with the demo model, and before it dsd-serve ARGUMENTS

The binary and its libraries come with the wheel nvidia-pytriton, of which nothing else is used. It wants numpy below 2,
so it is put into a folder of its own. Its Python backend runs the Python of this version, with the packages of this
environment.
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
    """There is no Triton here; the text says how to get one."""


def install(folder: Path = FOLDER) -> None:
    """Download the wheel into the folder, and make ready what is in it."""
    if not (folder / "pytriton").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), WHEEL], check=True)
    root = folder / "pytriton" / "tritonserver"
    stub = root / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    if not stub.exists():
        raise TritonMissing(f"{WHEEL} has no Python backend for Python {VERSION}; use one of 3.8 to 3.13")
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
    """What dsd-export writes, for the CPU; in a process, because it imports torch."""
    command = [sys.executable, "-m", "export", str(model), "--triton", str(repository), "--triton-device", "cpu"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class TritonServer:
    """A tritonserver process with a model repository. Use it as a context, or call `stop`.

    ports: of HTTP, gRPC and metrics; free ones without. log: where its output goes.
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
        """The processes of its Python backend, one per instance."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, _, rest = status.read_text().partition("(")[2].rpartition(")")
                if name.startswith("triton_python") and int(rest.split()[1]) == self.pid:
                    found.append(int(status.parent.name))
        return found

    def start(self) -> None:
        """Start it, and wait until the model is ready. Raises TritonMissing when it ends instead."""
        file = binary()
        root = file.parents[1]
        names = ("http", "grpc", "metrics")
        ports = [f"--{name}-port={port}" for name, port in zip(names, self.ports, strict=True)]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(root.parents[1] / "nvidia_pytriton.libs"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # where the backend looks for its Python
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
        """kill -9 of Triton; its backend, which finds itself alone, too."""
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
    parser.add_argument("--install", action="store_true", help="only install the binary, where it is missing")
    parser.add_argument("--model", type=Path, default=demo_model(), help="model directory (default: the demo model)")
    options, more = parser.parse_known_args()
    try:
        install()
        if not options.install:
            serve(options.model, more)
    except TritonMissing as error:
        sys.exit(f"tritonserver: {error}")


def serve(model: Path, arguments: list[str]) -> None:
    """Triton on the ports 8010 to 8012, and dsd-serve before it, until a signal ends them."""
    repository = FOLDER / "repository"
    write_repository(model, repository)
    with TritonServer(repository, FOLDER / "triton.log", (8010, 8011, 8012)) as triton:
        print(f"Triton: {triton.http}/v2, its log {triton.log}", flush=True)
        front = subprocess.Popen([sys.executable, "-m", "server.main", "--triton", triton.grpc, *arguments])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda got, _: front.send_signal(got))
        front.wait()


if __name__ == "__main__":
    main()
