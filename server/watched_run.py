"""--watch RUN: follows a training run; each new checkpoint is exported, served, and draws the seeds of the strip."""

import contextlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from dsd_serve.checkpoint import read_model_dir
from dsd_serve.errors import CheckpointError, ClosedError, ConfigError, DSDError, EngineUnavailableError
from dsd_serve.export_process import export_command, export_environment, missing_packages
from dsd_serve.precision import AUTO, FASTEST_ON_GPU, REFERENCE
from server.checkpoint_strip import CheckpointStrip
from server.model_slot import ENDS, Served, Slot
from server.settings import Settings
from server.watched_directories import Version, version_of

log = logging.getLogger(__name__)

CHECK_EVERY = 1.0  # seconds between two looks at the checkpoint
NICENESS = 5  # of an export: requests come first
STOP_WITHIN = 3.0  # seconds for an export to end when the server does
ENGINES = ("onnx", "torch")  # the others need plans, which take too long to build


class WatchedRun:
    """Follows the folder of a run of dsd-train, in a thread of its own, from `begin` to `close`.

    open: loads a model, as of `Slot`. Raises ConfigError and EngineUnavailableError if the run cannot be followed.
    """

    def __init__(self, settings: Settings, open_: Callable[[str, str], Served], drain_seconds: float) -> None:
        self.settings, self.open, self.drain_seconds = settings, open_, drain_seconds
        self.run = Path(settings.watch)
        check(settings, self.run)
        self.checkpoint = self.run / "checkpoint.pt"
        self.name = self.run.resolve().name
        self.strip = CheckpointStrip(self.run)
        self.seen: Version | None = None
        self.reason = f"waiting for the first checkpoint, {self.checkpoint}"
        self.slot: Slot | None = None
        self.first: Future[Slot] = Future()
        self.ended = threading.Event()
        self.folder = Path(tempfile.mkdtemp(prefix="dsd-watch-"))  # of the exported models
        self.thread = threading.Thread(target=self.follow, name="watch", daemon=True)
        self.thread.start()

    def follow(self) -> None:
        number = 0
        while not self.ended.wait(CHECK_EVERY):
            version = version_of(self.checkpoint)
            if version is None or version == self.seen:
                continue
            self.seen, number = version, number + 1
            target = self.folder / str(number) / self.name
            try:
                self.export(target)
                if self.ended.is_set():
                    break
                self.serve(target)
            except DSDError as error:
                self.fail(error, target)
            except Exception as error:
                log.exception("a checkpoint could not be served")
                self.fail(error, target)
        if not self.first.done():
            self.first.set_exception(ClosedError(ENDS))

    def fail(self, error: Exception, target: Path) -> None:
        if not self.ended.is_set():
            self.reason = f"{self.checkpoint} cannot be served ({error}); waiting for the next checkpoint"
            log.error("%s", self.reason)
        if self.slot is None or self.slot.place != str(target):
            remove(target)

    @property
    def precision(self) -> str:
        """The precision to export in."""
        on_gpu = self.settings.device.startswith("cuda")
        return {AUTO: FASTEST_ON_GPU if on_gpu else REFERENCE}.get(self.settings.precision, self.settings.precision)

    def export(self, target: Path) -> None:
        """Make a model directory of the checkpoint, in a process of its own. Raises CheckpointError."""
        log.info("%s: exporting a new checkpoint", self.run)
        target.parent.mkdir()
        options = ("--name", self.name, "--precision", self.precision, "--class-images", "off")
        output = target.parent / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                export_command(self.checkpoint, target, *options),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=export_environment(),
            )
            try:
                os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
                while process.poll() is None and not self.ended.wait(0.1):
                    pass
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_WITHIN)
            finally:
                process.kill()  # has no effect on one that has ended
                process.wait()
        if process.returncode != 0:
            lines = [f"exit status {process.returncode}", *output.read_text("utf-8", "replace").strip().splitlines()]
            raise CheckpointError(lines[-1][-500:].removeprefix("dsd-export: "))

    def serve(self, target: Path) -> None:
        """Serve the exported model, and draw the images of the strip. Raises DSDError."""
        step = read_model_dir(target).step or 0

        def at_end() -> None:
            remove(target)

        if self.slot is None:
            served = self.open(self.name, str(target))
            served.at_end.append(at_end)
            if self.ended.is_set():
                served.close(0)
                raise ClosedError(ENDS)
            self.slot = Slot(served, str(target), self.open, self.drain_seconds)
            self.strip.plan(served.info)
            self.first.set_result(self.slot)
        else:
            self.slot.replace(str(target), at_end).result()
        log.info("%s: step %d is served", self.run, step)
        used = self.slot.use()
        if used is None:
            return  # it rests already
        try:
            if used.place == str(target):  # not one that POST /admin/model put in its place
                self.strip.draw(used, step, self.ended)
        finally:
            self.slot.release(used)

    def wait(self) -> Slot:
        """Wait for the first model. Raises ClosedError if closed meanwhile."""
        log.info("%s", self.reason)
        return self.first.result()

    def close(self) -> None:
        """End the thread and its export. What is served keeps its files until it is closed."""
        self.ended.set()
        self.thread.join(2 * STOP_WITHIN)

    def clear(self) -> None:
        """Remove the exported models, when nothing is served any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def check(settings: Settings, run: Path) -> None:
    if settings.model or settings.lazy:
        raise ConfigError(f"watch {run} serves the models of that run: leave out model and lazy")
    if not run.is_dir():
        raise ConfigError(f"watch must be the folder of a run of dsd-train, and {run} is not a folder")
    if (run / "config.json").exists():
        raise ConfigError(f"{run} is a model directory, not a run: dsd-serve --model {run} --watch")
    if settings.engine not in ENGINES:
        raise ConfigError(f"watch with a run needs engine {' or '.join(ENGINES)}, got {settings.engine}")
    if missing := missing_packages():
        raise EngineUnavailableError(
            f"watch exports the checkpoints of {run}, which needs {', '.join(missing)}: pip install '.[export]'"
        )


def remove(target: Path) -> None:
    shutil.rmtree(target.parent, ignore_errors=True)
