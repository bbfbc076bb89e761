"""Parsing of the HTTP API's answers."""

import base64
import io
import json
import re

from PIL import Image

from dsd_serve.imaging.codec import read_image

# What no answer of a model with classes of its own contains.
# 207, the golden retriever, but not as one of Gradio's numbers of components.
IMAGENET = re.compile(
    r"imagenet|wnid|retriever|goldfish|n0\d{7}|(?<!\"id\":)(?<!\d,)\b207\b|class.{0,4}\b1000\b", re.IGNORECASE
)


def opened(answer):
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


def problem(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["title"]
    return body["detail"]


def events_of(answer):
    """The server-sent events of an answer as (name, value)."""
    found = []
    for block in answer.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def pixels_of(text):
    return read_image(base64.b64decode(text))
