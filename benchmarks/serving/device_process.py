"""An engine process with a simulated GPU, and dsd-serve with one: python -m benchmarks.serving.device_process MODEL."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.serving.simulated_device import SimulatedDevice, SimulatedStream
from dsd_serve import engine_process, loading
from dsd_serve.backends.process import child_process
from dsd_serve.backends.process.engine_messages import Status
from dsd_serve.checkpoint import config_json, read_model_dir
from dsd_serve.config import PRESETS
from dsd_serve.model import Model
from dsd_serve.params import SamplingParams

BUDGET = 64
BUSY = "busy.json"  # in the model directory: the seconds that the device worked, ticks, rows, and the time
ONE_AT_A_TIME = "torch"  # the engine's name that stands for a device without a second tick


def write_model(folder: Path, defaults: SamplingParams) -> None:
    """A model directory of dsd-s without weights, for which the simulated device stands."""
    folder.mkdir()
    (folder / "config.json").write_text(config_json("dsd-s", PRESETS["dsd-s"], defaults))
    (folder / "model.onnx").touch()  # only its sha256 is taken


class ReportingProcess(engine_process.EngineProcess):
    """Writes with each status how busy the device was."""

    def status(self) -> Status:
        status = super().status()
        if self.batcher is not None:
            device = self.batcher.engine
            assert isinstance(device, SimulatedDevice)
            report = {"busy": device.busy, "ticks": status.num_ticks, "rows": status.num_rows, "at": time.monotonic()}
            part = Path(self.settings.model) / f"{BUSY}.part"
            part.write_text(json.dumps(report))
            part.replace(part.with_suffix(""))
        return status


def load(model: str, engine: str, **options: Any) -> Model:
    kind = SimulatedDevice if engine == ONE_AT_A_TIME else SimulatedStream
    kept = {name: value for name, value in options.items() if name in ("row_budget", "observer")}
    return loading.load(model, kind(read_model_dir(Path(model)).config), **kept)


def serve(model: str) -> None:
    from server.main import main

    child_process.MODULE = "benchmarks.serving.device_process"
    main(
        [
            "--model",
            model,
            "--engine-process",
            "on",
            "--row-budget",
            str(BUDGET),
            "--port",
            "0",
            "--max-waiting",
            "1000",
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(sys.argv[1])
    else:
        vars(engine_process).update(load=load, EngineProcess=ReportingProcess)
        engine_process.main()
