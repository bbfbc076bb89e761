"""A model with classes of its own, and one without classes, through the whole system: nothing in it is ImageNet's."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import dsd_serve
from dsd_serve.backends import task_messages
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.client import Client
from dsd_serve.config import PRESETS
from dsd_serve.errors import CheckpointError, InputError, ServerError
from dsd_serve.imaging.codec import write_image
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Edit, Generate, Interpolate
from export.card import classes_sentence
from export.main import main as export
from server.openapi_model import replaced
from tests.support.answers import IMAGENET
from tests.support.data import sample_image
from tests.support.models import NAMES, OWN, PLAIN, export_model
from tests.support.servers import serving

GENERATIONS = "/v1/images/generations"
PHOTO = write_image(sample_image(1, 1))


@pytest.fixture(scope="module")
def own(own_dir: Path) -> Iterator[httpx.Client]:
    with serving("--model", str(own_dir), "--max-images", "4") as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def plain(plain_dir: Path) -> Iterator[httpx.Client]:
    with serving("--model", str(plain_dir)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def detail(answer: httpx.Response) -> str:
    assert answer.status_code in (400, 422), answer.text
    body = answer.json()
    return str(body["error"]["message"] if "error" in body else body["detail"])


def settings_of(png: bytes):
    return json.loads(Image.open(io.BytesIO(png)).text["dsd"])


# Own classes


@pytest.mark.parametrize(
    ("name", "index"),
    [("金毛犬", 1), ("1", 1), ("Café", 2), ("cafe", 2), ("CAFÉ", 2), ("grandma's cat", 0), ("cat", 0), ("2", 2)],
)
def test_a_class_is_drawn_by_its_name(own, name, index):
    answers = [
        own.get("/generate", params={"class": name, "seed": 1}),
        own.post("/generate", json={"class": name, "seed": 1}),
        own.get("/generate", params={"class": index, "seed": 1}),
    ]
    assert {answer.headers["X-DSD-Class"] for answer in answers} == {str(index)}
    assert len({answer.content for answer in answers}) == 1
    assert settings_of(answers[0].content)["class"] == {"index": index, "name": NAMES[index]}


def test_own_classes_give_different_images(own):
    images = {own.get("/generate", params={"class": i, "seed": 1, "format": "webp"}).content for i in range(3)}
    assert len(images) == 3


@pytest.mark.parametrize("name", ["dog", "n02099601", "207", "3", "", "犬", "?", "%"])
def test_any_other_name_is_refused_with_the_classes(own, name):
    sentence = detail(own.get("/generate", params={"class": name}))
    assert sentence.startswith(f"class must be an index or a name, got '{name}'; ")
    assert "the model has 0 (Grandma's cat), 1 (金毛犬), 2 (Café)" in sentence


@pytest.mark.parametrize(("value", "shown"), [(True, "true"), (None, "null"), (1.5, "1.5"), ([1], "[1]"), ({}, "{}")])
def test_a_value_of_another_type_is_refused(own, value, shown):
    assert detail(own.post("/generate", json={"class": value})) == f"class must be an index or a name, got {shown}"


def test_a_class_is_needed(own):
    assert detail(own.get("/generate")) == detail(own.post("/generate", json={"seed": 1})) == "class is missing"
    ends = {"from": {"seed": 1}, "to": {"class": 1}}
    assert detail(own.post("/interpolate", json=ends)) == "from.class is missing"


def test_edits_and_walks_take_own_names(own):
    answer = own.post("/edit", params={"class": "金毛犬", "seed": 1, "format": "json"}, content=PHOTO)
    assert answer.json()["class"] == {"index": 1, "name": "金毛犬"}
    ends = {"from": {"class": "Café", "seed": 1}, "to": {"class": "金毛犬"}, "n": 2, "format": "json"}
    walk = own.post("/interpolate", json=ends).json()
    assert (walk["from"]["class"], walk["to"]["class"]) == (2, 1)


def test_guidance_is_on_within_the_interval_that_the_model_recommends(own):
    interval = {"guidance_start": 0.25, "guidance_stop": 0.8}
    assert own.get("/model").json()["defaults"] | interval == own.get("/model").json()["defaults"]
    query = {"class": 1, "seed": 1, "steps": 6, "guidance": 9}
    recommended, given, everywhere, longer = (
        own.get("/generate", params={**query, **more})
        for more in ({}, interval, {"guidance_start": 0, "guidance_stop": 1}, {"guidance_stop": 1})
    )
    assert recommended.content == given.content
    assert len({one.content for one in (given, everywhere, longer)}) == 3
    assert settings_of(recommended.content).items() >= interval.items()
    assert settings_of(longer.content).items() >= {"guidance_start": 0.25, "guidance_stop": 1}.items()
    assert "got 0.9 and 0.8" in detail(own.get("/generate", params={**query, "guidance_start": 0.9}))
    extra = {"seed": 1, "num_inference_steps": 6, "guidance_scale": 9}
    for more, same in (({}, recommended), ({"guidance_interval": [0, 1]}, everywhere)):
        answer = own.post(GENERATIONS, json={"prompt": "class:1", **extra, **more})
        assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == same.content


def test_the_prompt_of_openai_names_an_own_class(own):
    for prompt, index in (("金毛犬", 1), ("class:2", 2), ("Café", 2), (" grandma's CAT ", 0)):
        answer = own.post(GENERATIONS, json={"prompt": prompt, "seed": 1})
        native = own.get("/generate", params={"class": index, "seed": 1})
        assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == native.content
    assert "an index or a name, got 'a dog'" in detail(own.post(GENERATIONS, json={"prompt": "a dog"}))
    form = {"files": {"image": ("a.png", PHOTO)}, "data": {"prompt": "金毛犬", "seed": "1"}}
    assert own.post("/v1/images/edits", **form).headers["X-DSD-Class"] == "1"


def test_classes_and_model_list_own_classes(own):
    listed = [{"index": index, "name": name} for index, name in enumerate(NAMES)]
    assert own.get("/classes").json() == own.get("/classes", params={"trained": False}).json() == listed
    assert own.get("/classes", params={"q": "金"}).json() == listed[1:2]
    assert own.get("/classes", params={"q": "dog"}).json() == []
    model = own.get("/model").json()
    assert (model["num_classes"], model["classes"]) == (3, [0, 1, 2])
    assert own.get("/").json()["try"].endswith("/generate?class=0")


def test_nothing_of_imagenet_is_in_any_answer(own, plain):
    for client in (own, plain):
        for path in ("/classes", "/model", "/model/card", "/openapi.json", "/metrics", "/", "/v1/models"):
            assert not (found := IMAGENET.search(client.get(path).text)), f"{path}: {found}"


def test_the_examples_of_the_document_work(own, plain):
    """Each example of a class in the OpenAPI document names one of the model; a model without has none."""
    document = own.get("/openapi.json").json()
    (parameter,) = (p for p in document["paths"]["/generate"]["get"]["parameters"] if p["name"] == "class")
    assert parameter["required"]
    assert parameter["schema"]["anyOf"][1]["enum"] == [0, 1, 2]
    for name in parameter["schema"]["examples"]:
        assert own.get("/generate", params={"class": name, "steps": 1}).status_code == 200
    for client, texts in ((own, document), (plain, plain.get("/openapi.json").json())):
        for path in ("/generate", "/interpolate"):
            examples = texts["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
            assert examples
            for example in examples.values():
                assert client.post(path, json=example["value"]).status_code == 200, example
    schema = document["components"]["schemas"]["ImageClassAnswer"]
    assert (set(schema["properties"]), schema["required"]) == ({"index", "name"}, ["index", "name"])


def test_words_are_replaced_once():
    assert replaced("class=207 and class=1&", {"class=207": "class=1&", "class=1&": "x"}) == "class=1& and x"


# The same from Python, over Triton's messages, and at export


def test_python_draws_the_same_bytes(own, own_dir):
    with dsd_serve.load(own_dir) as model:
        assert [c.name for c in model.classes] == list(NAMES)
        image = model.generate("金毛犬", seed=1)
        assert dsd_serve.to_png(image) == own.get("/generate", params={"class": 1, "seed": 1}).content
        with pytest.raises(InputError, match="class must be an index or a name, got 'dog'"):
            model.generate("dog")
        with pytest.raises(InputError, match="class must be an index or a name, got null"):
            model.generate()


def test_the_client_draws_and_lists(own):
    client = Client(str(own.base_url))
    assert client.generate("Café", seed=1) == own.get("/generate", params={"class": 2, "seed": 1}).content
    assert [one["name"] for one in client.classes()] == list(NAMES)
    with pytest.raises(ServerError, match="the model has 0"):
        client.generate("dog")


def test_triton_messages_take_own_names():
    def tasks(**parameters):
        return task_messages.from_wire({}, parameters, OWN, SamplingParams())[0]

    (task,) = tasks(operation="generate", label="金毛犬")
    assert task == Generate(1, SamplingParams())
    (task,) = tasks(operation="interpolate", label="Café", to_label=0, fraction=0.5)
    assert (task.start.label, task.end.label) == (2, 0)
    with pytest.raises(InputError, match="label must be an index or a name, got 'dog'"):
        tasks(operation="generate", label="dog")
    with pytest.raises(InputError, match="the parameter label is missing"):
        tasks(operation="generate")


def test_the_card_lists_own_classes(own_dir):
    card = (own_dir / "card.md").read_text()
    assert "3 classes, and nothing else: Grandma's cat (0), 金毛犬 (1), Café (2)." in card
    assert "licences of its training images" in card
    assert not IMAGENET.search(card)
    assert "the model has no classes" in classes_sentence(PLAIN)
    assert classes_sentence(PRESETS["demo"]) == "All 1000 classes of ImageNet-1k."


def test_an_export_of_an_export_keeps_the_classes(own_dir, tmp_path):
    export([str(own_dir), "-o", str(tmp_path / "again"), "--guidance", "3"])
    assert read_model_dir(tmp_path / "again").config == OWN


# A model without classes


def test_without_classes_an_image_needs_no_class(plain):
    image = plain.get("/generate", params={"seed": 1})
    assert image.headers["X-DSD-Class"] == "none"
    assert settings_of(image.content)["class"] is None
    same = [
        plain.post("/generate", json={"seed": 1}),
        plain.post("/generate", json={"seed": 1, "class": None, "guidance": 1}),
        plain.get("/generate", params={"seed": 1, "guidance": 1}),
    ]
    assert {answer.content for answer in same} == {image.content}
    assert plain.get("/classes").json() == plain.get("/classes", params={"q": "cat"}).json() == []
    assert plain.get("/model").json()["num_classes"] == 0
    assert plain.head("/generate", params={"seed": 1}).status_code == 200
    assert "event: done" in plain.get("/generate", params={"format": "events"}).text


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/generate", {"class": "cat"}, "class must be left out: this model has no classes, got 'cat'"),
        ("/generate", {"class": 0}, "class must be left out: this model has no classes, got 0"),
        ("/generate", {"class": ""}, "class must be left out: this model has no classes, got ''"),
        ("/generate", {"guidance": 3}, "guidance must be 1 or left out: this model has no classes to guide to, got 3"),
        ("/interpolate", {"from": {"class": 1}, "to": {}}, "from.class must be left out: this model has no classes"),
        ("/interpolate", {"from": {}, "to": {}, "guidance": 2}, "guidance must be 1 or left out"),
        (GENERATIONS, {"prompt": "a cat"}, "prompt must be empty or image: this model has no classes, got 'a cat'"),
        (GENERATIONS, {"prompt": "", "class_id": 1}, "class_id must be left out: this model has no classes, got 1"),
        (GENERATIONS, {"prompt": "image", "guidance_scale": 2}, "guidance_scale must be 1 or left out"),
    ],
)
def test_without_classes_a_class_or_guidance_is_refused(plain, path, body, sentence):
    assert detail(plain.post(path, json=body)).startswith(sentence)


def test_without_classes_edits_walks_and_prompts_work(plain):
    assert plain.post("/edit", params={"seed": 1, "format": "json"}, content=PHOTO).json()["class"] is None
    refused = plain.post("/edit", params={"class": "cat"}, content=PHOTO)
    assert detail(refused) == "class must be left out: this model has no classes, got 'cat'"
    walk = {"from": {"seed": 1}, "to": {"seed": 2}, "n": 3, "format": "json"}
    images = plain.post("/interpolate", json=walk).json()["images"]
    assert len({one["base64"] for one in images}) == 3
    assert images[0]["from"] == {"class": None, "seed": 1}
    native = plain.get("/generate", params={"seed": 1}).content
    for prompt in ("", "image", " Image "):
        answer = plain.post(GENERATIONS, json={"prompt": prompt, "seed": 1})
        assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == native
    form = {"files": {"image": ("a.png", PHOTO)}, "data": {"prompt": "image", "seed": "1"}}
    for path in ("/v1/images/edits", "/v1/images/variations"):
        data = form["data"] if path.endswith("edits") else {"seed": "1"}
        assert plain.post(path, files=form["files"], data=data).status_code == 200


def test_without_classes_python_takes_none(plain, plain_dir):
    with dsd_serve.load(plain_dir) as model:
        assert model.classes == []
        assert dsd_serve.to_png(model.generate(seed=1)) == plain.get("/generate", params={"seed": 1}).content
        assert len(model.generate(seed=1, n=2)) == 2
        assert len(model.walk(seed=1, end_seed=2, n=3)) == 3
        assert model.edit(PHOTO, seed=1).size == (16, 16)
        with pytest.raises(InputError, match="class must be left out: this model has no classes, got 'cat'"):
            model.generate("cat")
        with pytest.raises(InputError, match="guidance_scale must be 1 or left out"):
            model.generate(guidance_scale=2)
    client = Client(str(plain.base_url))
    assert client.generate(seed=1) == plain.get("/generate", params={"seed": 1}).content


def test_without_classes_triton_messages_need_no_label():
    def tasks(inputs=None, **parameters):
        return task_messages.from_wire(inputs or {}, parameters, PLAIN, SamplingParams())[0]

    assert tasks(operation="generate") == [Generate(0, SamplingParams())]
    inputs, parameters = task_messages.to_wire(Generate(0, SamplingParams(seed=3)))
    assert tasks(inputs, **parameters) == [Generate(0, SamplingParams(seed=3))]
    (walk,) = tasks(operation="interpolate", fraction=0.5, to_seed=3)
    assert isinstance(walk, Interpolate)
    assert (walk.start.label, walk.end.label, walk.end.seed) == (0, 0, 3)
    pixels = np.zeros((1, *PLAIN.pixel_shape), np.uint8)
    (edit,) = tasks({"pixels": pixels}, operation="edit", strength=0.5)
    assert isinstance(edit, Edit)
    for label in ("cat", 1):
        with pytest.raises(InputError, match="label must be left out: this model has no classes, got"):
            tasks(operation="generate", label=label)
    with pytest.raises(InputError, match="guidance_scale must be 1 or left out"):
        tasks(operation="generate", guidance_scale=2.0)


def test_a_model_without_classes_cannot_recommend_guidance(plain_dir, tmp_path, capsys):
    with pytest.raises(SystemExit, match="guidance scale of a model without classes must be 1, which is off, got 3"):
        export_model(PLAIN, tmp_path, "--guidance", "3")
    config = json.loads((plain_dir / "config.json").read_text())
    config["sampling"]["guidance_scale"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="guidance scale of a model without classes must be 1"):
        read_model_dir(tmp_path)
