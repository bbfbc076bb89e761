"""A new sampling setting takes three edits, one of them for /v1. They are made in a copy of the project."""

import json
import os
import shutil
import subprocess
import sys

from tests.support.data import ROOT

# file, the text before which a line is inserted, the line
EDITS = [
    (
        "dsd_serve/params.py",
        "    guidance_start: float = setting(",
        '    churn: float = setting(0.25, "noise added per step", least=0, most=1, openai="s_churn", recommended=True, '
        "header=True)\n",
    ),
    (
        "server/schemas.py",
        '    guidance_start: Annotated[float | None, of_setting("guidance_start")',
        '    churn: Annotated[float | None, of_setting("churn"), RealNumber] = None\n',
    ),
    (
        "server/openai_schemas.py",
        '    guidance_scale: Annotated[float | None, of_setting("guidance_scale"), RealNumber] = None\n',
        '    s_churn: Annotated[float | None, of_setting("churn"), RealNumber] = None\n',
    ),
]

CHECK = """
import base64, io, json, sys
from pathlib import Path

import dsd_serve
from fastapi.testclient import TestClient
from PIL import Image

from dsd_serve.backends.task_messages import from_wire, to_wire
from dsd_serve.calls import generate
from dsd_serve.checkpoint import config_json
from dsd_serve.params import SamplingParams, from_openai
from dsd_serve.programs import Generate
from server.app import create_app
from server.service import Service
from server.settings import Settings

copy, model = sys.argv[1:]
assert dsd_serve.__file__.startswith(copy)
service = Service(Settings(model=(model,)))
query = {"class": 207, "steps": 1, "sampler": "euler", "seed": 1}
with TestClient(create_app(service)) as http:
    drawn = http.get("/generate", params={**query, "churn": 0.5})  # query string, header, PNG
    assert drawn.headers["X-DSD-Churn"] == "0.5"
    assert json.loads(Image.open(io.BytesIO(drawn.content)).text["dsd"])["churn"] == 0.5
    answer = http.post("/generate", json={**query, "churn": 0.75, "format": "json"}).json()  # JSON
    assert answer["churn"] == answer["images"][0]["churn"] == 0.75
    assert http.get("/model").json()["defaults"]["churn"] == 0.125  # config.json
    assert http.get("/generate", params=query).headers["X-DSD-Churn"] == "0.125"
    tags = [http.get("/generate", params={**query, "churn": churn}).headers["ETag"] for churn in (0.5, 0.6)]
    assert tags[0] != tags[1]
    refused = http.get("/generate", params={**query, "churn": 2})
    assert refused.status_code == 422 and "churn must be less than or equal to 1, got '2'" in refused.json()["detail"]
    operation = http.get("/openapi.json").json()["paths"]["/generate"]["get"]
    documented = next(item for item in operation["parameters"] if item["name"] == "churn")
    assert "noise added per step" in json.dumps(documented)
    assert "X-DSD-Churn" in operation["responses"]["200"]["headers"]
    settings = {**query, "churn": 0.5, "strength": 0.5}
    edited = http.post("/edit", params=settings, files={"image": drawn.content})
    assert edited.headers.get("X-DSD-Churn") == "0.5", edited.text
    sent = generate(207, **{name: value for name, value in query.items() if name != "class"}, churn=0.5)  # client
    assert http.request(sent.method, sent.path, **sent.arguments).headers["X-DSD-Churn"] == "0.5"
    body = {"prompt": "207", "num_inference_steps": 1, "seed": 1, "s_churn": 0.5}  # /v1
    (image,) = http.post("/v1/images/generations", json=body).json()["data"]
    text = Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))).text["dsd"]
    assert json.loads(text)["churn"] == 0.5
with dsd_serve.load(model) as loaded:  # Python
    image = loaded.generate(207, seed=1, num_steps=1, sampler="euler", churn=0.5)
    assert json.loads(image.info["dsd"])["churn"] == 0.5
from dsd_serve.shell import generate_command  # the shell
generate_command.main(["207", "--seed=1", "--steps=1", "--sampler=euler", "--churn=0.5", "-o=o.png", "--model", model])
assert Path("o.png").read_bytes() == dsd_serve.to_png(image)
task = Generate(207, SamplingParams(churn=0.5))  # Triton
info = service.models.default.info
inputs, parameters = to_wire(task)
assert parameters["churn"] == 0.5
assert from_wire(inputs, parameters, info.config, info.defaults)[0] == [task]
assert from_openai({"s_churn": 0.5}) == {"churn": 0.5}
"""


def test_a_new_setting_reaches_every_dialect(tmp_path, demo_dir):
    for folder in ("dsd_serve", "server"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    for edit in EDITS:
        insert(tmp_path, *edit)
    model = shutil.copytree(demo_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["sampling"]["churn"] = 0.125
    (model / "config.json").write_text(json.dumps(config))
    run(CHECK, tmp_path, model)


def insert(folder, name, before, line):
    """Insert a line into a file before a text that it has once."""
    file = folder / name
    text = file.read_text()
    assert text.count(before) == 1, f"{name} has changed: {before!r}"
    file.write_text(text.replace(before, line + before))


def run(code, folder, model):
    """Run Python code with the project in `folder`."""
    command = [sys.executable, "-c", code, str(folder), str(model)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
