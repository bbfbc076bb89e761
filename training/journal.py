"""The record of a run: metrics.jsonl, TensorBoard, and grids of images at every evaluation."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsd_serve.engines.torch_engine import TorchEngine
from dsd_serve.files import atomic
from dsd_serve.imaging import codec
from dsd_serve.params import SamplingParams
from dsd_serve.programs import generate, run_all
from training.dataset import Images
from training.monitor import Monitor, denoised_psnr, latent_metrics
from training.run_config import TrainConfig
from training.state import State


def evaluate(state: State, config: TrainConfig, held: Images, seen: Images, folder: Path) -> dict[str, float]:
    """Metrics of the EMA network on held-out images, and psnr_0.5 of training images `seen` beside theirs.

    Writes grids of reconstructions and samples as PNG.
    """
    assert held.pixels is not None and seen.pixels is not None
    pixels, labels = torch.from_numpy(held.pixels), torch.from_numpy(held.labels)
    numbers, reconstructed = latent_metrics(state.ema, pixels)
    numbers["psnr_0.5"] = denoised_psnr(state.ema, pixels, labels, 0.5)
    numbers["training_psnr_0.5"] = denoised_psnr(
        state.ema, torch.from_numpy(seen.pixels), torch.from_numpy(seen.labels), 0.5
    )
    pairs = [part.numpy() for pair in zip(pixels[:32], reconstructed[:32], strict=True) for part in pair]
    write_png(folder / f"reconstructions-{state.step:07d}.png", pairs, columns=8)
    if not config.run.samples_per_class:
        return numbers
    network = state.ema.config
    classes = network.trained_classes[:10] or (network.null_label,)
    params = [
        SamplingParams(
            seed=config.run.seed,
            index=i,
            num_steps=config.run.sample_steps,
            guidance_scale=config.run.sample_guidance if network.num_classes else 1.0,
        )
        for i in range(config.run.samples_per_class)
    ]
    programs = [generate(network, label, p) for label in classes for p in params]
    images = run_all(TorchEngine(state.ema), programs)
    write_png(folder / f"samples-{state.step:07d}.png", images, columns=config.run.samples_per_class)
    return numbers


def write_png(path: Path, images: Sequence[Any], columns: int) -> None:
    path.write_bytes(codec.write_image(codec.grid(list(images), columns)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, [] without one. What a machine that crashed left of a line is skipped."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                found.append(values)
    return found


class Journal:
    """metrics.jsonl, and TensorBoard where it is installed; silent on all but the first process.

    past: the lines of earlier parts of the run.
    """

    def __init__(self, folder: Path, first: bool, step: int) -> None:
        self.file = self.board = None
        self.past: list[dict[str, Any]] = []
        if not first:
            return
        path = folder / "metrics.jsonl"
        self.past = [line for line in read_lines(path) if line["step"] <= step]
        with atomic(path) as temporary:  # steps after the checkpoint run again
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.past), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=step)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in numbers.items()}}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)

    def warn(self, step: int, sentence: str) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, "warning": sentence}) + "\n")
            self.file.flush()
        if self.board is not None:
            self.board.add_text("warning", sentence, step)


def report(step: int, numbers: dict[str, float], journal: Journal, monitor: Monitor, bar: Any) -> None:
    """Log and print an evaluation, with a warning for each threshold that it crosses; none at step 0."""
    journal.write(step, {**numbers, **monitor.floors()})
    bar.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    for sentence in monitor.warnings(numbers) if step else ():
        journal.warn(step, sentence)
        bar.write(f"WARNING: {sentence}")
