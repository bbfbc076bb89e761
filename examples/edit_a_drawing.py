"""Load, generate, edit and show, in ten lines: python examples/edit_a_drawing.py [FOLDER]."""

import sys
from pathlib import Path

import dsd_serve

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
with dsd_serve.load() as model:  # the demo model
    dog = model.generate("golden retriever", seed=7, size=128)
    edited = model.edit(dog, "alp", strength=0.7, seed=7, size=128)
for name, image in {"dog.png": dog, "edited.png": edited}.items():
    (folder / name).write_bytes(dsd_serve.to_png(image))  # with the settings inside
if sys.stdout.isatty():
    edited.show()
