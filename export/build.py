"""From weights to a whole model directory, redoing only what changed.

config.json records of each precision what it was made from (sha256 of the weights, the network, our version) and the
sha256 of its files. Where both fit, the files stay; everything else is made in a draft, checked there, and moved.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from dsd_serve import __version__
from dsd_serve.checkpoint import ModelDir, config_json, graph_names, read_model_dir, read_weights, sha256
from dsd_serve.config import ModelConfig
from dsd_serve.engines.onnx_engine import OnnxEngine, choose_provider, import_onnxruntime, open_session
from dsd_serve.engines.plan import PRECISIONS as PLAN_PRECISIONS
from dsd_serve.engines.plan import manifest_path, plan_path
from dsd_serve.errors import CheckpointError
from dsd_serve.params import SamplingParams
from export.card import with_measurements
from export.commit import CONFIG, commit, drafting
from export.graph.fuse import fuse
from export.graph.half import emulated, half_weights, to_half
from export.graph.int8 import int8_weights, to_int8
from export.graph.onnx_graph import block_products
from export.graph.to_onnx import share_weights, to_onnx
from export.verify import Report, verify

log = logging.getLogger(__name__)

DTYPES = {"fp32": np.float32, "fp16": np.float16}
WEIGHTS, PLAIN, FUSED, CARD = "model.safetensors", "model.onnx", "model.ort.onnx", "card.md"
State = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Network:
    """What shall stand in a model directory, but for its graphs. card: Markdown without measurements.

    state: the weights, rounded to what is stored; store: fp32 or fp16, as what they are stored.
    """

    name: str
    config: ModelConfig
    defaults: SamplingParams
    state: State
    store: str
    card: str


def export(
    network: Network,
    target: Path,
    precisions: Sequence[str] = (),
    force: bool = False,
    check: Callable[[], None] = lambda: None,
) -> list[Report]:
    """Write the model directory `target`, in fp32 and `precisions`, or bring it up to date.

    Precisions that the directory has already are kept up to date too. force: make everything again. check: called
    between the steps, may raise. Raises
    CheckpointError when a graph differs from the network by more than its limits; then nothing is changed.
    """
    with drafting(target) as draft:
        old = read_model_dir(target) if (target / CONFIG).exists() else None
        work = Export(network, target, draft, old, force)
        wanted = {"fp32", *precisions, *(old.precisions if old else ())}
        for precision in ("fp32", "fp16", "bf16", "int8"):
            if precision in wanted:
                work.bring(precision)
                check()
        return work.finish()


class Export:
    """One run of dsd-export on one directory."""

    def __init__(self, network: Network, target: Path, draft: Path, old: ModelDir | None, force: bool) -> None:
        self.network, self.target, self.draft = network, target, draft
        self.old: dict[str, Any] = dict(old.artefacts) if old else {}
        self.force = force
        self.record: dict[str, Any] = {}
        self.fresh: list[str] = []
        write_weights(draft / WEIGHTS, stored_as(network.state, network.store))
        self.made_from = {
            "weights": sha256(draft / WEIGHTS),
            "network": hashlib.sha256(json.dumps(network.config.to_dict()).encode()).hexdigest(),
            "version": __version__,
        }
        # A draft without record: what is checked in it is not what config.json of the target vouches for.
        text = config_json(network.name, network.config, network.defaults)
        (draft / CONFIG).write_text(text, encoding="utf-8")

    def bring(self, precision: str) -> None:
        """Make a precision in the draft, or link the files of the target there when they are up to date."""
        makers: dict[str, Callable[[], tuple[list[str], Report]]] = {
            "fp32": self.make_fp32,
            "int8": self.make_int8,
        }
        entry = self.old.get(precision)
        if entry and not self.force and self.is_current(entry):
            log.info("%s: unchanged (%s)", precision, ", ".join(entry["files"]))
            for name in entry["files"]:
                if not (self.draft / name).exists():
                    link(self.target / name, self.draft / name)
            self.record[precision] = entry
            return
        log.info("%s: exporting ...", precision)
        names, report = makers[precision]() if precision in makers else self.make_half(precision)
        self.fresh += [name for name in names if name not in self.fresh]
        files = {name: sha256(self.draft / name) for name in names}
        self.record[precision] = {"made_from": self.made_from, "files": files, "measured": report.to_dict()}

    def is_current(self, entry: dict[str, Any]) -> bool:
        return entry.get("made_from") == self.made_from and all(
            (self.target / name).exists() and sha256(self.target / name) == known
            for name, known in entry["files"].items()
        )

    def make_fp32(self) -> tuple[list[str], Report]:
        import torch

        from dsd_serve.engines.torch_engine import TorchEngine
        from dsd_serve.network import DSD

        model = DSD(self.network.config)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in self.network.state.items()})
        graph = share_weights(to_onnx(model), self.draft / WEIGHTS, self.network.state)
        reference = TorchEngine(model)
        for name, proto in ((PLAIN, graph), (FUSED, fuse(graph))):
            (self.draft / name).write_bytes(proto.SerializeToString())
            report = self.check(name, name, reference, "fp32")
        return [WEIGHTS, PLAIN, FUSED], report

    def make_half(self, precision: str) -> tuple[list[str], Report]:
        """The fused graph in fp16 only: ONNX Runtime's own operators are not all there in bf16."""
        sources = {PLAIN: graph_names(precision)[1], FUSED: graph_names(precision)[0]}
        if precision == "bf16":
            del sources[FUSED]
        state = self.network.state
        products = block_products(self.load(PLAIN))
        weights = self.keep_weights(precision, half_weights(state, precision, products))
        reference = OnnxEngine.load(self.draft)
        for source, name in sources.items():
            proto = to_half(self.load(source), precision, self.draft / weights)
            (self.draft / name).write_bytes(proto.SerializeToString())
            if source == PLAIN:
                onnx.checker.check_model(str(self.draft / name), full_check=True)
            check = f"emulated.{name}"
            (self.draft / check).write_bytes(emulated(proto, precision).SerializeToString())
            report = self.check(check, name, reference, precision)
            if precision == "fp16":
                OnnxEngine.load(self.draft, precision=precision)
        return [weights, *sources.values()], report

    def make_int8(self) -> tuple[list[str], Report]:
        """For ONNX Runtime only: its own operator multiplies integers and scales at once."""
        proto, name = self.load(FUSED), graph_names("int8")[0]
        products = block_products(proto)
        weights = self.keep_weights("int8", int8_weights(self.network.state, products))
        (self.draft / name).write_bytes(to_int8(proto, self.draft / weights, products).SerializeToString())
        return [weights, name], self.check(name, name, OnnxEngine.load(self.draft), "int8")

    def load(self, name: str) -> onnx.ModelProto:
        return onnx.load(self.draft / name, load_external_data=False)

    def keep_weights(self, precision: str, weights: dict[str, NDArray[Any]]) -> str:
        """Write weights of a precision, unless model.safetensors holds the same. Returns the name of the file."""
        if broken := [name for name, array in weights.items() if not np.isfinite(array.astype(np.float32)).all()]:
            raise CheckpointError(f"{len(broken)} weights are not finite in {precision}, as {broken[0]}")
        if all(array.dtype == DTYPES[self.network.store] for array in weights.values()):
            return WEIGHTS
        name = f"model.{precision}.safetensors"
        write_weights(self.draft / name, weights)
        return name

    def check(self, file: str, name: str, reference: Any, precision: str) -> Report:
        """Compare the graph in `file` with a reference. name: what it stands for."""
        ort = import_onnxruntime()
        session = open_session(ort, self.draft / file, *choose_provider(ort, "cpu"))
        report = verify(OnnxEngine(session, self.network.config, "cpu", precision), reference, precision)
        log.info("%s: %s", name, report)
        if not report.passed:
            raise CheckpointError(f"the exported graph {name} is not the network, nothing was written: {report}")
        return report

    def finish(self) -> list[Report]:
        """Write card.md and config.json, and move what is new to the target."""
        network = self.network
        reports = [Report(**entry["measured"]) for entry in self.record.values()]
        sizes = {
            precision: max((self.draft / name).stat().st_size for name in entry["files"] if name.endswith("tensors"))
            for precision, entry in self.record.items()
        }
        (self.draft / CARD).write_text(with_measurements(network.card, reports, sizes), encoding="utf-8")
        text = config_json(network.name, network.config, network.defaults, self.record)
        (self.draft / CONFIG).write_text(text, encoding="utf-8")
        before = {name for entry in self.old.values() for name in entry["files"]}
        now = {name for entry in self.record.values() for name in entry["files"]}
        new = [name for name in (*self.fresh, CARD, CONFIG) if differs(self.draft / name, self.target / name)]
        if new:
            obsolete = [*sorted(before - now), *stale_plans(new)]
            commit(self.draft, self.target, [*new, *([] if CONFIG in new else [CONFIG])], obsolete)
        return reports


def stored_as(state: State, store: str) -> dict[str, NDArray[Any]]:
    return {name: array.astype(DTYPES[store]) for name, array in state.items()}


def write_weights(path: Path, weights: dict[str, NDArray[Any]]) -> None:
    from safetensors.numpy import save

    # Not `save_file`: its files can be read by their owner only, and a server often runs as another user.
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in weights.items()}))


def link(source: Path, destination: Path) -> None:
    """The same file under another name, where the filesystem can; a copy where not."""
    try:
        destination.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, destination)


def stale_plans(new: Sequence[str]) -> list[str]:
    """The TensorRT plans, and their manifests, of graphs and weights that are replaced."""
    plans = [plan_path(Path(), precision) for precision in PLAN_PRECISIONS]
    sources = [{graph_names(precision)[1], WEIGHTS, f"model.{precision}.safetensors"} for precision in PLAN_PRECISIONS]
    stale = [plan for plan, names in zip(plans, sources, strict=True) if names.intersection(new)]
    return [file.name for plan in stale for file in (plan, manifest_path(plan))]


def differs(ours: Path, theirs: Path) -> bool:
    return not theirs.exists() or sha256(ours) != sha256(theirs)


def network_of(directory: ModelDir) -> Network:
    """What a model directory holds, to be exported again."""
    from export.card import write_card

    state = read_weights(directory.path)
    from safetensors import safe_open

    with safe_open(directory.weights, "numpy") as file:
        stores = {file.get_slice(name).get_dtype() for name in state}
    store = "fp16" if stores == {"F16"} else "fp32"
    file_card = directory.path / CARD
    if file_card.exists():
        card = file_card.read_text(encoding="utf-8")
    else:
        size = sum(array.size for array in state.values())
        card = write_card(directory.name, directory.config, size, [], store, directory.defaults, "")
    return Network(directory.name, directory.config, directory.defaults, state, store, card)
