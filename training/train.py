"""dsd-train: train a DSD network.

dsd-train training/configs/NAME.toml [section.key=value ...]

The run folder holds checkpoint.pt, metrics.jsonl, TensorBoard events and PNG grids. Ctrl-C or SIGTERM saves a
checkpoint and exits; rerun the same command to resume from it, bit-exact on a CPU.
Several devices: torchrun --nproc-per-node N -m training training/configs/NAME.toml
Several machines: the same on each, with torchrun's --nnodes and --rdzv-endpoint, and run.dir on a shared disk.
A run may resume with another number of processes: the batch, its images and its noise do not depend on it.
A first configuration for a set of images: dsd-train init IMAGES
The cost of a run, before there are any images: dsd-train CONFIG --dry-run
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsd_serve import __version__
from training.dataset import Images, load_images, sample_of
from training.device import Device, agree_on_step, choose_device, distributed
from training.ending import in_a_sentence
from training.inventory import added_or_removed, lines, report_broken
from training.journal import Journal, evaluate, report
from training.loop import Work, leave_group, remove_unfinished, run_loop
from training.monitor import Monitor
from training.order import open_batches
from training.run_config import TrainConfig, load_config
from training.state import State, new_state, restore, save, start_from
from training.step import train_step
from training.transfer import start_place

log = logging.getLogger(__name__)


def announce(state: State, config: TrainConfig, where: Device, training: Images, held: Images) -> None:
    """Log the data, network and device of the run."""
    for line in lines(training, held):
        log.info("%s", line)
    for line in added_or_removed(training, state.num_images):
        log.warning("%s", line)
    log.info(
        "%s: images %s; %.1fM parameters on %s, %s%s; %s",
        config.run.dir,
        "in memory" if training.pixels is not None else f"decoded by {config.data.num_workers} processes",
        sum(p.numel() for p in state.objective.model.parameters()) / 1e6,
        where.device,
        "bf16" if where.bf16 else "fp32",
        ", compiled" if where.compiled else "",
        f"resumes after step {state.step}" if state.step else "starts",
    )


def train(config: TrainConfig) -> State:
    """Train, and return the state after the last step or where a signal stopped the run."""
    where = choose_device(config, config.network_config())
    first = where.rank == 0
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    if first:
        remove_unfinished(folder)
    training, held = load_images(config)
    config = config.with_classes(training.table.num_classes, training.table.names, training.classes)
    state = new_state(config, where.device)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        restore(state, checkpoint)
    elif config.run.start_from:
        start_from(state, start_place(config.run.start_from))
    agree_on_step(state.step, where)
    if first:
        announce(state, config, where, training, held)
    state.num_images = len(training)
    report_broken((training, held), folder, where)
    forward = distributed(state.objective, where)
    batches = open_batches(training, config, where, state.step)
    journal = Journal(folder, first, state.step)
    monitor = Monitor(config.monitor, state.ema.config.latent_dim, journal.past)
    seen = sample_of(training, len(held)) if first else None

    def measure(bar: Any) -> None:
        assert seen is not None
        report(state.step, evaluate(state, config, held, seen, folder), journal, monitor, bar)

    work = Work(
        step=lambda: train_step(state, forward, config, where, batches),
        evaluate=measure,
        save=lambda: save(state, config, checkpoint),
        saved=lambda: report_broken((training, held), folder, where) if training.pixels is None else None,
    )
    stopped = run_loop(state, config, where, journal, checkpoint, work)
    if first:
        log.info("%s after step %d; checkpoint %s", "stopped" if stopped else "done", state.step, checkpoint)
    leave_group(where)
    return state


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["init"]:
        from training.first_config import main as write_config

        write_config(arguments[1:])
        return
    parser = argparse.ArgumentParser(
        prog="dsd-train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("config", type=Path, help="a TOML file, see training/configs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that override the file")
    parser.add_argument("--dry-run", action="store_true", help="print the cost of the run; needs no data")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with in_a_sentence("dsd-train"):
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            from training.estimate import dry_run

            for line in dry_run(config):
                print(line, flush=True)
            return
        train(config)
