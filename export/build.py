"""Building a model directory from weights, redoing only what changed.

config.json records for each precision what it was made from (sha256 of the weights, the network, our version) and the
sha256 of its files. If both still hold, the files stay; everything else is made in a draft, verified there, and moved.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from dsd_serve import __version__
from dsd_serve.checkpoint import ModelDir, config_json, read_model_dir, sha256
from dsd_serve.class_images import FILE as CLASS_IMAGES
from dsd_serve.class_images import Grid
from dsd_serve.engines import Engine
from dsd_serve.engines.onnx_engine import OnnxEngine, choose_provider, import_onnxruntime, open_session
from dsd_serve.engines.plan import manifest_path
from dsd_serve.errors import CheckpointError
from dsd_serve.params import to_config
from dsd_serve.precision import PRECISIONS, REFERENCE, Precision, precisions_of
from export.card import with_measurements
from export.commit import CONFIG, commit, drafting
from export.draw_classes import draw_classes
from export.graph.fuse import fuse
from export.graph.half import emulated, half_weights, to_half
from export.graph.int8 import int8_weights, to_int8
from export.graph.onnx_graph import block_products
from export.graph.to_onnx import to_onnx
from export.graph.weights import dtype_of, share_weights, write_weights
from export.source import CARD, Network
from export.verify import Report, verify

log = logging.getLogger(__name__)

FULL = PRECISIONS[REFERENCE]


def export(
    network: Network,
    target: Path,
    precisions: Sequence[str] = (),
    force: bool = False,
    check: Callable[[], None] = lambda: None,
    class_images: str = "auto",
) -> list[Report]:
    """Write the model directory `target` in fp32 and `precisions`, or bring it up to date.

    Precisions that the directory already has are kept up to date too. force: make everything again. check: called
    between the steps, may raise to stop. class_images: whether classes.webp is drawn: on, off, or auto, which leaves it
    out where it would take long. Raises CheckpointError when a graph differs from the network by more than its
    limits; then nothing is changed.
    """
    with drafting(target) as draft:
        old = read_model_dir(target) if (target / CONFIG).exists() else None
        work = Export(network, target, draft, old, force)
        needed = {REFERENCE, *precisions, *(old.precisions if old else ())}
        for name, row in PRECISIONS.items():
            if name in needed:
                work.update(row)
                check()
        if class_images != "off":
            work.update_class_images(class_images == "on", check)
        return work.finish()


class Export:
    """One run of dsd-export on one directory."""

    def __init__(self, network: Network, target: Path, draft: Path, old: ModelDir | None, force: bool) -> None:
        self.network, self.target, self.draft = network, target, draft
        self.old: dict[str, Any] = dict(old.artefacts) if old else {}
        self.force = force
        self.record: dict[str, Any] = {}
        self.fresh: list[str] = []  # names of the files that were made
        self.old_grid = old.class_images if old else None
        self.grid: Grid | None = None
        store = dtype_of(network.store)
        write_weights(draft / FULL.weights, {name: array.astype(store) for name, array in network.state.items()})
        self.made_from = {
            "weights": sha256(draft / FULL.weights),
            "network": hashlib.sha256(json.dumps(network.config.to_dict()).encode()).hexdigest(),
            "version": __version__,
        }
        # Without a record of files: those in the draft are not the ones whose sha256 the target's config.json holds.
        text = config_json(network.name, network.config, network.defaults)
        (draft / CONFIG).write_text(text, encoding="utf-8")

    def update(self, row: Precision) -> None:
        """Make a precision in the draft, or link the target's files there if they are up to date."""
        makers = {"full": self.make_full, "half": self.make_half, "integer": self.make_integer}
        entry = self.old.get(row.name)
        if entry and not self.force and self.is_current(entry):
            log.info("%s: unchanged (%s)", row.name, ", ".join(entry["files"]))
            for name in entry["files"]:
                if not (self.draft / name).exists():
                    link(self.target / name, self.draft / name)
            self.record[row.name] = entry
            return
        log.info("%s: exporting ...", row.name)
        names, report = makers[row.arithmetic](row)
        self.fresh += [name for name in names if name not in self.fresh]
        files = {name: sha256(self.draft / name) for name in names}
        self.record[row.name] = {"made_from": self.made_from, "files": files, "measured": report.to_dict()}

    def is_current(self, entry: dict[str, Any]) -> bool:
        return entry.get("made_from") == self.made_from and all(
            (self.target / name).exists() and sha256(self.target / name) == known
            for name, known in entry["files"].items()
        )

    def update_class_images(self, asked: bool, check: Callable[[], None]) -> None:
        """Draw the images of the classes, or keep the target's if they are up to date."""
        made_from = {**self.made_from, "sampling": to_config(self.network.defaults)}
        file, drawn, old = self.target / CLASS_IMAGES, self.draft / CLASS_IMAGES, self.old_grid
        is_current = old and old.made_from == made_from and file.exists() and sha256(file) == old.sha256
        if is_current and not self.force:
            self.grid = old
            link(file, drawn)
        elif layout := draw_classes(self.draft, drawn, asked, check):
            self.grid = Grid(*layout, sha256(drawn), made_from)
            self.fresh.append(CLASS_IMAGES)
            log.info("%s: %d bytes", CLASS_IMAGES, drawn.stat().st_size)

    def make_full(self, row: Precision) -> tuple[list[str], Report]:
        """The graphs of the network itself."""
        import torch

        from dsd_serve.engines.torch_engine import TorchEngine
        from dsd_serve.network import DSD

        model = DSD(self.network.config)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in self.network.state.items()})
        graph = share_weights(to_onnx(model), self.draft / row.weights, self.network.state)
        reference = TorchEngine(model)
        for name, proto in ((row.plain, graph), (row.fused, fuse(graph))):
            (self.draft / name).write_bytes(proto.SerializeToString())
            report = self.verify(name, name, reference, row)
        return [row.weights, row.plain, row.fused], report

    def make_half(self, row: Precision) -> tuple[list[str], Report]:
        """The fp32 graphs with their products in a type of half the size."""
        sources = {"plain": (FULL.plain, row.plain), "fused": (FULL.fused, row.fused)}
        products = block_products(self.load(FULL.plain))
        weights = self.keep_weights(row, half_weights(self.network.state, row.name, products))
        reference = OnnxEngine.load(self.draft)
        names = [weights]
        for form in row.graphs:
            source, name = sources[form]
            proto = to_half(self.load(source), row.name, self.draft / weights)
            (self.draft / name).write_bytes(proto.SerializeToString())
            if form == "plain":
                onnx.checker.check_model(str(self.draft / name), full_check=True)
            draft = f"emulated.{name}"
            (self.draft / draft).write_bytes(emulated(proto, row.name).SerializeToString())
            report = self.verify(draft, name, reference, row)
            names.append(name)
            if "cpu" in row.runs["onnx"]:
                OnnxEngine.load(self.draft, precision=row.name)
        return names, report

    def make_integer(self, row: Precision) -> tuple[list[str], Report]:
        """The fused fp32 graph with its products of integers."""
        proto = self.load(FULL.fused)
        products = block_products(proto)
        weights = self.keep_weights(row, int8_weights(self.network.state, products))
        (self.draft / row.fused).write_bytes(to_int8(proto, self.draft / weights, products).SerializeToString())
        return [weights, row.fused], self.verify(row.fused, row.fused, OnnxEngine.load(self.draft), row)

    def load(self, name: str) -> onnx.ModelProto:
        return onnx.load(self.draft / name, load_external_data=False)

    def keep_weights(self, row: Precision, weights: dict[str, NDArray[Any]]) -> str:
        """Write the weights of a precision, unless model.safetensors holds the same. Returns the name of the file."""
        if broken := [name for name, array in weights.items() if not np.isfinite(array.astype(np.float32)).all()]:
            raise CheckpointError(f"{len(broken)} weights are not finite in {row.name}, such as {broken[0]}")
        if all(array.dtype == dtype_of(self.network.store) for array in weights.values()):
            return FULL.weights
        write_weights(self.draft / row.weights, weights)
        return row.weights

    def verify(self, file: str, name: str, reference: Engine, row: Precision) -> Report:
        """Compare the graph in `file` of the draft with a reference. name: the graph, for the report."""
        ort = import_onnxruntime()
        session = open_session(ort, self.draft / file, *choose_provider(ort, "cpu"))
        report = verify(OnnxEngine(session, self.network.config, "cpu", row.name), reference, row.name)
        log.info("%s: %s", name, report)
        if not report.passed:
            raise CheckpointError(f"the graph {name} differs from the network, so nothing was written: {report}")
        return report

    def finish(self) -> list[Report]:
        """Write card.md and config.json, and move the new files to the target."""
        network = self.network
        reports = [Report(**entry["measured"]) for entry in self.record.values()]
        sizes = {
            precision: max((self.draft / name).stat().st_size for name in entry["files"] if name.endswith("tensors"))
            for precision, entry in self.record.items()
        }
        (self.draft / CARD).write_text(with_measurements(network.card, reports, sizes), encoding="utf-8")
        text = config_json(network.name, network.config, network.defaults, self.record, network.step, self.grid)
        (self.draft / CONFIG).write_text(text, encoding="utf-8")
        before = {name for entry in self.old.values() for name in entry["files"]}
        now = {name for entry in self.record.values() for name in entry["files"]}
        new = [name for name in (*self.fresh, CARD, CONFIG) if differs(self.draft / name, self.target / name)]
        if new:
            stale_images = [CLASS_IMAGES] if self.old_grid and not self.grid else []
            obsolete = [*sorted(before - now), *stale_images, *stale_plans(new)]
            commit(self.draft, self.target, [*new, *([] if CONFIG in new else [CONFIG])], obsolete)
        return reports


def link(source: Path, destination: Path) -> None:
    """The same file under another name: a hard link, or a copy if the filesystem has none."""
    try:
        destination.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, destination)


def stale_plans(new: Sequence[str]) -> list[str]:
    """The TensorRT plans, and their manifests, of graphs and weights that are replaced."""
    rows = [PRECISIONS[name] for name in precisions_of("tensorrt")]
    stale = [Path(row.plan) for row in rows if {row.plain, row.weights, FULL.weights}.intersection(new)]
    return [file.name for plan in stale for file in (plan, manifest_path(plan))]


def differs(ours: Path, theirs: Path) -> bool:
    return not theirs.exists() or sha256(ours) != sha256(theirs)
