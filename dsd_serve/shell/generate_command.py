"""dsd-generate: draw images of classes.

dsd-generate 207 -o dog.png                                      one image
dsd-generate goldfish "golden retriever" -n 4 -o animals         four of each, into a folder
dsd-generate all -n 2 --seed 1 --grid grid.png                   side by side
dsd-generate all --per-class 50 --shard 3/8 -o samples           a shard of a set for statistics

CLASS is an index, a wnid or a name, or `all` for all classes of the model. An image depends only on the model, the
settings, the class, the seed and the index, so its bytes equal those of the server and of Python. With -n the images of
each class have the indices 0, 1, 2 ...; with --per-class every image of the set has its own index. Files are named
CLASS-SEED-INDEX.png. No file is replaced without --force.

With --per-class, run a stopped command again to resume it. FILE.npz is in the format of ADM (guided-diffusion),
out-%05d.tar in that of webdataset. --merge joins the .npz files of all shards.
"""

import argparse
import itertools
import secrets
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsd_serve.errors import InputError
from dsd_serve.files import sentence_of
from dsd_serve.shell.arguments import (
    Parser,
    add_model_flags,
    add_sampling_flags,
    ending,
    load_model,
    parser_of,
    say,
    whole_number,
)

if TYPE_CHECKING:
    from dsd_serve.model import Model
    from dsd_serve.params import SamplingParams
    from dsd_serve.shell.sample_set import Sample

MAX_IMAGES = 1_000_000  # of each class
PER_TAR = 1000


def arguments_parser() -> Parser:
    parser = parser_of("dsd-generate", __doc__)
    parser.add_argument("names", nargs="*", metavar="CLASS", help="index, wnid or name of a class; all: every class")
    parser.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="the same, as a flag")
    parser.add_argument(
        "-n",
        type=whole_number(1, MAX_IMAGES),
        metavar="N",
        help="images of each class; all classes get the same noise (1)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="FILE.png, a folder, or - for stdout; with --per-class a folder, FILE.npz or out-%%05d.tar "
        "(default: this folder)",
    )
    parser.add_argument(
        "--grid",
        type=Path,
        metavar="FILE.png",
        help="write all images into one file, side by side; without -o only this file",
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    add_sampling_flags(parser, per_class=True)
    many = parser.add_argument_group("many images")
    many.add_argument(
        "--per-class",
        type=whole_number(1, MAX_IMAGES),
        metavar="N",
        help="images of each class; every image gets its own noise",
    )
    many.add_argument("--shard", metavar="I/N", help="draw part I of N, such as 3/8 (1/1)")
    many.add_argument("--per-tar", type=whole_number(1, MAX_IMAGES), metavar="N", help="images in a tar file (1000)")
    many.add_argument("--merge", action="store_true", help="join FILE-1-of-N.npz to FILE-N-of-N.npz into -o FILE.npz")
    add_model_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    with ending("dsd-generate"):
        options = arguments_parser().parse_args(arguments)
        if options.merge:
            merge(options)
        elif options.per_class:
            generate_many(options)
        else:
            generate_few(options)


def generate_few(options: argparse.Namespace) -> None:
    """Draw into PNG files."""
    for name in ("shard", "per_tar"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} is for --per-class N")
    names, count = [*options.names, *options.classes], options.n or 1
    with load_model(options, count * len(names)) as model:
        from dsd_serve.shell import image_files
        from dsd_serve.shell.sample_set import draw

        samples = requested(model, options, names, count)
        side = options.size or model.info.config.image_size
        files = None
        if options.grid:
            image_files.check_grid(options.grid, len(samples), side, options.force)
        if options.output or not options.grid:
            files = image_files.ImageFiles(options.output or ".", [sample.name for sample in samples], options.force)
        kept = []
        with closing(draw(model, samples, options.size)) as drawn:
            for sample, image in drawn:
                if files:
                    files.write(sample.number, image)
                if options.grid:
                    kept.append(image)
        if options.grid:
            image_files.write_grid(options.grid, kept)
        if files:
            files.show()


def requested(model: "Model", options: argparse.Namespace, names: Sequence[str], count: int) -> "list[Sample]":
    """`count` images of each class, with the indices of one request for it."""
    from dsd_serve.shell.sample_set import Sample, find_classes

    classes = find_classes(model, names)
    if len(classes) * count > MAX_IMAGES:
        raise InputError(f"at most {MAX_IMAGES:,} images, got {len(classes) * count:,}: --per-class draws more")
    first = sampling_params(model, options, secrets.randbelow(2**32))
    params = [replace(first, index=first.index + i) for i in range(count)]
    return [Sample(number, c, p) for number, (c, p) in enumerate(itertools.product(classes, params))]


def generate_many(options: argparse.Namespace) -> None:
    """Draw a shard of a set of samples."""
    for name in ("n", "grid", "force"):
        if getattr(options, name):
            raise InputError(f"{'-n' if name == 'n' else '--' + name} is not for --per-class, which has its own rules")
    if not options.output or options.output == "-":
        raise InputError("--per-class needs -o: a folder, FILE.npz or out-%05d.tar")
    from dsd_serve.shell.bulk import generate_shard, output_of
    from dsd_serve.shell.sample_set import SampleSet, Shard, find_classes, label_of

    shard = Shard.parse(options.shard or "1/1")
    output = output_of(options.output, shard, options.per_tar or PER_TAR)
    if options.per_tar and not options.output.endswith(".tar"):
        raise InputError("--per-tar is for -o out-%05d.tar")
    try:
        with load_model(options, MAX_IMAGES) as model:
            classes = sorted(find_classes(model, [*options.names, *options.classes]), key=label_of)
            samples = SampleSet(tuple(classes), options.per_class, sampling_params(model, options, 0))
            written, drawn = generate_shard(model, samples, shard, output, options.size)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(*error.args, "stopped; run the same command again to resume") from None
    except OSError as error:
        raise InputError(f"{sentence_of(error)}; run the same command again to resume") from None
    say(f"{drawn:,} images were drawn" if drawn else "all images already exist")
    for path in written:
        print(path)


def merge(options: argparse.Namespace) -> None:
    """Join the .npz files of shards."""
    if not options.output or not options.output.endswith(".npz"):
        raise InputError("--merge needs -o FILE.npz, next to FILE-1-of-N.npz to FILE-N-of-N.npz")
    from dsd_serve.shell.sample_arrays import merge as merge_arrays

    print(merge_arrays(Path(options.output)))


def sampling_params(model: "Model", options: argparse.Namespace, seed: int) -> "SamplingParams":
    """The parameters of the first image. seed: where none is given."""
    from dsd_serve.params import check_sampler, from_api

    values = vars(options)
    params = from_api({**values, "seed": seed if values["seed"] is None else values["seed"]}, model.info.defaults)
    check_sampler(params.sampler, model.info.config.flow_map)
    if not model.info.config.num_classes:
        (params,) = model.info.towards(None, [params], options.guidance)
    return params


if __name__ == "__main__":
    main()
