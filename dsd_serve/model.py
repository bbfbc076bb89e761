"""A model directory on an engine behind a batcher: what dsd-serve has in its process, and each instance in Triton."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsd_serve.backends import About
from dsd_serve.backends.batcher import Batcher, Observer
from dsd_serve.checkpoint import read_model_dir, read_text
from dsd_serve.engines import Engine, load_engine
from dsd_serve.engines.selftest import invariance, mixture
from dsd_serve.errors import CheckpointError


@dataclass(frozen=True)
class Host:
    """A batcher that runs, and what it serves."""

    batcher: Batcher
    about: About


def open_host(
    model_dir: Path,
    engine: Engine | str = "onnx",
    *,
    device: str = "cpu",
    precision: str = "fp32",
    threads: int = 0,
    row_budget: int = 0,
    max_waiting: int = 256,
    max_seconds: float = 60.0,
    observer: Observer | None = None,
) -> Host:
    """Load a model directory, test its engine, warm it up, and start its batcher.

    engine: a name, or one that is loaded. The rest is as in `load_engine` and `Batcher`, and raises what they raise.
    """

    def load() -> Host:
        directory = read_model_dir(model_dir)
        loaded = engine
        if isinstance(loaded, str):
            loaded = load_engine(loaded, model_dir, device, threads, flush_denormals=True, precision=precision)
        rows = mixture(loaded.config, (1, 2, 1), seed=0)
        outputs = loaded.run(rows)
        if not all(np.isfinite(output).all() for output in outputs):
            raise CheckpointError(f"the network of {model_dir} gives values that are not finite: export it again")
        tested = invariance(loaded, rows, outputs)
        batcher = Batcher(
            loaded, budget=row_budget, max_waiting=max_waiting, max_seconds=max_seconds, observer=observer
        )
        card = model_dir / "card.md"
        about = About(
            directory.name,
            loaded.config,
            directory.defaults,
            directory.fingerprint(precision),
            {key: str(value) for key, value in loaded.describe().items()},
            tested,
            batcher.budget,
            read_text(card) if card.exists() else None,
            int((model_dir / "config.json").stat().st_mtime),
        )
        return Host(batcher, about)

    # In a thread that ends: flushing denormals holds for the whole thread, and the caller's goes on.
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(load).result()
        except OSError as error:
            raise CheckpointError(f"{error.filename or model_dir} cannot be read: {error.strerror or error}") from None
        except MemoryError:
            raise CheckpointError(f"the network of {model_dir} needs more memory than there is") from None
