"""Make a model directory, its TensorRT plans, a Triton repository, and a web page that needs no server.

dsd-export SOURCE [--onnx] [--trt] [--precision NAME ...] [-o DIR]
dsd-export DIR --check [--precision NAME ...] [--device cuda:N]
dsd-export DIR --push hf:org/name [--license ID]
dsd-export SOURCE --triton REPO [--triton-device gpu|cpu] [--triton-engine onnx|tensorrt] [--triton-precision NAME]
dsd-export SOURCE --web DIR [--runtime DIR]

Turns a training checkpoint into a model directory: config.json, model.safetensors (the EMA weights), model.onnx (one
graph for encode, denoise and decode rows), model.ort.onnx (the same with ONNX Runtime's own attention), card.md, and
classes.webp, a few images of each class, if drawing them takes at most two minutes; with --precision the same graphs in
other precisions, with --trt TensorRT plans of them. SOURCE may also be a model directory; it then gets the files it
lacks, without a checkpoint.

Each graph is verified on mixtures of rows, float32 against the torch network and the others against float32; a graph
that differs by more than its limits is not written. Files that are up to date are kept. The directory is updated
atomically: Ctrl-C and a full disk leave the old files, and a directory whose export was killed midway is not loaded.
dsd-export --untrained dsd-s -o DIR does the same with random weights, for benchmarks.

With --triton the model directory is also written into a Triton model repository. With --push it is pushed to the
Hugging Face hub, with its card as README.md; a SOURCE hf:org/name[@revision] comes from there. The token is that of
HF_TOKEN or of `hf auth login`.

With --web a static web page is written that draws in the visitor's browser: any static host can serve DIR, and no other
server is needed. ONNX Runtime Web is copied from the npm package onnxruntime-web, found in node_modules of the working
directory or its parents, or in --runtime.

A plan must pass checks before it is written: finite outputs for every class, errors against float32, rows that do not
depend on their neighbours, a whole generation, the precision that was really built. If this machine cannot run the
plan, a warning says so; dsd-export DIR --check then runs the checks on its GPU, and no engine loads the plan before.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from dsd_serve import __version__
from dsd_serve.checkpoint import MAX_NAME, check_sampling, read_checkpoint, read_model_dir
from dsd_serve.config import PRESETS
from dsd_serve.engines.plan import HARDWARE, MOST_ROWS, TUNED_ROWS
from dsd_serve.errors import CheckpointError, DSDError, EngineUnavailableError, InputError, shown
from dsd_serve.files import sentence_of
from dsd_serve.hub import PREFIX, model_dir
from dsd_serve.params import SAMPLER_NAMES, SamplingParams, from_api, with_values
from dsd_serve.precision import AUTO, PRECISIONS, REFERENCE, check_runs
from export.build import export
from export.card import training_rows, with_sampling, write_card
from export.commit import Stoppable
from export.push import check_place, push
from export.source import Network, directory_network, ema_weights, random_values
from export.triton_repository import DEVICES, ENGINES, write_repository
from export.web_folder import check_target, write_web
from export.web_runtime import find_runtime

log = logging.getLogger(__name__)


def read_network(options: argparse.Namespace, target: Path) -> Network:
    """The network that the command line names: a checkpoint's, a model directory's, or a preset's random weights."""
    source: Path | None = options.source
    if source and source.is_dir():
        if options.store or options.notes:
            raise CheckpointError(f"--store and --notes are for checkpoints, but {source} is a model directory")
        directory = read_model_dir(source)
        directory.check([directory.weights])
        defaults = from_api(vars(options), directory.defaults)
        check_sampling(directory.config, defaults)
        network = directory_network(directory)
        card = with_sampling(network.card, defaults)
        return replace(network, name=options.name or directory.name, defaults=defaults, card=card)
    values = read_checkpoint(source) if source else random_values(options.untrained)
    store, notes = options.store or REFERENCE, read_notes(options.notes) if options.notes else ""
    config, state = ema_weights(values, source or options.untrained, store)
    sampler, steps = ("flow_map", 2) if config.flow_map else ("heun", 25)
    recommended = with_values(SamplingParams(num_steps=steps, sampler=sampler), values.get("sampling") or {})
    defaults = from_api(vars(options), recommended)
    check_sampling(config, defaults)
    name = options.name or (target.resolve().name if options.output else target.resolve().parent.name)
    size = sum(array.size for array in state.values())
    card = write_card(name, config, size, training_rows(values), store, defaults, notes)
    return Network(name, config, defaults, state, store, card, values["step"] if source else None)


def read_notes(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"--notes must name a text file in UTF-8, got {path}") from None


def import_plans() -> ModuleType:
    """The module that builds TensorRT plans. Raises EngineUnavailableError without its packages."""
    try:
        import export.tensorrt.plans as plans
    except ImportError as error:
        raise EngineUnavailableError(
            f"TensorRT plans need {error.name or error}: pip install '.[tensorrt]' or '.[tensorrt-rtx]'"
        ) from None
    return plans


def run(options: argparse.Namespace, check: Callable[[], None]) -> Path:
    """Carry out the command line. Returns the model directory. check: raises KeyboardInterrupt to stop."""
    if options.push:
        check_place(options.push)
    if options.web:
        find_runtime(options.runtime)
        check_target(options.web)
    elif options.runtime:
        raise InputError("--runtime is for --web DIR", "--runtime")
    fetch_source(options)
    precisions: list[str] = list(dict.fromkeys(options.precision or [REFERENCE]))
    for precision in precisions if options.trt or options.check else ():
        check_runs(precision, "tensorrt")
    if options.check:
        return check_plans(options)
    target = target_dir(options)
    if not (written_elsewhere(options) and changes_nothing(options)):
        plans = import_plans() if options.trt else None
        if plans:  # fail before the long work, not after it
            plans.check_options(plans.find_library(), build_options(plans, options))
        images = options.class_images or ("off" if options.untrained else "auto")
        export(read_network(options, target), target, precisions, options.force, check, images)
        if plans:
            for precision in precisions:
                check()
                plans.build(target, precision, build_options(plans, options))
        check()
    if options.triton:
        write_repository(
            target,
            options.triton,
            device=options.triton_device,
            engine=options.triton_engine,
            precision=options.triton_precision,
        )
    if options.web:
        write_web(target, options.web, options.runtime)
    if options.push:
        log.info("pushed: %s", push(target, options.push, options.license))
    return target


def written_elsewhere(options: argparse.Namespace) -> bool:
    """Whether the model directory is only the source of something else."""
    return bool(options.triton or options.web or options.push)


def fetch_source(options: argparse.Namespace) -> None:
    """Replace a source hf:org/name by the directory that it was downloaded to. Raises CheckpointError."""
    if not str(options.source).startswith(PREFIX):
        return
    place, options.source = options.source, model_dir(options.source)
    if not (options.output or options.check or (changes_nothing(options) and written_elsewhere(options))):
        raise CheckpointError(f"{place} needs -o DIR: the downloaded directory belongs to the cache and is not changed")


def check_plans(options: argparse.Namespace) -> Path:
    """`--check`: run the checks of a model directory's plans. Returns the directory."""
    if not options.source or not options.source.is_dir():
        raise CheckpointError("--check is for a model directory: dsd-export DIR --check")
    import_plans().check(options.source, tuple(dict.fromkeys(options.precision or ())), options.device)
    return Path(options.source)


def changes_nothing(options: argparse.Namespace) -> bool:
    """Whether the source is a model directory, and no option changes or adds to it."""
    changing = (
        "precision",
        "trt",
        "onnx",
        "force",
        "output",
        "name",
        "steps",
        "sampler",
        "guidance",
        "guidance_start",
        "guidance_stop",
        "store",
        "notes",
        "class_images",
    )
    is_dir = options.source is not None and options.source.is_dir()
    given = (getattr(options, name) for name in changing)
    return is_dir and all(value is None or value is False for value in given)


def build_options(plans: ModuleType, options: argparse.Namespace) -> Any:
    return plans.BuildOptions(
        hardware=options.hardware,
        version_compatible=options.version_compatible,
        targets=tuple(options.targets or ()),
        timing_cache=options.timing_cache,
        device=options.device,
        tuned_rows=options.tuned_rows,
        force=options.force,
    )


def target_dir(options: argparse.Namespace) -> Path:
    """The model directory to write. Raises CheckpointError."""
    if options.output:
        return Path(options.output)
    if not options.source:
        raise CheckpointError("--untrained needs -o DIR, the model directory to write")
    source = Path(options.source)
    if source.is_dir():
        return source
    target = source.parent / "model"
    log.info("without -o DIR the model directory is %s", target)
    return target


def model_name(text: str) -> str:
    if not (text.isprintable() and 0 < len(text) <= MAX_NAME):
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_NAME} printable characters, got {shown(text)}")
    return text


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsd-export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("source", type=Path, nargs="?", help="a checkpoint.pt of dsd-train, or a model directory")
    source.add_argument("--untrained", choices=PRESETS, metavar="PRESET", help="random weights of a preset instead")
    parser.add_argument("--onnx", action="store_true", help="ONNX graphs; always exported")
    parser.add_argument("--trt", action="store_true", help="also build TensorRT plans, one for each precision")
    parser.add_argument(
        "--precision",
        nargs="+",
        action="extend",
        choices=PRECISIONS,
        help=f"one or more (default {REFERENCE}, which is always exported)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="the model directory to write (default: SOURCE, or the folder `model` next to a checkpoint)",
    )
    group = parser.add_argument_group("Triton")
    group.add_argument("--triton", type=Path, metavar="REPO", help="write the model `dsd` into a Triton repository")
    group.add_argument(
        "--triton-device", choices=DEVICES, default="gpu", help="one instance per GPU, or on the CPU (gpu)"
    )
    group.add_argument("--triton-engine", choices=ENGINES, default="onnx", help="its engine (onnx)")
    group.add_argument(
        "--triton-precision",
        choices=(AUTO, *PRECISIONS),
        default=AUTO,
        help="its precision (auto: fp16 on a GPU if SOURCE was exported in it, else fp32)",
    )
    web = parser.add_argument_group("web page")
    web.add_argument("--web", type=Path, metavar="DIR", help="write a static web page that draws in the browser")
    web.add_argument(
        "--runtime", type=Path, metavar="DIR", help="the npm package onnxruntime-web, or a folder that contains it"
    )
    hub = parser.add_argument_group("Hugging Face hub")
    hub.add_argument("--push", metavar="hf:org/name", help="push the model directory; creates the repository if needed")
    hub.add_argument(
        "--license", default="other", metavar="ID", help="licence id of the hub, for the card (default other)"
    )
    plan = parser.add_argument_group("TensorRT plans")
    plan.add_argument("--check", action="store_true", help="run the checks of a model directory's plans")
    plan.add_argument("--device", default="cuda", help="GPU that builds and checks, cuda or cuda:N (default cuda)")
    plan.add_argument(
        "--hardware",
        choices=HARDWARE,
        default=HARDWARE[0],
        help="GPUs that a plan of tensorrt runs on: this model (default, fastest),\nthe same compute capability, or "
        "Ampere and later",
    )
    plan.add_argument(
        "--version-compatible",
        action="store_true",
        help="build plans that later releases of the same major version of TensorRT load too",
    )
    plan.add_argument(
        "--targets",
        nargs="+",
        metavar="N.N",
        help="compute capabilities that a plan of tensorrt_rtx is for, such as 8.9 12.0\n(default: 8.6 8.9 12.0)",
    )
    plan.add_argument("--timing-cache", type=Path, metavar="FILE", help="speeds up the next build by tensorrt")
    plan.add_argument(
        "--tuned-rows",
        type=int,
        default=TUNED_ROWS,
        metavar="N",
        help=f"rows of each kind in a tick that a plan is fastest for, 1 to {MOST_ROWS} (default {TUNED_ROWS}):\n"
        f"1 for single requests, {MOST_ROWS} for a server under load",
    )
    parser.add_argument("--force", action="store_true", help="redo everything, even if it is up to date")
    parser.add_argument(
        "--name", type=model_name, help="the model's name (default: the name of DIR; a model directory keeps its name)"
    )
    parser.add_argument(
        "--store",
        choices=tuple(name for name, row in PRECISIONS.items() if row.storable),
        help="type of the weights in model.safetensors (default fp32)",
    )
    parser.add_argument(
        "--steps", type=int, help="recommended number of steps (default: SOURCE's, else 25; 2 for a flow map)"
    )
    parser.add_argument(
        "--sampler",
        choices=SAMPLER_NAMES,
        help="recommended sampler (default: SOURCE's, else heun; flow_map for a flow map)",
    )
    parser.add_argument("--guidance", type=float, help="recommended guidance scale (default: SOURCE's, else 1, off)")
    parser.add_argument("--guidance-start", type=float, metavar="T", help="time from which it is on (SOURCE's, else 0)")
    parser.add_argument("--guidance-stop", type=float, metavar="T", help="time until which it is on (SOURCE's, else 1)")
    parser.add_argument(
        "--class-images",
        choices=("auto", "on", "off"),
        help="draw classes.webp, images of each class for the page\n(default auto: if this takes at most two minutes)",
    )
    parser.add_argument("--notes", type=Path, metavar="FILE", help="Markdown file to include in the card")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for verbose in ("onnx_ir", "onnxscript"):
        logging.getLogger(verbose).setLevel(logging.WARNING)
    try:
        with Stoppable() as stoppable:
            target = run(options, stoppable.check)
    except KeyboardInterrupt:
        sys.exit("dsd-export: stopped; no partial files are left")
    except DSDError as error:
        sys.exit(f"dsd-export: {error}")
    except OSError as error:
        sys.exit(f"dsd-export: {sentence_of(error)}; no partial files are left")
    log.info("%s is ready; serve it with: dsd-serve --model %s", target, target)
