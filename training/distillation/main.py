"""dsd-distill: distil a guided model of many steps into one that draws in one to four, without guidance.

dsd-distill MODEL -o FAST [--config FILE.toml] [section.key=value ...]

MODEL is a model directory, hf:org/name, demo, or a checkpoint.pt of dsd-train. FAST becomes a model directory with a
flow map: its network has the time to jump to as an input, its sampler flow_map needs one row per step, and guidance is
built in. It encodes and decodes as MODEL does. No images are needed: the inputs are noise and classes, the targets are
MODEL's.

The run folder (run.dir, by default runs/FAST) holds checkpoint.pt, metrics.jsonl, TensorBoard events and PNG grids.
Ctrl-C or SIGTERM saves a checkpoint and exits; rerun the same command to resume from it, bit-exact on a CPU.
Several devices: torchrun --nproc-per-node N -m training.distillation MODEL -o FAST
The cost of a run: dsd-distill MODEL --dry-run; MODEL may then also be an untrained preset, such as dsd-b.
"""

import argparse
import json
import logging
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dsd_serve import __version__
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.config import PRESETS
from dsd_serve.errors import CheckpointError, ConfigError, EngineUnavailableError
from dsd_serve.export_process import export_command, export_environment, missing_packages
from training.distillation.distill import distill
from training.distillation.distill_config import DistillConfig, load_distill_config
from training.ending import in_a_sentence

log = logging.getLogger(__name__)


def configuration(options: argparse.Namespace) -> DistillConfig:
    """The configuration of the command line."""
    if any(override.startswith("run.start_from=") for override in options.overrides):
        raise ConfigError("the teacher is the first argument, so run.start_from must be left out")
    given = [f"run.start_from={json.dumps(options.model)}"]
    if options.guidance is not None:
        given.append(f"teacher.guidance={options.guidance}")
    name = (options.output.name if options.output else "") or "fast"
    return load_distill_config(options.config, [*options.overrides, *given], f"runs/{name}")


def check_output(folder: Path | None, model: str) -> Path:
    """The model directory to write. Raises DSDError before the long work."""
    if missing := missing_packages():
        raise EngineUnavailableError(f"the last step, dsd-export, needs {', '.join(missing)}: pip install '.[export]'")
    if folder is None:
        raise ConfigError("give the model directory to write: dsd-distill MODEL -o FAST")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"-o must be a folder, {folder} is a file")
    if folder.exists() and Path(model).exists() and folder.samefile(model):
        raise CheckpointError(f"-o must be another folder than the teacher, which stays as it is, got {folder}")
    if folder.exists() and any(folder.iterdir()) and not read_model_dir(folder).config.flow_map:
        raise CheckpointError(f"-o must be a new folder or a distilled model, {folder} is a model without a flow map")
    return folder


def export(checkpoint: Path, folder: Path) -> None:
    """Run dsd-export, an application of its own, as dsd-serve --watch does. Raises CheckpointError."""
    if subprocess.run(export_command(checkpoint, folder), env=export_environment(), check=False).returncode:
        raise CheckpointError(f"the export failed; {checkpoint} is kept: dsd-export {checkpoint} -o {folder}")


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsd-distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("model", metavar="MODEL", help="the teacher: a directory, hf:org/name, demo or a .pt file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that override the file")
    parser.add_argument("-o", "--output", type=Path, metavar="FAST", help="the model directory to write")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="see training/configs/distill-*.toml")
    parser.add_argument(
        "--guidance", type=float, metavar="SCALE", help="guidance scale to distil (default: MODEL's recommendation)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the cost of the run")
    return parser


def run(options: argparse.Namespace) -> None:
    config = configuration(options)
    if options.dry_run:
        from training.distillation.cost import dry_run

        for line in dry_run(config):
            print(line, flush=True)
        return
    if options.model in PRESETS and not Path(options.model).exists() and options.model != "demo":
        raise ConfigError(f"{options.model} is a preset, which only --dry-run takes: there are no weights to distil")
    folder = check_output(options.output, options.model)
    state, checkpoint, stopped = distill(config)
    if int(os.environ.get("RANK", 0)):
        return
    if stopped:
        log.info("stopped after step %d; the same command resumes, dsd-export %s exports", state.step, checkpoint)
        return
    export(checkpoint, folder)
    log.info("done after step %d: %s", state.step, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_parser().parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with in_a_sentence("dsd-distill"):
        run(options)
