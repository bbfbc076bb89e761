"""A table of the hostile files that Pillow alone would read, each with the check of sanitize.py that it needs.

Pillow has all its limits here, see tests/support/plain_pillow.py. When a newer one refuses a file of the table, the
test fails: remove the file, and the check too if no other file needs it. pyproject.toml admits Pillow 12, which
allocates 2 GB for an animated WebP of 16384 x 16384 pixels as soon as it is opened, and copies all that an EXIF
directory points at. The walk through WebP files can go when 13 is required.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.support import hostile
from tests.support.data import ROOT

NEEDED = {
    "png cut at 7027 of 7028": "png_chunks: the chunk IEND must be whole",
    "png with a huge palette": "PNG_KEPT: the largest size of a chunk",
    "png of 1 x 40000000": "MAX_SIDE: rows take more than a GB",
    "png of 1 x 65536": "MAX_SIDE",
    "png of a million chunks": "MAX_PARTS: seconds",
    "png of a million empty IDAT": "MAX_PARTS: seconds",
    "jpeg of a million segments": "MAX_PARTS: seconds",
    "jpeg with frame c9": "JPEG_OTHER_FRAMES: arithmetic coding",
    "jpeg segment of length 0": "jpeg_segments: a length counts itself",
    "jpeg segment of length 1": "jpeg_segments: a length counts itself",
    "jpeg of 65 scans": "MAX_SCANS",
    "jpeg of 5000 scans": "MAX_SCANS: half a minute",
    "20 MB of FF": "JPEG_MARKER: a search of our own, Pillow's takes 15 seconds",
    "webp of 36 megapixels, all there": "ImageFile.memory: more than the budget of a small server",
}
# Images whose metadata Pillow refuses, or warns of entry by entry, each time with a line in the log. We drop it unread.
REFUSED = {"png of one zTXt bomb", "png with an iCCP bomb", "two images in a JPEG (MPO)"}
LOUD = {"png with an EXIF bomb", "jpeg with an EXIF bomb", "webp with an EXIF bomb"}  # which `orientation` reads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="costs are measured in forks")
@pytest.mark.thorough
def test_files_that_pillow_alone_would_read():
    run = [sys.executable, "-m", "tests.support.plain_pillow"]
    found = json.loads(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, timeout=280).stdout)
    harmless = {upload.name for upload in hostile.defused()}
    assert {name for name, one in found.items() if not one["refused"]} - harmless == set(NEEDED)
    assert {name for name in harmless if found[name]["refused"]} == REFUSED
    assert {name for name, one in found.items() if one["warnings"] > 100} == LOUD
    costs = {name: one["memory"] for name, one in found.items() if one["refused"] and "memory" in one}
    assert max(costs.values()) < 200, costs
