"""The loop of training and distillation: steps, records, evaluations and saves, until a run is done or interrupted."""

import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dsd_serve.checkpoint import read_checkpoint
from dsd_serve.errors import ConfigError
from training.device import Device, averaged
from training.journal import Journal
from training.run_config import RunConfig
from training.state import State
from training.step import lr_at


class StopSignal:
    """A flag that SIGINT or SIGTERM sets; a second signal exits at once."""

    def __init__(self) -> None:
        self.caught = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number: int, _: Any) -> None:
        if self.caught:
            sys.exit(128 + number)
        self.caught = True

    def caught_anywhere(self, where: Device) -> bool:
        """Whether any process caught a signal: all must stop after the same step. Does not wait for a GPU."""
        if where.world == 1:
            return self.caught
        flag = torch.tensor([self.caught], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


@dataclass
class Work:
    """The functions of a run that differ between training and distillation.

    step: one optimiser step; its losses. evaluate: measures, and writes to the journal and the bar; called by the first
    process. save: writes the checkpoint; as evaluate. saved: called by every process after a save. rate: the key in the
    journal for images per second.
    """

    step: Callable[[], Mapping[str, Tensor]]
    evaluate: Callable[[Any], None]
    save: Callable[[], None]
    saved: Callable[[], None] = lambda: None
    rate: str = "images_per_second"


def run_loop(state: State, config: RunConfig, where: Device, journal: Journal, checkpoint: Path, work: Work) -> bool:
    """Run until the last step or a signal; returns whether a signal stopped it before the last step.

    checkpoint: the file that `work.save` writes, for the sentence about a gradient that is not finite.
    """
    first = where.rank == 0
    began, began_step, stop = time.perf_counter(), state.step, StopSignal()
    with tqdm(total=config.optim.steps, initial=state.step, unit="step", disable=not first, dynamic_ncols=True) as bar:
        while True:
            done = state.step >= config.optim.steps
            stopping = stop.caught_anywhere(where)
            evaluating = done or (state.step % config.run.eval_every == 0 and not stopping)
            saving = done or stopping or (state.step % config.run.save_every == 0 and state.step > 0)
            if where.device.type == "cpu" or evaluating or saving:  # on a GPU the check waits for the device
                check_finite(state, checkpoint)
            if first and evaluating:
                work.evaluate(bar)
                began, began_step = time.perf_counter(), state.step
            if first and saving:
                work.save()
            if saving:
                work.saved()
            if done or stopping:
                break

            losses = work.step()

            bar.update()
            if state.step % config.run.log_every == 0:
                check_finite(state, checkpoint)
                values = averaged(dict(losses), where)
                rate = (state.step - began_step) * config.optim.batch_size / (time.perf_counter() - began)
                journal.write(state.step, {**values, "lr": lr_at(state.step, config.optim), work.rate: rate})
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.0f} images/s")
    return stopping and not done


def leave_group(where: Device) -> None:
    """End the process group, when all processes are done."""
    if where.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def check_finite(state: State, checkpoint: Path) -> None:
    """Raise ConfigError if a gradient was infinite or NaN. Called before every save."""
    if state.finite is None or bool(state.finite):
        return
    kept = "nothing was saved yet"
    if checkpoint.exists():
        kept = f"the earlier {checkpoint} of step {read_checkpoint(checkpoint)['step']} is kept"
    raise ConfigError(
        f"the gradient is not finite at step {state.step}; {kept}; resume with a lower optim.lr or run.precision=fp32"
    )


def remove_unfinished(folder: Path) -> None:
    """Remove what a process left that was killed while it saved."""
    for unfinished in folder.glob(".checkpoint.pt.*.tmp"):
        unfinished.unlink()
