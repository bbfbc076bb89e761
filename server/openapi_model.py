"""The served model in the OpenAPI document, which is written for ImageNet-1k: its own classes and samplers."""

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any
from urllib.parse import quote

from dsd_serve.labels import GOLDEN_RETRIEVER, ClassTable, ImageClass
from dsd_serve.params import SAMPLER_NAMES

Schema = dict[str, Any]

CLASS = "class"
OF_A_CLASS = ("GenerateRequest", "End")  # schemas of requests that need one
WITH_A_PROMPT = ("GenerationRequest", "EditForm")
GUIDANCE = ("guidance", "guidance_scale")
KINDS = "ImageNet-1k index, wnid or name"


def adapt(document: Schema, table: ClassTable) -> None:
    """Make the document that of a model with these classes."""
    example, other = table.example, table.other_example
    if example is None or other is None:
        return without_classes(document)
    require_class(document)
    describe_answers(document["components"]["schemas"], table, example)
    if not (table.is_imagenet and example.index == GOLDEN_RETRIEVER):
        name_examples(document, table, example, other)


def name_samplers(document: Schema, names: Collection[str]) -> None:
    """Leave only these of all samplers in the document."""

    def narrow(value: Any) -> None:
        for inner in value.values() if isinstance(value, dict) else value:
            if isinstance(inner, dict | list):
                narrow(inner)
        if isinstance(value, dict) and isinstance(known := value.get("enum"), list) and set(SAMPLER_NAMES) <= {*known}:
            value["enum"] = [name for name in known if name in names or name not in SAMPLER_NAMES]

    narrow(document)


def require_class(document: Schema) -> None:
    for name in OF_A_CLASS:
        schema = document["components"]["schemas"][name]
        del schema["properties"][CLASS]["default"]
        schema["required"] = [CLASS, *schema.get("required", ())]
    for parameter in document["paths"]["/generate"]["get"]["parameters"]:
        if parameter["name"] == CLASS:
            parameter["required"] = True
            parameter["schema"].pop("default", None)


def describe_answers(schemas: Schema, table: ClassTable, example: ImageClass) -> None:
    """The description of a class in answers."""
    answer = schemas["ImageClassAnswer"]
    for name, value in example.to_dict().items():
        answer["properties"][name]["examples"] = [value]
    answer["properties"]["index"]["maximum"] = len(table.classes) - 1
    wnid = answer["properties"]["wnid"]
    with_wnid = sum(bool(c.wnid) for c in table.classes)
    if not with_wnid:
        del answer["properties"]["wnid"]
    elif with_wnid == len(table.classes):
        del wnid["default"]
        answer["required"] = ["index", "wnid", "name"]
    if table.is_imagenet:
        wnid["pattern"] = "^n[0-9]{8}$"
    schemas["EndUsed"]["properties"][CLASS] = {"type": "integer", "title": "Class"}


def name_examples(document: Schema, table: ClassTable, example: ImageClass, other: ImageClass) -> None:
    """Replace the examples, golden retriever and goldfish, by classes of the model, and what they are named by."""
    kinds = KINDS if table.is_imagenet else "index, wnid or name" if table.has_wnids else "index or name"
    words = {
        KINDS: kinds,
        "ImageNet-1k index": KINDS.partition(",")[0] if table.is_imagenet else "index",
        "class=207": f"class={example.index}",
        "class=1&": f"class={other.index}&",
        '"class": 207': f'"class": {example.index}',
        '"class": 1}': f'"class": {other.index}}}',
        "q=retriever": f"q={quote(example.name)}",
        "dog.": "image.",
        "cat.": "other.",
    }
    wholes: dict[Any, Any] = {
        207: example.index,
        "207": str(example.index),
        "class:207": f"class:{example.index}",
        "golden retriever": example.name,
        "retriever": example.name,
        "n02099601": example.wnid or example.index,
    }

    def named(key: str, value: Any) -> Any:
        if isinstance(value, str) and value not in wholes:
            return replaced(value, words)
        if key == CLASS and value == 1 and value is not True:
            return other.index
        return wholes.get(value, value) if key in (CLASS, "examples") else value

    rewrite(document, named)
    for schema in with_examples(document):
        schema["examples"] = list(dict.fromkeys(map(str, schema["examples"])))


def without_classes(document: Schema) -> None:
    """Take out what a model without classes does not take; guidance is 1."""
    schemas = document["components"]["schemas"]
    schemas["EndUsed"]["properties"][CLASS] = {"type": "null", "title": "Class"}
    del schemas["ImageClassAnswer"]["properties"]["wnid"]
    for schema in (schemas["ImageClassAnswer"], *(s for name, s in schemas.items() if name in OF_A_CLASS)):
        schema["properties"].pop(CLASS, None)
    for operation in operations(document):
        operation["parameters"] = [p for p in operation.get("parameters", ()) if p["name"] != CLASS]
        for parameter in operation["parameters"]:
            unguided(parameter["name"], parameter["schema"])
        content = operation.get("requestBody", {}).get("content", {})
        examples = content.get("application/json", {}).get("examples", {})
        examples.pop("between classes", None)
        for example in examples.values():
            without_class(example["value"])
        if form := content.get("multipart/form-data"):
            prompt_of(form["schema"].get("properties", {}))
    for schema in schemas.values():
        for name, value in schema.get("properties", {}).items():
            unguided(name, value)
    for name in WITH_A_PROMPT:
        prompt_of(schemas.get(name, {}).get("properties", {}))
    words = {
        "generate?class=207": "generate?seed=1",
        "edit?class=1&": "edit?",
        '"class": 207, ': "",
        '"to": {"class": 1}': '"to": {"seed": 2}',
        '{"class": 207}': '{"seed": 1}',
        "images of a class": "images",
        "an image towards a class": "an image",
        " of the class that the prompt names": "",
        ", towards the class that the prompt names": "",
        "One end of a walk: a class, and the seed": "One end of a walk: the seed",
        ", between classes by averaging the clean estimates of both": "",
        ', or those that match `q`: `curl "localhost:8000/classes?q=retriever"`': "; this one has none",
        "dog.": "image.",
        "cat.": "other.",
    }
    rewrite(document, lambda _, value: replaced(value, words) if isinstance(value, str) else value)
    for schema in with_examples(document):
        schema.pop("examples")


def prompt_of(properties: Schema) -> None:
    """The prompt of a model without classes."""
    properties.pop("class_id", None)
    if "prompt" in properties:
        properties["prompt"] |= {"description": "empty or image: this model has no classes", "examples": ["image"]}


def unguided(name: str, schema: Schema) -> None:
    for part in schema.get("anyOf", (schema,)):
        if name in GUIDANCE and part.get("type") == "number":
            part |= {"minimum": 1, "maximum": 1}


def without_class(value: Any) -> None:
    for inner in (value, *value.values()):
        if isinstance(inner, dict):
            inner.pop(CLASS, None)


def operations(document: Schema) -> Iterator[Schema]:
    for item in document["paths"].values():
        yield from item.values()


def with_examples(document: Schema) -> Iterator[Schema]:
    """The schemas of class names and of searches for them that have examples."""
    schemas = document["components"]["schemas"]
    for name, field in ((name, field) for name in OF_A_CLASS for field in (CLASS,)):
        if "examples" in (schema := schemas[name]["properties"].get(field, {})):
            yield schema
    for operation in operations(document):
        for parameter in operation.get("parameters", ()):
            for schema in (parameter["schema"], *parameter["schema"].get("anyOf", ())):
                if parameter["name"] in (CLASS, "q") and "examples" in schema:
                    yield schema


def rewrite(value: Any, change: Callable[[str, Any], Any], key: str = "") -> None:
    """Replace every text and number in a document by `change(key, value)`; parts of a list have the key of the list."""
    for place, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        name = place if isinstance(value, dict) else key
        if isinstance(inner, dict | list):
            rewrite(inner, change, name)
        elif isinstance(inner, str | int):
            value[place] = change(name, inner)


def replaced(text: str, words: dict[str, str]) -> str:
    """A text with all of these words replaced, the longest first, and nothing twice."""
    pattern = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return re.sub(pattern, lambda found: words[found[0]], text)
