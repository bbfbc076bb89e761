"""Check the `cpu` image: python3 tools/check_image.py [IMAGE [ENGINE]]

Starts the image as its own user on a read-only root file system and checks that it generates an image, passes its
health check and drains at SIGTERM; that it is small and contains no torch, no compiler and no trace of the machine that
built it; and that its SBOM lists the installed libraries, in the versions of locks/. Needs only Python, and docker or
podman. buildah cannot start containers, so its images run in a mount namespace, which needs root. RUN_ARGS: further
arguments of docker run or podman run.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ENGINES = ("docker", "podman", "buildah")
MAX_MB = 600
PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
FORBIDDEN = re.compile(
    r"/(site|dist)-packages/(torch|triton|gradio)/"
    r"|/bin/(\S*-)?(gcc|g\+\+|cc|c\+\+|clang|ld|make|nvcc)(-\d+)?$"
)
CONFIGURATION = re.compile(
    r"/(pip\.conf|\.netrc|\.pypirc|uv\.toml|auth\.conf|\.gitconfig|\.git|99mmdebstrap)$|/\.(docker|aws|ssh)/"
)


def output_of(*command: str, timeout: float | None = None) -> str:
    """The standard output of a command. Raises CalledProcessError."""
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=timeout).stdout.strip()


class Container:
    """An image in docker or podman, and a container of it."""

    def __init__(self, engine: str, image: str) -> None:
        self.engine, self.image, self.id = engine, image, ""
        facts = json.loads(output_of(engine, "image", "inspect", image))[0]
        self.size = facts["Size"]
        self.config = facts["Config"]
        self.health = (self.config.get("Healthcheck") or facts["Healthcheck"])["Test"]  # docker; podman

    def files(self, into: Path) -> None:
        """Unpack the file system of the image."""
        container = output_of(self.engine, "create", self.image)
        try:
            with (
                subprocess.Popen([self.engine, "export", container], stdout=subprocess.PIPE) as process,
                tarfile.open(fileobj=process.stdout, mode="r|") as archive,
            ):
                archive.extractall(into, filter="tar")
        finally:
            output_of(self.engine, "rm", container)

    def start(self, port: int) -> None:
        self.id = output_of(
            self.engine, "run", "--detach", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL",
            "--security-opt", "no-new-privileges", "--network", "host", "--env", f"DSD_PORT={port}",
            "--env", "DSD_LOG_LEVEL=warning", *shlex.split(os.environ.get("RUN_ARGS", "")), self.image,
        )  # fmt: skip

    def run(self, *command: str) -> int:
        return subprocess.run([self.engine, "exec", self.id, *command]).returncode

    def user(self) -> str:
        return output_of(self.engine, "exec", self.id, "python", "-c", "import os; print(os.getuid())")

    def terminate(self) -> None:
        output_of(self.engine, "kill", "--signal", self.config.get("StopSignal") or "SIGTERM", self.id)

    def wait(self, seconds: float) -> int:
        return int(output_of(self.engine, "wait", self.id, timeout=seconds))

    def remove(self) -> None:
        if self.id:
            subprocess.run([self.engine, "logs", self.id])
            output_of(self.engine, "rm", "--force", self.id)


class Rootfs:
    """A mounted image of buildah. Its entry point runs in a chroot, as its user, on a read-only root."""

    # Mounts belong to the new namespace and vanish with it. exec keeps the process, so that signals reach the server.
    ENTER = """
        mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && mount -t tmpfs -o mode=1777 tmpfs "$1/tmp" &&
        mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && cd / || exit 99
        root=$1 user=$2; shift 2; exec chroot --userspec="$user" "$root" "$@"
    """

    process: "subprocess.Popen[bytes] | None" = None

    def __init__(self, image: str) -> None:
        self.image = image
        self.config = json.loads(output_of("buildah", "inspect", "--type", "image", image))["Docker"]["config"]
        self.health = self.config["Healthcheck"]["Test"]
        self.container = output_of("buildah", "from", "--pull-never", image)
        self.root = Path(output_of("buildah", "mount", self.container))
        self.size = int(output_of("du", "-xsb", str(self.root)).split()[0])

    def files(self, into: Path) -> None:
        subprocess.run(["cp", "-a", f"{self.root}/.", str(into)], check=True)

    def command(self, *command: str) -> list[str]:
        environment = ["env", "-i", *self.config["Env"], f"DSD_PORT={self.port}", "DSD_LOG_LEVEL=warning"]
        enter = ["unshare", "--mount", "sh", "-c", self.ENTER, "sh", str(self.root), self.config["User"]]
        return [*enter, *environment, *command]

    @property
    def running(self) -> "subprocess.Popen[bytes]":
        """The process of the entry point, once it has been started."""
        assert self.process is not None
        return self.process

    def start(self, port: int) -> None:
        self.port = port
        self.process = subprocess.Popen(self.command(*self.config["Entrypoint"]))

    def run(self, *command: str) -> int:
        return subprocess.run(self.command(*command)).returncode

    def user(self) -> str:
        status = Path(f"/proc/{self.running.pid}/status").read_text()
        return status.split("Uid:")[1].split()[1]

    def terminate(self) -> None:
        self.running.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        return self.running.wait(seconds)

    def remove(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        output_of("buildah", "umount", self.container)
        output_of("buildah", "rm", self.container)


def check(what: str, holds: bool, detail: object = "") -> None:
    """Print a result. Raises SystemExit when the check fails."""
    print(f"{'ok  ' if holds else 'FAIL'}  {what}{f': {detail}' if detail != '' else ''}", flush=True)
    if not holds:
        raise SystemExit(1)


def get(port: int, path: str, timeout: float = 60) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def check_files(root: Path) -> None:
    paths = ["/" + str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.name == ".git"]
    check("files", len(paths) > 1000, len(paths))
    for what, pattern in (("no torch, no compiler", FORBIDDEN), ("no configuration of this machine", CONFIGURATION)):
        matches = [path for path in paths if pattern.search(path)]
        check(what, not matches, ", ".join(matches[:5]))

    # Certificates: only those of Debian and certifi, and none that only the build machine trusts.
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    shipped = "".join(file.read_text() for file in (root / "usr/share/ca-certificates").rglob("*.crt"))
    known = set(PEM.findall(shipped))
    inside = set(PEM.findall(bundle.read_text())) if bundle.exists() else set()
    check("its certificates are Debian's", inside <= known, f"{len(inside)} of {len(known)}")
    added = [path for path in paths if path.startswith("/usr/local/share/ca-certificates/")]
    check("no certificates were added", not added, ", ".join(added))
    mine = Path("/etc/ssl/certs/ca-certificates.crt")
    own = set(PEM.findall(mine.read_text(errors="replace"))) - known if mine.exists() else set()
    texts = [path for path in (root / p[1:] for p in paths) if path.suffix in (".pem", ".crt", ".cer", ".conf")]
    public = (root / "opt/dsd/lib").glob("python3*/site-packages/certifi/cacert.pem")
    inside_image: set[str] = set()
    for path in set(texts) - set(public):
        if not path.is_symlink():  # an absolute link would point outside the image
            inside_image |= set(PEM.findall(path.read_text("latin-1")))
    check("no certificate that only this machine trusts", not own & inside_image, f"{len(own)} checked")
    writable = [path for path in (root / "opt/dsd").rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]
    check("its user cannot write to programs", not writable, ", ".join(map(str, writable[:3])))


def sbom_faults(sbom: dict[str, Any], installed: set[tuple[str, str]], locked: dict[str, str]) -> list[str]:
    """Faults of a CycloneDX SBOM. installed: names and versions; locked: the version of each name."""
    listed = {(plain(one["name"]), one["version"]) for one in sbom["components"]}
    listed |= {(plain(one["name"]), one["version"]) for one in [sbom["metadata"].get("component", {})] if one}
    return [
        *(f"{name} {version} is not listed" for name, version in sorted(installed - listed)),
        *(f"{name} {version} is listed and not installed" for name, version in sorted(listed - installed)),
        *(f"{name} {version} is not the locked {locked[name]}" for name, version in sorted(installed)
          if locked.get(name, version) != version),
    ]  # fmt: skip


def plain(name: str) -> str:
    """The normalised name of a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def check_sbom(root: Path) -> None:
    matches = (re.fullmatch(r"(.+?)-([^-]+)\.dist-info", path.name) for path in root.glob("opt/dsd/lib/*/*-packages/*"))
    installed = {(plain(match[1]), match[2]) for match in matches if match}
    pin = re.compile(r"^([\w.-]+)(?:\[[^]]*\])?==([^\s;]+)", re.MULTILINE)
    locked: dict[str, str] = {}
    for name in ("cpu", "otel"):
        text = (Path(__file__).parents[1] / "locks" / f"{name}.txt").read_text()
        locked |= {plain(package): version for package, version in pin.findall(text)}
    sbom = json.loads((root / "usr/share/sbom/dsd.cdx.json").read_text())
    faults = sbom_faults(sbom, installed, locked)
    check(
        "its SBOM",
        len(installed) > 20 and not faults,
        "; ".join(faults[:3]) or f"{len(installed)} libraries",
    )


def check_serving(container: Container | Rootfs) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    container.start(port)
    health = container.health[1:]  # after CMD
    while get(port, "/health/ready")[0] != 200:
        check("starts within 60 s", time.monotonic() - began < 60) if time.monotonic() - began > 60 else time.sleep(0.1)
    check("ready", True, f"after {time.monotonic() - began:.1f} s")
    check("runs as a user without rights", container.user() not in ("0", ""), container.user())
    touch = "import errno, sys\ntry: open('/model/x', 'w')\nexcept OSError as e: sys.exit(e.errno != errno.EROFS)"
    check("its root is read-only", container.run("python", "-c", touch + "\nelse: sys.exit(1)") == 0)
    status, body = get(port, "/generate?class=207")
    check("GET /generate?class=207", status == 200 and body[:8] == b"\x89PNG\r\n\x1a\n", f"{status}, {len(body)} bytes")
    check("its health check", container.run(*health) == 0)

    # A request in flight at SIGTERM is finished, new ones are refused, and the exit code is 0.
    with tempfile.NamedTemporaryFile() as answer:
        slow = f"http://127.0.0.1:{port}/generate?class=207&steps=250&n=16&guidance=3"
        fetch = "import sys, urllib.request as u; open(sys.argv[2], 'wb').write(u.urlopen(sys.argv[1]).read())"
        request = subprocess.Popen([sys.executable, "-c", fetch, slow, answer.name])
        while not re.search(rb"dsd_images_running [1-9]", get(port, "/metrics")[1]) and request.poll() is None:
            time.sleep(0.1)
        container.terminate()
        time.sleep(0.3)
        check("refuses while it drains", get(port, "/generate?class=1")[0] == 503)
        check("its health check fails meanwhile", container.run(*health) != 0)
        check("finishes requests in flight", request.wait(60) == 0 and Path(answer.name).stat().st_size > 100)
    code = container.wait(45)
    check("SIGTERM ends it with 0", code == 0, code)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tools/check_image.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("image", nargs="?", default="dsd:cpu")
    parser.add_argument("engine", nargs="?", choices=ENGINES, help="by default the first that works")
    options = parser.parse_args()
    image = options.image
    names = [options.engine] if options.engine else ENGINES
    for name in names:
        works = ["info"] if name != "buildah" else ["images"]
        if shutil.which(name) and not subprocess.run([name, *works], capture_output=True).returncode:
            break
    else:
        parser.error(f"{' or '.join(names)} is needed and does not work here: the image was NOT checked")
    try:
        container = Rootfs(image) if name == "buildah" else Container(name, image)
    except subprocess.CalledProcessError as error:
        parser.error(f"{name} has no image {image} (exit code {error.returncode}): build it with make image")
    began = time.monotonic()
    try:
        check("size", container.size < MAX_MB * 1e6, f"{container.size / 1e6:.0f} MB, at most {MAX_MB}")
        user = container.config["User"]
        check("its user is a number", re.fullmatch(r"[1-9]\d*(:\d+)?", user) is not None, user)
        with tempfile.TemporaryDirectory() as folder:
            container.files(Path(folder))
            check_files(Path(folder))
            check_sbom(Path(folder))
        check_serving(container)
    finally:
        container.remove()
    print(f"{image} passed, checked with {name} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
