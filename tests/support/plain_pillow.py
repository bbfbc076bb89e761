"""Pillow alone, with every limit that it has, on hostile files: python -m tests.support.plain_pillow prints JSON.

A bomb is read in a process of its own, whose memory and time the system measures, C allocations included.
"""

import io
import itertools
import json
import os
import resource
import sys
import warnings

from PIL import Image, ImageOps

from tests.support import hostile

MAX_PIXELS = 40_000_000
CPU_SECONDS = 1


def read(data: bytes) -> None:
    """Decode one still PNG, JPEG or WebP, upright and in RGB, or raise."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError("too many pixels")
        if getattr(file, "n_frames", 1) > 1:
            raise ValueError("animated")
        file.load()
        ImageOps.exif_transpose(file).convert("RGB")


def outcome(data: bytes) -> dict[str, object]:
    """Whether it is refused, and how many warnings that takes, each a line in a server's log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            read(data)
        except Exception:
            refused = True
        else:
            refused = False
    return {"refused": refused, "warnings": len(caught)}


def measured(data: bytes) -> dict[str, object]:
    """`outcome` in a fork, with its memory in MB. A file that takes longer than CPU_SECONDS is not refused."""
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        os.write(theirs, b"%d\n" % resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        os.write(theirs, json.dumps(outcome(data)).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        rest, answer = pipe.read().split(b"\n")
    _, _, used = os.wait4(child, 0)
    found = json.loads(answer) if answer else {"refused": False, "warnings": 0}
    return {**found, "memory": (used.ru_maxrss - int(rest)) / 1000}


def main() -> None:
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    others = (hostile.Upload(name, data) for name, data in hostile.other_files().items())
    cheap = (hostile.cut_files(), hostile.flipped_pngs(), hostile.wrong_headers(), hostile.animations(), others)
    results = {upload.name: outcome(upload.body) for upload in itertools.chain(*cheap)}
    results |= {upload.name: measured(upload.body) for upload in itertools.chain(hostile.bombs(), hostile.defused())}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
