"""The same seeds drawn by each checkpoint of a training run, as PNG files in its folder."""

import json
import logging
import re
import threading
import time
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, replace
from pathlib import Path

from dsd_serve.backends import Job, ModelInfo
from dsd_serve.errors import DSDError, QueueFullError
from dsd_serve.files import atomic
from dsd_serve.imaging import codec
from dsd_serve.imaging.provenance import settings_of
from dsd_serve.labels import ImageClass
from dsd_serve.params import to_api
from dsd_serve.programs import Generate
from server.model_slot import Served

log = logging.getLogger(__name__)

IMAGES = 8  # of each checkpoint
CLASSES = 4  # at most; each has as many seeds as there is room for
GUIDANCE = 2.0  # at least: early checkpoints draw little without it
MAX_CHECKPOINTS = 48  # shown; older ones are thinned out
MAX_FILE = 20_000_000  # bytes of a file from before
NAME, FINGERPRINT = re.compile(r"watched-([0-9]{7,16})\.png"), re.compile("[0-9a-f]{64}")
ATTEMPTS = 20  # to find room in the queue, with a pause of a few seconds after each


@dataclass(frozen=True)
class Drawn:
    """The images of one checkpoint, one below the other in one PNG. created: in seconds since 1970."""

    step: int
    fingerprint: str
    created: int
    png: bytes


class CheckpointStrip:
    """The images of the checkpoints of a run, by step; at most MAX_CHECKPOINTS, the first and the newest among them.

    They are kept in the run's folder as watched-STEP.png, from which a new server reads them.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.lock = threading.Lock()
        self.drawn: dict[int, Drawn] = {}
        self.classes: list[ImageClass] = []
        self.seeds: list[int] = []
        self.read()

    def read(self) -> None:
        """Read the files of an earlier server; what cannot be read is left out."""
        for file in sorted(self.run.glob("watched-*.png"))[-MAX_CHECKPOINTS:]:
            try:
                match = NAME.fullmatch(file.name)
                if match is None or file.stat().st_size > MAX_FILE:
                    continue
                png = file.read_bytes()
                codec.read_image(png)  # raises for a damaged one
                about = settings_of(png) or {}
                if not FINGERPRINT.fullmatch(about["fingerprint"]):
                    continue
                one = Drawn(int(match[1]), about["fingerprint"], int(file.stat().st_mtime), png)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, DSDError):
                continue
            self.drawn[one.step] = one

    def plan(self, info: ModelInfo) -> list[Generate]:
        """The images to draw: the same for all checkpoints of a run, because its classes do not change."""
        trained = info.table.trained
        count = min(CLASSES, len(trained))
        self.classes = [trained[round(i * (len(trained) - 1) / max(1, count - 1))] for i in range(count)]
        self.seeds = list(range(1, IMAGES // max(1, count) + 1))
        defaults = info.defaults
        if self.classes:
            defaults = replace(defaults, guidance_scale=max(GUIDANCE, defaults.guidance_scale))
        labels = [one.index for one in self.classes] or [info.config.null_label]
        return [Generate(label, replace(defaults, seed=seed, index=0)) for label in labels for seed in self.seeds]

    def draw(self, served: Served, step: int, ended: threading.Event) -> None:
        """Draw and keep the images of a step; until `ended` is set. Raises DSDError."""
        tasks = self.plan(served.info)
        jobs: list[Job] = []
        for _ in range(ATTEMPTS):
            try:
                jobs = list(served.backend.submit_tasks(tasks))
                break
            except QueueFullError as error:
                if ended.wait(min(5.0, max(1.0, error.retry_after))):
                    return
        else:
            log.warning("step %d is not in the strip: the queue had no room for its images", step)
            return
        images = []
        for job in jobs:
            while True:
                try:
                    images.append(job.future.result(0.5))
                    break
                except NotYet:
                    if ended.is_set():
                        return
        about = {
            **{"step": step, "model": served.info.name, "fingerprint": served.info.fingerprint},
            **{"classes": [one.index for one in self.classes], "seeds": self.seeds, **to_api(tasks[0].params)},
        }
        png = codec.encode(codec.sheet(images, columns=1), "png", json.dumps(about))
        self.keep(Drawn(step, served.info.fingerprint, int(time.time()), png))

    def keep(self, one: Drawn) -> None:
        """Add the images of a step. A run that has begun again replaces the steps that it has not reached."""
        with self.lock:
            obsolete = [step for step in self.drawn if step > one.step]
            kept = {step: drawn for step, drawn in self.drawn.items() if step < one.step} | {one.step: one}
            while len(kept) > MAX_CHECKPOINTS:
                steps = sorted(kept)  # leave out the one whose neighbours are nearest to each other, but not the ends
                gaps = {steps[i]: steps[i + 1] - steps[i - 1] for i in range(1, len(steps) - 1)}
                obsolete.append(min(gaps, key=gaps.__getitem__))
                del kept[obsolete[-1]]
            self.drawn = kept
        try:
            for step in obsolete:
                self.file_of(step).unlink(missing_ok=True)
            with atomic(self.file_of(one.step)) as temporary:
                temporary.write_bytes(one.png)
        except OSError as error:
            log.warning("the images of step %d are kept in memory only: %s", one.step, error)

    def file_of(self, step: int) -> Path:
        return self.run / f"watched-{step:07d}.png"
