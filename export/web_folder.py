"""A static web page that draws with a model in the visitor's browser, without a server.

    DIR/index.html ...   the page, the files of export/web/
    DIR/network.json     the network, its classes and settings, and of each file that is fetched size and sha256
    DIR/model/           graph, weights and card of the model directory, and classes.webp, where there is one
    DIR/runtime/         ONNX Runtime Web

Nothing outside of the folder is fetched. It may be served by any static host, under any path.
"""

import json
import logging
import shutil
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from dsd_serve import __version__
from dsd_serve.checkpoint import ModelDir, read_model_dir, read_text, sha256
from dsd_serve.class_images import FILE as CLASS_IMAGES
from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError, DSDError
from dsd_serve.labels import table_of
from dsd_serve.params import API_NAMES, SETTINGS, SHOWN_WITH_IMAGE, SamplingParams, samplers_of
from export.commit import drafting, move
from export.draw_classes import SIZE
from export.source import CARD
from export.web_runtime import BUILDS, README, find_runtime, pinned_version

log = logging.getLogger(__name__)

FORMAT = "dsd-web-1"
DESCRIPTION = "network.json"
MODEL, RUNTIME = "model", "runtime"
EXACT = 2**53  # whole numbers up to here are numbers in JSON as browsers read it


def write_web(model_dir: Path, target: Path, runtime: Path | None = None) -> None:
    """Write the folder `target`, or bring one that this function wrote up to date.

    runtime: see `find_runtime`. Other files in the folder stay. Raises CheckpointError if the model directory is wrong,
    or `target` is something else; EngineUnavailableError without the runtime.
    """
    package = find_runtime(runtime)
    directory = read_model_dir(model_dir)
    check_target(target)
    with drafting(target) as draft:
        files = copy_model(directory, draft / MODEL) | copy_runtime(package, draft / RUNTIME)
        for page in resources.files("export").joinpath("web").iterdir():
            copy_page(page, draft / page.name)
        values = description(directory, files, copy_class_images(directory, draft / MODEL))
        (draft / DESCRIPTION).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        names = sorted(file.name for file in draft.iterdir() if file.name != DESCRIPTION)
        old = draft / "replaced"
        old.mkdir()
        moves = [(target / DESCRIPTION, old / DESCRIPTION)]
        for name in names:
            moves += [(target / name, old / name), (draft / name, target / name)]
        move([*moves, (draft / DESCRIPTION, target / DESCRIPTION)])
    for name, build in BUILDS.items():
        parts = [f"{RUNTIME}/{script_name(part)}" for part in (build.script, build.loader, build.binary)]
        size = sum(files[part]["bytes"] for part in (*parts, values["graph"], values["weights"]))
        log.info("with %s a browser fetches %.1f MB", name, size / 1e6)
    log.info("%s is a web page: python -m http.server --directory %s", target, target)


def check_target(target: Path) -> None:
    """Raises CheckpointError unless `target` is missing, empty, or a folder that `write_web` wrote."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"--web must be a folder, and {target} is a file")
    try:
        written = json.loads(read_text(target / DESCRIPTION)).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError, DSDError):
        written = False
    if not written and any(not name.name.startswith(".") for name in target.iterdir()):
        raise CheckpointError(f"--web must be a new folder, or one that --web wrote, and {target} has other files")


def copy_page(source: Traversable, target: Path) -> None:
    """Copy a file of the page, or a folder of them."""
    if source.is_dir():
        target.mkdir()
        for inner in source.iterdir():
            copy_page(inner, target / inner.name)
    else:
        target.write_bytes(source.read_bytes())


def copy_model(directory: ModelDir, folder: Path) -> dict[str, dict[str, Any]]:
    """Copy graph, weights and card. Returns size and sha256 of graph and weights, by their names in the page."""
    sources = graph_and_weights(directory)
    directory.check(sources)
    folder.mkdir()
    files = {f"{MODEL}/{source.name}": copy(source, folder / source.name) for source in sources}
    if (directory.path / CARD).exists():
        copy(directory.path / CARD, folder / CARD)
    directory.check_unchanged()
    return files


def graph_and_weights(directory: ModelDir) -> list[Path]:
    """The graph with ONNX Runtime's own attention, which is the faster one in a browser too, and its weights."""
    return [directory.graph(), directory.weights]


def copy_runtime(package: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Copy the builds of the runtime and its README. Returns size and sha256 of each file, by its name in the page."""
    folder.mkdir()
    names = [name for build in BUILDS.values() for name in (build.script, build.loader, build.binary)]
    files = {}
    for name in names:
        files[f"{RUNTIME}/{script_name(name)}"] = copy(package / "dist" / name, folder / script_name(name))
    copy(package / README, folder / README)
    licence = resources.files("export").joinpath("npm", "LICENSE.txt").read_bytes()
    (folder / "LICENSE.txt").write_bytes(licence)
    return files


def script_name(name: str) -> str:
    """The name of a file of the runtime in the page: many hosts send .mjs with a type that browsers refuse."""
    return name.removesuffix(".mjs") + ".js" if name.endswith(".mjs") else name


def copy(source: Path, target: Path) -> dict[str, Any]:
    """Copy a file. Returns its size and sha256."""
    shutil.copyfile(source, target)
    return {"bytes": target.stat().st_size, "sha256": sha256(target)}


def copy_class_images(directory: ModelDir, folder: Path) -> dict[str, Any] | None:
    """Copy the images of the classes, if the directory has them. Returns their places for the page."""
    grid = directory.class_images
    if grid is None:
        return None
    source = directory.path / CLASS_IMAGES
    directory.check([source])
    copy(source, folder / CLASS_IMAGES)
    url = f"{MODEL}/{CLASS_IMAGES}?v={grid.sha256[:16]}"
    return {"url": url, "columns": grid.columns, "perClass": grid.per_class, "size": SIZE}


def description(directory: ModelDir, files: dict[str, Any], images: dict[str, Any] | None) -> dict[str, Any]:
    """The contents of network.json."""
    config = directory.config
    graph, weights = (f"{MODEL}/{file.name}" for file in graph_and_weights(directory))
    builds = {
        name: {part: f"{RUNTIME}/{script_name(getattr(build, part))}" for part in ("script", "loader", "binary")}
        for name, build in BUILDS.items()
    }
    return {
        "format": FORMAT,
        "name": directory.name,
        "fingerprint": directory.fingerprint(),
        "version": __version__,
        "config": shape_of(config),
        "classes": [one.to_dict() for one in table_of(config).trained],
        "settings": settings_of(config, directory.defaults),
        "files": files,
        "graph": graph,
        "weights": weights,
        "runtime": {"version": pinned_version(), **builds},
        "classImages": images,
    }


def shape_of(config: ModelConfig) -> dict[str, Any]:
    """The network as programs.js and network.js read it."""
    return {
        "imageSize": config.image_size,
        "patchSize": config.patch_size,
        "latentShape": list(config.latent_shape),
        "nullLabel": config.null_label,
        "flowMap": config.flow_map,
    }


def settings_of(config: ModelConfig, defaults: SamplingParams) -> dict[str, Any]:
    """The settings of a call, by their names in the HTTP API, as params.js reads them.

    Limits beyond 2^53 are texts, which are read exactly.
    """
    found = {}
    for name in SHOWN_WITH_IMAGE:
        setting, values = SETTINGS[name], {"about": SETTINGS[name].about, "default": getattr(defaults, name)}
        if setting.choices:
            values["choices"] = samplers_of(config.flow_map) if name == "sampler" else setting.choices
        else:
            most = setting.most if setting.most <= EXACT else str(setting.most)
            values |= {"least": setting.least, "most": most, "whole": isinstance(setting.default, int)}
        found[API_NAMES[name]] = values
    return found
