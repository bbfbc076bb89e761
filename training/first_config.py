"""dsd-train init: write a first configuration that fits a set of images.

dsd-train init IMAGES [-o FILE.toml] [--start-from MODEL] [--validation IMAGES] [--labels own] [--force]

IMAGES is a folder with a folder for each class, a folder of images, parquet, tar or CSV files, as for data.path. Image
size, network, length and augmentation are chosen from the images and from the measured speed of this machine. With
--start-from the run fine-tunes a model: it has that model's network, and a tenth of the steps.
"""

import argparse
import json
import logging
import re
import statistics
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from dsd_serve.checkpoint import read_model_dir
from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError, DSDError, InputError
from dsd_serve.files import atomic
from dsd_serve.imaging import codec
from training.classes import NO_CLASSES
from training.dataset import HELD_OUT, LOOKED_AT, MAX_PIXELS, Images, split
from training.device import Device, choose_device
from training.estimate import duration, free_bytes, kept_for_backward, micro_batches, size, speed_here, state_bytes
from training.inventory import classes_line
from training.run_config import DataSection, TrainConfig
from training.state import new_state
from training.transfer import DEMO, start_place

SIZES = (32, 64, 128, 256)
SLOW = 4 * 3600  # seconds of a run, above which a shorter one is proposed
FINE_TUNING_RATE = 3e-4
USED = 0.6  # share of the free memory that a run may take


@dataclass(frozen=True)
class Shape:
    """A network for images of `image_size` pixels, as keys of [model]."""

    preset: str
    image_size: int
    patch_size: int
    latent_dim: int
    hidden_size: int
    depth: int
    num_heads: int


@dataclass(frozen=True)
class Length:
    """The length of a run, and what follows from it."""

    steps: int
    batch_size: int
    warmup_steps: int
    eval_every: int
    ema_decay: float


def shorter_side(images: Images) -> int:
    """The median of the shorter sides of some images, in pixels."""
    sides = []
    for index in np.unique(np.arange(LOOKED_AT) * len(images) // LOOKED_AT).tolist():
        try:
            data, _ = images.source.read(int(images.indices[index]))
            file = codec.open_file(data, MAX_PIXELS)
        except (DSDError, OSError):
            continue
        sides.append(min(file.width, file.height))
    if not sides:
        raise CheckpointError(f"{images.path} has no images that can be read")
    return int(statistics.median(sides))


def shape_for(side: int, count: int, cuda: bool) -> Shape:
    """A network for `count` images whose shorter side has `side` pixels.

    A CPU gets few tokens: with 64 instead of 16 a step takes five times as long.
    """
    image_size = max(s for s in SIZES if s <= max(side, SIZES[0]) and (cuda or s <= 64))
    patch_size = max(8, image_size // (16 if cuda else 4))
    latent_dim = 16 if patch_size == 8 else 32
    if not cuda or count < 2_000:
        return Shape("demo", image_size, patch_size, latent_dim, 192, 6, 6)
    if count < 500_000:
        return Shape("dsd-s", image_size, patch_size, latent_dim, 384, 12 if count < 50_000 else 22, 6)
    return Shape("dsd-m", image_size, patch_size, latent_dim, 768, 16, 12)


def shape_like(model: ModelConfig, side: int) -> Shape:
    """The network of a model, for images whose shorter side has `side` pixels: as many tokens, larger patches."""
    larger = max(model.image_size, *(s for s in SIZES if s <= side and s % model.image_size == 0), 0)
    patch_size = model.patch_size * larger // model.image_size
    return Shape("demo", larger, patch_size, model.latent_dim, model.hidden_size, model.depth, model.num_heads)


def length_for(count: int, cuda: bool, fine_tuning: bool = False) -> Length:
    """So many steps that each of few images is seen hundreds of times, each of many at least fifty. Fine-tuning takes a
    tenth of it."""
    batch = 256 if cuda else 64
    while batch > 2 and batch > count // 2:
        batch //= 2
    seen = max(200_000, min(400 * count, 20_000_000), 50 * count) if cuda else max(50_000, min(200 * count, 400_000))
    steps = seen // batch // (10 if fine_tuning else 1)
    decay = 0.99 if steps < 1500 else 0.995 if steps < 3000 else 0.999
    return Length(steps, batch, max(1, steps // 12), max(1, steps // 10), decay)


def augmentation_for(count: int) -> tuple[float, float]:
    """(crop, colour) of [data]: the fewer images there are, the more they are varied."""
    return (0.7, 0.1) if count < 1_000 else (0.85, 0.05) if count < 10_000 else (1.0, 0.0)


def quoted(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def place_of(path: str) -> str:
    """The place as it is found from any folder."""
    return path if path.startswith("hf:") else str(Path(path).expanduser().absolute())


def name_of(path: str) -> str:
    """A name for the configuration and its run, from the last part of the place of the images."""
    last = path.rpartition("/")[2] if path.startswith("hf:") else Path(path).absolute().stem
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "images"


def configuration(images: Images, options: argparse.Namespace, shape: Shape, cuda: bool, micro: int = 0) -> str:
    """The text of the file, without its head. micro: images of a micro-batch; 0: the whole batch."""
    count = len(images)
    start = quoted(options.start_from if options.start_from == DEMO else place_of(options.start_from))
    start = f"start_from = {start}  # fine-tunes its weights\n" if options.start_from else ""
    length, (crop, colour) = length_for(count, cuda, bool(start)), augmentation_for(count)
    rate = FINE_TUNING_RATE if start else 1e-3 if shape.hidden_size < 384 else 5e-4
    has_classes = images.table != NO_CLASSES
    counts = np.unique(images.labels, return_counts=True)[1]
    uneven = counts.max() >= 4 * counts.min()
    tokens = (shape.image_size // shape.patch_size) ** 2
    validation = f"validation_share = {min(0.1, max(0.01, HELD_OUT / count)):.2g}  # of each class, held out"
    if options.validation:
        validation = f"validation = {quoted(place_of(options.validation))}"
    needed = images.num_bytes() * (shape.image_size / images.size) ** 2 / 1e9
    memory = min(1.1 * needed + 0.1, USED * free_memory())
    labels = f"labels = {quoted(options.labels)}  # of auto, imagenet, own and none\n"
    labels = "" if options.labels == "auto" else labels
    return f"""\
[model]
preset = "{shape.preset}"  # the other settings: dsd_serve/config.py
image_size = {shape.image_size}  # pixels; images are cropped to squares in their middle
patch_size = {shape.patch_size}  # {tokens} tokens; half of it is finer, and four to five times as slow
latent_dim = {shape.latent_dim}  # channels of a token
hidden_size = {shape.hidden_size}
depth = {shape.depth}
num_heads = {shape.num_heads}

[data]
path = {quoted(place_of(images.path))}
{validation}
{labels}flip = true  # false where left and right matter, as in writing
crop = {crop}  # random squares of at least this share of the area; 1: off
colour = {colour}  # changes of brightness, contrast and saturation up to this share; 0: off
balance = {"true" if uneven else "false"}  # true: rare classes are drawn as often as frequent ones
memory_gb = {memory:.1f}  # decoded images up to this size are held in memory
broken_share = 0.05  # images that cannot be read are skipped up to this share

[loss]
num_draws = 4  # noise draws for each encoded image

[optim]
steps = {length.steps}  # {length.steps * length.batch_size / count:.0f} times each image
batch_size = {length.batch_size}
micro_batch_size = {micro or length.batch_size}  # lower it where memory does not suffice; results stay the same
lr = {rate:g}
warmup_steps = {length.warmup_steps}
ema_decay = {length.ema_decay}  # closer to 1 for longer runs

[run]
{start}eval_every = {length.eval_every}  # images and metrics, in the folder of the run
save_every = {min(500, length.eval_every)}
sample_guidance = {2.0 if has_classes else 1.0}  # of the images at evaluations; without classes there is none
"""


def free_memory() -> float:
    """Free memory of the machine in GB."""
    return free_bytes(Device(torch.device("cpu"), False, False)) / 1e9


def measure(config: TrainConfig, where: Device) -> tuple[int, float, str]:
    """(images that fit into a micro-batch, seconds of a step, the memory of a run as text), measured here."""
    state = new_state(config, where.device)
    forward: Any = torch.compile(state.objective) if where.compiled else state.objective
    each, extra = kept_for_backward(state, micro_batches(state, state.objective, config, where))
    fixed = sum(state_bytes(state).values()) + extra
    most = int((USED * free_bytes(where) - fixed) // each)
    if most < 1:
        raise CheckpointError(
            f"a run needs {size(fixed + each)}, but only {size(free_bytes(where))} are free here; free some memory"
        )
    micro = config.optim.batch_size
    while micro > most:
        micro //= 2
    speed = speed_here(state, micro_batches(state, forward, config, where), config, where, micro)
    return micro, speed.step_seconds(config.optim), size(fixed + each * micro)


def lines(options: argparse.Namespace) -> Iterator[str]:
    """Look at the images, write the configuration, and say what it is like."""
    data = DataSection(labels=options.labels)
    images = Images(options.images, 32, data=data)
    images.look()
    side = shorter_side(images)
    yield f"{len(images)} images, the shorter side of most about {side} pixels"
    yield classes_line(images)
    yield from images.source.remarks
    if options.validation:
        Images(options.validation, 32, data=data, table=images.table).look()
    else:
        split(images)  # too few images fail here, and not in the first run
    where = choose_device(TrainConfig(), TrainConfig().network_config())
    cuda = where.device.type == "cuda"
    if options.start_from:
        shape = shape_like(read_model_dir(start_place(options.start_from)).config, side)
    else:
        shape = shape_for(side, len(images), cuda)
    config = TrainConfig.from_dict(tomllib.loads(configuration(images, options, shape, cuda)))
    yield f"measuring steps at {shape.image_size} x {shape.image_size} pixels on {where.device} ..."
    micro, seconds, memory = measure(config, where)
    whole = duration(config.optim.steps * seconds)
    text = configuration(images, options, shape, cuda, micro)
    head = (
        f"# Written by dsd-train init for {len(images)} images, of which the shorter side has about {side} pixels.\n"
        f"# Measured on {where.device}: about {whole} for {config.optim.steps} steps, {memory} of memory,\n"
        "# without reading images and evaluations. Every key: training/run_config.py.\n\n"
    )
    with atomic(options.output) as temporary:
        temporary.write_text(head + text, encoding="utf-8", errors="strict")
    yield f"{options.output}: {config.optim.steps} steps, about {whole} on {where.device}, {memory} of memory"
    if config.optim.steps * seconds > SLOW:
        few = max(100, int(3600 / seconds))
        shorter = f"optim.steps={few} optim.warmup_steps={few // 12}"
        yield f"an hour's run, for a first look: dsd-train {options.output} {shorter}"
    yield f"next: dsd-train {options.output}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="dsd-train init", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", metavar="IMAGES", help="images, in any form of data.path")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: NAME.toml, after the name of IMAGES"
    )
    parser.add_argument(
        "--start-from", default="", metavar="MODEL", help="model directory to fine-tune, or demo for the demo model"
    )
    parser.add_argument(
        "--validation", default="", metavar="IMAGES", help="held-out images (default: a share of IMAGES)"
    )
    choices = get_args(DataSection.model_fields["labels"].annotation)
    parser.add_argument(
        "--labels",
        choices=choices,
        default="auto",
        help="what class names are: wnids and labels of ImageNet-1k, or own names",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.output is None:
        options.output = Path(f"{name_of(options.images)}.toml")
    try:
        if options.output.exists() and not options.force:
            raise InputError(f"{options.output} exists; --force replaces it, -o FILE writes another")
        for line in lines(options):
            print(line, flush=True)
    except UnicodeEncodeError:
        sys.exit("dsd-train init: the path of the images is not text in UTF-8; rename the folder")
    except OSError as error:
        sys.exit(f"dsd-train init: {error.filename or options.output} cannot be written: {error.strerror}")
    except DSDError as error:
        sys.exit(f"dsd-train init: {error}")
