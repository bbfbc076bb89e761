"""The examples run, and draw what they say."""

import subprocess
import sys

from PIL import Image

from tests.support.data import ROOT


def test_the_example_draws_and_edits(tmp_path):
    example = ROOT / "examples/edit_a_drawing.py"
    done = subprocess.run([sys.executable, example, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    images = [Image.open(tmp_path / name) for name in ("dog.png", "edited.png")]
    assert [(image.size, "dsd" in image.text) for image in images] == [((128, 128), True)] * 2
    assert images[0].tobytes() != images[1].tobytes()
