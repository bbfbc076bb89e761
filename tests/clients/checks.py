"""Checks for all clients: the same images as from plain requests, and the same errors."""

import json

import httpx


def native(url: str, photo=None, **query) -> str:
    """The base64 of an image from the native routes."""
    query = {"seed": 7, **query, "format": "json"}
    if photo is None:
        answer = httpx.get(f"{url}/generate", params=query)
    else:
        answer = httpx.post(f"{url}/edit", params=query, content=photo.read_bytes())
    return answer.raise_for_status().json()["images"][0]["base64"]


def check_openai(found, plain, photo) -> None:
    """Check the result of the exercise in openai.mjs, which runs in Node and in Chromium."""
    assert found["drawn"] == [native(plain, **{"class": 207, "index": index}) for index in (0, 1)]
    assert found["request_id"]
    # of two that are asked for: four steps are spread over intervals of two
    assert found["types"] == ["image_generation.partial_image", "image_generation.completed"]
    assert found["last"] == found["drawn"][0]
    assert found["edited"] == native(plain, photo, **{"class": 1})
    assert found["varied"] == native(plain, photo)
    assert found["models"] == ["dsd-demo"]
    refused = found["refused"]
    assert {why: refused[why] and refused[why]["status"] for why in refused} == {
        "unknown": 400,
        "big": 413,
        "key": 401,
        "bigAndKey": 401,
    }
    assert "class must be" in refused["unknown"]["message"]


def check_events(url, found) -> None:
    """Check that an EventSource got one complete drawing; for Node and Chromium."""
    # An `error` without data is EventSource's own: the end of a connection.
    sent = [(event["name"], json.loads(event["data"])) for event in found["events"] if event["data"]]
    ends = [(name, data["seed"]) for name, data in sent if name != "preview"]
    assert ends == [("image", ends[0][1]), ("image", ends[0][1]), ("done", ends[0][1])]
    assert found["closed"]
