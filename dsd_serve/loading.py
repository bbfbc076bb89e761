"""Loading of a model directory: its engine is tested and warmed up, and its batcher started."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dsd_serve.backends import ModelInfo, Observer
from dsd_serve.backends.batcher import Batcher
from dsd_serve.checkpoint import read_model_dir, read_text
from dsd_serve.engines import load_engine
from dsd_serve.engines.selftest import batch_invariance, mixture
from dsd_serve.errors import CheckpointError
from dsd_serve.files import demo_model
from dsd_serve.hub import model_dir
from dsd_serve.model import Model
from dsd_serve.rows import Engine


def load(
    model: str | Path | None = None,
    engine: Engine | str = "onnx",
    *,
    device: str = "cpu",
    precision: str = "fp32",
    threads: int = 0,
    row_budget: int = 0,
    max_waiting: int = 1_000_000,
    max_seconds: float = math.inf,
    observer: Observer | None = None,
) -> Model:
    """Load a model directory, test its engine, warm it up, and start its batcher.

    model: the directory or hf:org/name[@revision], by default the demo model of the package. engine: onnx, torch or
    tensorrt, or a loaded one.
    device: cpu, cuda or cuda:N. precision: one in which the directory has a graph. threads: of the CPU, 0 for all
    cores. row_budget: rows a tick, 0 measures the best, also while it serves. max_waiting, max_seconds: limits of the
    queue, see `Batcher`.
    Raises CheckpointError when the directory is wrong, EngineUnavailableError when the engine cannot run here.
    """
    path = demo_model() if model is None else model_dir(model)

    def open_it() -> Model:
        directory = read_model_dir(path)
        loaded = engine
        if isinstance(loaded, str):
            loaded = load_engine(loaded, path, device, threads, flush_denormals=True, precision=precision)
        rows = mixture(loaded.config, (1, 2, 1), seed=0)
        outputs = loaded.run(rows)
        if not all(np.isfinite(output).all() for output in outputs):
            raise CheckpointError(f"the network of {path} gives values that are not finite: export it again")
        tested = batch_invariance(loaded, rows, outputs)
        batcher = Batcher(
            loaded, budget=row_budget, max_waiting=max_waiting, max_seconds=max_seconds, observer=observer
        )
        card = path / "card.md"
        info = ModelInfo(
            directory.name,
            loaded.config,
            directory.defaults,
            directory.fingerprint(precision),
            {key: str(value) for key, value in loaded.describe().items()},
            tested,
            batcher.budget,
            read_text(card) if card.exists() else None,
            int((path / "config.json").stat().st_mtime),
        )
        return Model(batcher, info)

    # In a thread of its own, because flushing denormals applies to the whole thread.
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(open_it).result()
        except OSError as error:
            raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
        except MemoryError:
            raise CheckpointError(f"the network of {path} needs more memory than there is") from None
