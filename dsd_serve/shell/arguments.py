"""Flags of the shell commands: the model and its engine, and all sampling settings, which params.py describes.

Its imports are light, so that --help and a wrong flag take no time.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from dsd_serve import __version__
from dsd_serve.errors import DSDError, InputError, shown
from dsd_serve.files import sentence_of
from dsd_serve.params import API_NAMES, SHOWN_WITH_IMAGE, Setting, check
from dsd_serve.params import SETTINGS as SAMPLING

if TYPE_CHECKING:
    from dsd_serve.model import Model

DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
ENGINES = ("onnx", "torch", "tensorrt")
MAX_ROWS = 1024  # of a tick
FEW, MANY = 16, 64  # rows of a tick by default. Nobody waits for single images here, so many rows never hurt
STOPPED, CLOSED_PIPE = 130, 141  # exit statuses, as a shell gives them after SIGINT and SIGPIPE


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence; the exit status is 2."""

    def error(self, message: str) -> NoReturn:
        program = self.prog.partition(" ")[0]
        self.exit(2, f"{program}: {message}; {self.prog} --help lists the flags\n")


def parser_of(program: str, about: str | None) -> Parser:
    """A parser with --version."""
    parser = Parser(prog=program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def add_sampling_flags(parser: argparse.ArgumentParser, *, per_class: bool = False) -> None:
    """A flag for each sampling setting, under its name in the HTTP API, and --size."""
    group = parser.add_argument_group("sampling")
    for name in SHOWN_WITH_IMAGE:
        setting = SAMPLING[name]
        if setting.recommended:
            default = "the model's"
        elif name == "seed":
            default = "random, or 0 with --per-class" if per_class else "random"
        else:
            default = f"{setting.default:g}"
        group.add_argument(
            "--" + API_NAMES[name].replace("_", "-"),
            dest=API_NAMES[name],
            type=value_of(name, setting),
            metavar="NAME" if setting.choices else "N" if isinstance(setting.default, int) else "X",
            help=f"{setting.about} (default: {default})",
        )
    group.add_argument(
        "--size",
        type=whole_number(8, 16_384),
        metavar="N",
        help="side in pixels to which images are scaled (default: the model's)",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model", metavar="DIR", help="model directory of dsd-export, or hf:org/name (default: the demo model)"
    )
    group.add_argument("--engine", choices=ENGINES, default="onnx", help="engine that runs the network (onnx)")
    group.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (cpu)")
    group.add_argument(
        "--precision",
        default="auto",
        metavar="NAME",
        help="a precision of the exported model (auto: fp16 on a GPU if the model has it, else fp32)",
    )
    group.add_argument(
        "--threads",
        type=whole_number(0, max(64, os.cpu_count() or 1)),
        default=0,
        metavar="N",
        help="CPU threads of the engine, 0 for all cores (0)",
    )
    group.add_argument(
        "--row-budget",
        type=whole_number(1, MAX_ROWS),
        metavar="N",
        help="rows in one call of the engine (16, or 64 for many images)",
    )


def value_of(name: str, setting: Setting) -> Callable[[str], Any]:
    """Converts the text of a flag to the value of a sampling setting."""

    def convert(text: str) -> Any:
        try:
            value = text if setting.choices else number(text, type(setting.default))
            check(name, value, setting)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(name).strip()) from None
        return value

    return convert


def number(text: str, kind: type) -> Any:
    """The number that a text is, or the text itself, which no number's rule accepts."""
    try:
        return kind(text) if text.isascii() and "_" not in text else text
    except ValueError:
        return text


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Converts the text of a flag to a whole number within limits."""

    def convert(text: str) -> int:
        value = number(text, int)
        if not isinstance(value, int) or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {shown(text)}")
        return value

    return convert


def device(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {shown(text)}")
    return text


def load_model(options: argparse.Namespace, count: int = 1) -> "Model":
    """The model of the flags, to draw about `count` images."""
    from dsd_serve.loading import load

    return load(
        options.model,
        options.engine,
        device=options.device,
        precision=options.precision,
        threads=options.threads,
        row_budget=options.row_budget or (MANY if count > FEW else FEW),
    )


@contextlib.contextmanager
def ending(program: str) -> Iterator[None]:
    """Around all of a program: an error of ours or of the system ends it in a sentence, a signal with its status."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as error:
        say(f"{program}: {stopped_by(error)}")
        sys.exit(128 + error.args[0] if error.args and isinstance(error.args[0], int) else STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered has no reader either
        sys.exit(CLOSED_PIPE)
    except DSDError as error:
        sys.exit(f"{program}: {error}")
    except OSError as error:
        drop_unwritten()
        sys.exit(f"{program}: {sentence_of(error)}")
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def drop_unwritten() -> None:
    """Drop what stdout cannot take, because the interpreter would try again at its end and fail in lines of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def stopped_by(error: KeyboardInterrupt) -> str:
    """The sentence of a stop: the last argument, where there is one."""
    return str(error.args[-1]) if len(error.args) > 1 else "stopped"


def say(text: str) -> None:
    """A line on stderr, which may be closed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
