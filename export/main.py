"""dsd-export checkpoint.pt -o DIR

Turns a training checkpoint into a model directory: config.json, model.safetensors (the EMA weights), model.onnx (one
graph for encode, denoise and decode rows), model.ort.onnx (the same with ONNX Runtime's own attention) and card.md. The
graphs are checked against the torch network on mixtures of rows; one that differs is not written.
dsd-export --untrained dsd-s -o DIR does the same for random weights, for benchmarks.
"""

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsd_serve.checkpoint import config_json, read_checkpoint
from dsd_serve.config import PRESETS, ModelConfig
from dsd_serve.engines.onnx_engine import OnnxEngine
from dsd_serve.engines.torch_engine import TorchEngine
from dsd_serve.errors import CheckpointError, DSDError
from dsd_serve.model import DSD
from dsd_serve.params import SAMPLER_NAMES, SamplingParams
from export.card import write_card
from export.fuse import fuse
from export.to_onnx import share_weights, to_onnx
from export.verify import Report, verify

log = logging.getLogger(__name__)

FILES = ("model.safetensors", "model.onnx", "model.ort.onnx", "card.md", "config.json")  # without the last no directory
DTYPES = {"fp32": np.float32, "fp16": np.float16}


def export(
    checkpoint: Path | None, preset: str, target: Path, *, name: str, store: str, defaults: SamplingParams, notes: str
) -> Report:
    """Write the model directory `target` from a checkpoint, or without one from random weights of a preset.

    store: fp32 or fp16, of the weights on disk; the network computes in float32.

    Everything is made and checked in a temporary folder beside `target` and then moved into place. Raises
    CheckpointError when the checkpoint is unusable or the graph differs from the network.
    """
    values = read_checkpoint(checkpoint) if checkpoint else untrained(preset)
    model, state = load_ema(values, checkpoint or Path(preset), store)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dsd-export-", dir=target) as temporary:
        draft = Path(temporary)
        (draft / "config.json").write_text(config_json(name, model.config, defaults), encoding="utf-8")
        write_weights(draft / "model.safetensors", state, store)
        log.info("exporting the graph ...")
        graph = share_weights(to_onnx(model), draft / "model.safetensors", state)
        reference = TorchEngine.load(draft)
        for file, proto in (("model.onnx", graph), ("model.ort.onnx", fuse(graph))):
            (draft / file).write_bytes(proto.SerializeToString())
            report = verify(OnnxEngine.load(draft), reference)  # which takes model.ort.onnx as soon as it is there
            log.info("%s: %s", file, report)
            if not report.passed:
                raise CheckpointError(f"the exported graph {file} is not the network, nothing was written: {report}")
        card = write_card(name, model.config, values, store, report, defaults, notes)
        (draft / "card.md").write_text(card, encoding="utf-8")
        for file in FILES:
            shutil.move(draft / file, target / file)
    return report


def untrained(preset: str) -> dict[str, Any]:
    """What a checkpoint holds, for random weights. adaLN is not left at zero: the blocks must do something."""
    torch.manual_seed(0)
    model = DSD(PRESETS[preset])
    with torch.no_grad():
        model.adaLN_modulation.weight.normal_(std=0.02)
    return {"step": 0, "network": model.config.to_dict(), "ema": model.state_dict(), "config": None}


def load_ema(values: dict[str, Any], path: Path, store: str) -> tuple[DSD, dict[str, NDArray[np.float32]]]:
    """The EMA network of a checkpoint, and its weights, both rounded to what will be stored."""
    try:
        model = DSD(ModelConfig.from_dict(values["network"]))
        model.load_state_dict(values["ema"])
    except KeyError as error:
        raise CheckpointError(f"{path} is incomplete: it has no {error}") from None
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its own network: {' '.join(str(error).split())[:300]}") from None
    with torch.no_grad():
        for parameter in model.parameters():
            rounded = parameter.numpy().astype(DTYPES[store]).astype(np.float32)
            if not np.isfinite(rounded).all():
                raise CheckpointError(f"{path} holds weights that are not finite in {store}")
            parameter.copy_(torch.from_numpy(rounded))
    return model.eval(), {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def write_weights(path: Path, state: dict[str, NDArray[np.float32]], store: str) -> None:
    from safetensors.numpy import save

    # Not `save_file`: its files can be read by their owner only, and a server often runs as another user.
    path.write_bytes(save({name: np.ascontiguousarray(array.astype(DTYPES[store])) for name, array in state.items()}))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="dsd-export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("checkpoint", type=Path, nargs="?", help="a checkpoint.pt of dsd-train")
    source.add_argument("--untrained", choices=PRESETS, metavar="PRESET", help="random weights of a preset instead")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the model directory to write")
    parser.add_argument("--name", help="the model's name (default: the name of DIR)")
    parser.add_argument("--store", choices=DTYPES, default="fp32", help="type of the weights on disk (default fp32)")
    parser.add_argument("--steps", type=int, default=25, help="recommended number of steps (default 25)")
    parser.add_argument("--sampler", choices=SAMPLER_NAMES, default="heun", help="recommended sampler (default heun)")
    parser.add_argument("--guidance", type=float, default=1.0, help="recommended guidance scale (default 1, off)")
    parser.add_argument("--notes", type=Path, metavar="FILE", help="Markdown to put into the card")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for talkative in ("onnx_ir", "onnxscript"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    try:
        defaults = SamplingParams(num_steps=options.steps, sampler=options.sampler, guidance_scale=options.guidance)
        notes = options.notes.read_text(encoding="utf-8") if options.notes else ""
        name = options.name or options.output.resolve().name
        export(
            options.checkpoint,
            options.untrained,
            options.output,
            name=name,
            store=options.store,
            defaults=defaults,
            notes=notes,
        )
    except (DSDError, OSError) as error:
        sys.exit(f"dsd-export: {error}")
    log.info("wrote %s; serve it with: dsd-serve --model %s", options.output, options.output)
