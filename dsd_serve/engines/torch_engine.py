"""The torch engine: the reference for the other engines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsd_serve.checkpoint import read_model_dir, read_weights
from dsd_serve.errors import CheckpointError, EngineUnavailableError
from dsd_serve.network import DSD
from dsd_serve.rows import Array, Row, collate, distribute


class TorchEngine:
    """Eager torch in float32 on any device that torch supports."""

    def __init__(self, model: DSD) -> None:
        self.model = model.eval()
        self.config = model.config

    @classmethod
    def load(cls, model_dir: Path, *, device: str = "cpu", num_threads: int = 0) -> "TorchEngine":
        if num_threads:
            torch.set_num_threads(num_threads)
        directory = read_model_dir(model_dir)
        directory.check([directory.weights])
        model = DSD(directory.config)
        weights = {name: torch.from_numpy(array) for name, array in read_weights(model_dir).items()}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{model_dir}: the weights do not fit config.json: {reason}") from None
        try:
            return cls(model.to(device))
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise EngineUnavailableError(f"engine 'torch' cannot use device {device!r}: {reason}") from None

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[Array]:
        device = self.model.role_embed.weight.device
        inputs = [torch.from_numpy(array).to(device) for array in collate(rows, self.config).values()]
        outputs = self.model(*inputs)
        return distribute(rows, [output.cpu().numpy() for output in outputs])

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "torch",
            "device": str(self.model.role_embed.weight.device),
            "precision": "fp32",
            "version": torch.__version__,
        }
