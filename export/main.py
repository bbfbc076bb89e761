"""dsd-export SOURCE [--onnx] [--trt] [--precision fp32|fp16|bf16|int8 ...] [-o DIR]
dsd-export DIR --check [--precision ...] [--device cuda:N]
dsd-export SOURCE --triton REPO [--triton-device gpu|cpu] [--triton-engine onnx|tensorrt] [--triton-precision ...]

Turns a training checkpoint into a model directory: config.json, model.safetensors (the EMA weights), model.onnx (one
graph for encode, denoise and decode rows), model.ort.onnx (the same with ONNX Runtime's own attention) and card.md;
with --precision the same graphs in other precisions, with --trt TensorRT plans of them. SOURCE may also be a model
directory, which then gets what it lacks; no checkpoint is needed for that.

Each graph is checked on mixtures of rows, float32 against the torch network and the others against float32; one that
differs by more than its limits is not written. What is up to date is not made again. The directory changes at once or
not at all: Ctrl-C and a full disk leave what was there, and a directory that was killed half-way is not loaded.
dsd-export --untrained dsd-s -o DIR does the same for random weights, for benchmarks.

With --triton the model directory is also written into a Triton model repository; see export/triton_repository.py.

A plan is run through gates before it is written: finite outputs for every class, errors against float32, rows that do
not depend on their neighbours, a whole generation, the precision that was really built. Where the machine cannot run
it, it says so; dsd-export DIR --check runs them later, on its GPU, and no engine loads the plan before that.
"""

import argparse
import errno
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dsd_serve import __version__
from dsd_serve.checkpoint import PRECISIONS, read_checkpoint, read_model_dir
from dsd_serve.config import PRESETS, ModelConfig
from dsd_serve.engines.plan import HARDWARE
from dsd_serve.errors import CheckpointError, DSDError, EngineUnavailableError
from dsd_serve.network import DSD
from dsd_serve.params import SAMPLER_NAMES, SamplingParams, from_api
from export.build import DTYPES, Network, State, export, network_of
from export.card import training_lines, write_card
from export.commit import Stoppable
from export.triton_repository import DEVICES, ENGINES, write_repository

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_network(options: argparse.Namespace, target: Path) -> Network:
    """The network that the command line names: a checkpoint's, a model directory's, or random weights of a preset."""
    source: Path | None = options.source
    if source and source.is_dir():
        if options.store or options.notes:
            raise CheckpointError(f"--store and --notes are for checkpoints, and {source} is a model directory")
        directory = read_model_dir(source)
        directory.check([directory.weights])
        network = network_of(directory)
        name = options.name or directory.name
        return Network(
            name, network.config, sampling(options, directory.defaults), network.state, network.store, network.card
        )
    values = read_checkpoint(source) if source else untrained(options.untrained)
    store, notes = options.store or "fp32", options.notes.read_text(encoding="utf-8") if options.notes else ""
    config, state = load_ema(values, source or Path(options.untrained), store)
    defaults = sampling(options, SamplingParams(num_steps=25, sampler="heun"))
    name = options.name or (target.resolve().name if options.output else target.resolve().parent.name)
    size = sum(array.size for array in state.values())
    card = write_card(name, config, size, training_lines(values), store, defaults, notes)
    return Network(name, config, defaults, state, store, card)


def sampling(options: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """`defaults` with the settings of the command line."""
    return from_api(vars(options), defaults)


def untrained(preset: str) -> dict[str, Any]:
    """What a checkpoint holds, for random weights. adaLN is not left at zero: the blocks must do something."""
    torch.manual_seed(0)
    model = DSD(PRESETS[preset])
    with torch.no_grad():
        model.adaLN_modulation.weight.normal_(std=0.02)
    return {"step": 0, "network": model.config.to_dict(), "ema": model.state_dict(), "config": None}


def load_ema(values: dict[str, Any], path: Path, store: str) -> tuple[ModelConfig, State]:
    """The EMA network of a checkpoint, its weights rounded to what will be stored."""
    try:
        model = DSD(ModelConfig.from_dict(values["network"]))
        model.load_state_dict(values["ema"])
    except KeyError as error:
        raise CheckpointError(f"{path} is incomplete: it has no {error}") from None
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its own network: {' '.join(str(error).split())[:300]}") from None
    state: State = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.numpy().astype(DTYPES[store]).astype(np.float32)
        if not np.isfinite(state[name]).all():
            raise CheckpointError(f"{path} holds weights that are not finite in {store}")
    return model.config, state


def plan_export() -> ModuleType:
    """The TensorRT export; raises EngineUnavailableError without its packages."""
    try:
        import export.tensorrt.plan_files as plans
    except ImportError as error:
        raise EngineUnavailableError(
            f"TensorRT plans need {error.name or error}: pip install 'dsd-serve[tensorrt]'"
        ) from None
    return plans


def run(options: argparse.Namespace, check: Callable[[], None]) -> Path:
    """Carry out the command line. Returns the model directory. check: raises KeyboardInterrupt when it shall stop."""
    precisions: list[str] = options.precision or ["fp32"]
    if (options.trt or options.check) and "int8" in precisions:
        raise EngineUnavailableError("int8 is for the CPU; TensorRT plans are fp32, fp16 or bf16")
    if options.check:
        if not options.source or not Path(options.source).is_dir():
            raise CheckpointError("--check is for a model directory: dsd-export DIR --check")
        plan_export().check(options.source, tuple(dict.fromkeys(options.precision or ())), options.device)
        return Path(options.source)
    if options.triton and is_finished(options):
        return to_triton(options, options.source)
    builder = plan_export() if options.trt else None
    if builder:  # fails before the long work, not after it
        builder.check_options(builder.find_library(), build_options(builder, options))
    target = default_target(options)
    export(read_network(options, target), target, precisions, options.force, check)
    if builder:
        for precision in dict.fromkeys(precisions):
            check()
            builder.build(target, precision, build_options(builder, options))
    check()
    return to_triton(options, target) if options.triton else target


def is_finished(options: argparse.Namespace) -> bool:
    """Whether the source is a model directory of which nothing new is asked."""
    news = ("precision", "trt", "onnx", "force", "output", "name", "steps", "sampler", "guidance", "store", "notes")
    return options.source is not None and options.source.is_dir() and not any(getattr(options, name) for name in news)


def to_triton(options: argparse.Namespace, directory: Path) -> Path:
    write_repository(
        directory,
        options.triton,
        device=options.triton_device,
        engine=options.triton_engine,
        precision=options.triton_precision,
    )
    return directory


def build_options(builder: ModuleType, options: argparse.Namespace) -> Any:
    return builder.BuildOptions(
        hardware=options.hardware,
        version_compatible=options.version_compatible,
        targets=tuple(options.targets or ()),
        timing_cache=options.timing_cache,
        device=options.device,
        force=options.force,
    )


def default_target(options: argparse.Namespace) -> Path:
    if options.output:
        return Path(options.output)
    if not options.source:
        raise CheckpointError("--untrained needs -o DIR, the model directory to write")
    source = Path(options.source)
    if source.is_dir():
        return source
    target = source.parent / "model"
    log.info("no -o DIR was given: the model directory is %s", target)
    return target


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsd-export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("source", type=Path, nargs="?", help="a checkpoint.pt of dsd-train, or a model directory")
    source.add_argument("--untrained", choices=PRESETS, metavar="PRESET", help="random weights of a preset instead")
    parser.add_argument("--onnx", action="store_true", help="ONNX graphs; always made, all else comes from them")
    parser.add_argument("--trt", action="store_true", help="TensorRT plans too, of each precision")
    parser.add_argument(
        "--precision", nargs="+", action="extend", choices=PRECISIONS, help="one or several (default fp32, always made)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="the model directory to write (default: SOURCE, or the folder `model` beside a checkpoint)",
    )
    room = parser.add_argument_group("Triton")
    room.add_argument("--triton", type=Path, metavar="REPO", help="write the model `dsd` of a Triton model repository")
    room.add_argument("--triton-device", choices=DEVICES, default="gpu", help="one instance per GPU, or the CPU (gpu)")
    room.add_argument("--triton-engine", choices=ENGINES, default="onnx", help="what runs the network there (onnx)")
    room.add_argument("--triton-precision", choices=PRECISIONS, default="fp32", help="in which precision (fp32)")
    plan = parser.add_argument_group("TensorRT plans")
    plan.add_argument("--check", action="store_true", help="run the gates of the plans of a model directory")
    plan.add_argument("--device", default="cuda", help="GPU for that, cuda or cuda:N (default cuda)")
    plan.add_argument(
        "--hardware",
        choices=HARDWARE,
        default=HARDWARE[0],
        help="GPUs that a plan of tensorrt runs on: this model (default, fastest),\nthe same compute capability, or "
        "Ampere and later",
    )
    plan.add_argument(
        "--version-compatible", action="store_true", help="later TensorRT of the same major version loads it"
    )
    plan.add_argument(
        "--targets",
        nargs="+",
        metavar="N.N",
        help="compute capabilities that a plan of tensorrt_rtx is for, as 8.9 12.0\n(default: all that it supports)",
    )
    plan.add_argument("--timing-cache", type=Path, metavar="FILE", help="makes the next build by tensorrt faster")
    parser.add_argument("--force", action="store_true", help="make again what is up to date")
    parser.add_argument("--name", help="the model's name (default: the name of DIR, or what it is)")
    parser.add_argument("--store", choices=DTYPES, help="type of the weights in model.safetensors (default fp32)")
    parser.add_argument("--steps", type=int, help="recommended number of steps (default 25)")
    parser.add_argument("--sampler", choices=SAMPLER_NAMES, help="recommended sampler (default heun)")
    parser.add_argument("--guidance", type=float, help="recommended guidance scale (default 1, off)")
    parser.add_argument("--notes", type=Path, metavar="FILE", help="Markdown to put into the card")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for talkative in ("onnx_ir", "onnxscript"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    try:
        with Stoppable() as stoppable:
            target = run(options, stoppable.check)
    except KeyboardInterrupt:
        sys.exit("dsd-export: stopped; nothing half-written was left")
    except DSDError as error:
        sys.exit(f"dsd-export: {error}")
    except OSError as error:
        reason = "there is no room on the disk" if error.errno in FULL else str(error)
        sys.exit(f"dsd-export: {reason}; nothing half-written was left")
    log.info("%s is up to date; serve it with: dsd-serve --model %s", target, target)
