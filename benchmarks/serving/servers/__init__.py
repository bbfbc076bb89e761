"""The contestants as programs: python -m benchmarks.serving.servers.NAME --port P --model DIR [--simulated].

Each answers POST /generate, with the same JSON body, with a PNG.
"""

import argparse
from pathlib import Path

from benchmarks.serving.simulated_engine import SimulatedEngine
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.engines import Engine, load_engine

HOST = "127.0.0.1"


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--simulated", action="store_true", help="a simulated accelerator in place of the network")
    return parser


def engine_of(name: str, model: Path, simulated: bool) -> Engine:
    return SimulatedEngine(read_model_dir(model).config) if simulated else load_engine(name, model)
