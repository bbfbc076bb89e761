"""The examples run, and draw what they say."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.data import ROOT
from tests.support.odd_images import cats_and_dogs

OWN = ROOT / "examples/your_own_images.sh"


def own_images(folder, *arguments, port=0):
    """The example of your own images in a folder: its exit status and what it says."""
    bin_folder = Path(sys.executable).parent
    settings = {"PYTHONPATH": str(ROOT), "PATH": f"{bin_folder}:{os.environ['PATH']}", "PORT": str(port)}
    done = subprocess.run(
        ["sh", OWN, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def test_the_example_draws_and_edits(tmp_path):
    example = ROOT / "examples/edit_a_drawing.py"
    done = subprocess.run([sys.executable, example, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    images = [Image.open(tmp_path / name) for name in ("dog.png", "edited.png")]
    assert [(image.size, "dsd" in image.text) for image in images] == [((128, 128), True)] * 2
    assert images[0].tobytes() != images[1].tobytes()


@pytest.mark.thorough
def test_your_own_images_are_drawn_by_the_name_of_their_folder(tmp_path, free_port):
    cats_and_dogs(tmp_path / "photos", "Grandma's cat", "金毛犬")
    few = ["optim.steps=2", "optim.warmup_steps=1", "run.samples_per_class=0", "run.compile=off", "run.device=cpu"]
    port = free_port()
    status, said = own_images(tmp_path, "photos/", "金毛犬", *few, port=port)
    assert status == 0, said
    assert "image.png shows 金毛犬\n" in said
    assert "Traceback" not in said
    with Image.open(tmp_path / "image.png") as image:
        assert json.loads(image.text["dsd"])["class"] == {"index": 1, "name": "金毛犬"}
    with pytest.raises(ConnectionRefusedError):  # the server has ended
        socket.create_connection(("127.0.0.1", port), 5)
    assert (tmp_path / "photos.toml").exists()


def test_a_folder_that_is_not_there_is_refused_before_the_training(tmp_path):
    cats_and_dogs(tmp_path / "photos", "cat", count=1)
    assert own_images(tmp_path, "photos", "dog") == (1, "your_own_images.sh: there is no folder photos/dog\n")
    status, said = own_images(tmp_path)
    assert status != 0 and "usage: your_own_images.sh FOLDER CLASS" in said
    assert not (tmp_path / "photos.toml").exists()
