"""Code that gives the same files without the page, byte for byte."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from ui.display import SHOWN
from ui.finished import Finished
from ui.links import needed
from ui.names import file_name

CLIENT = 'from pathlib import Path\nfrom dsd_serve.client import Client\n\nclient = Client("{url}")\n'
DECODED = "from base64 import b64decode\n"


def drawn(url: str, image: Finished, image_size: int) -> dict[str, str]:
    """curl and Python for an image that was drawn from noise. url: of the server. image_size: of its network."""
    values = settings_of(image, image_size)
    name = file_name(image.title, image.settings)
    label = values.pop("class", None)
    first = [] if label is None else [repr(label)]
    query = urlencode(({} if label is None else {"class": label}) | values)
    return {
        "curl": f'curl "{url}/generate?{query}" -o {shlex.quote(name)}',
        "Python": f"{CLIENT.format(url=url)}image = client.generate({arguments(first, values)})\n"
        f"Path({name!r}).write_bytes(image)",
    }


def edited(url: str, image: Finished, image_size: int, photo: str, mask: str = "") -> dict[str, str]:
    """The same for an edit. photo, mask: names of the files that it was made from; mask is empty if there was none."""
    values = settings_of(image, image_size)
    name = file_name(image.title, image.settings)
    files = f"-F {shlex.quote(f'image=@{photo}')}" + (f" -F {shlex.quote(f'mask=@{mask}')}" if mask else "")
    sent = [f"Path({photo!r}).read_bytes()", *([f"Path({mask!r}).read_bytes()"] if mask else [])]
    named = {"class_" if key == "class" else key: value for key, value in values.items()}
    return {
        "curl": f'curl {files} "{url}/edit?{urlencode(values)}" -o {shlex.quote(name)}',
        "Python": f"{DECODED}{CLIENT.format(url=url)}answer = client.edit({arguments(sent, named)})\n"
        f'Path({name!r}).write_bytes(b64decode(answer["images"][0]["base64"]))',
    }


def walked(
    url: str, ends: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], n: int, image_size: int
) -> dict[str, str]:
    """The same for a walk between classes or seeds. ends: as /interpolate takes them."""
    size = {"size": SHOWN} if image_size < SHOWN else {}
    start, end = ({name: value for name, value in one.items() if value is not None} for one in ends)
    body = json.dumps({"from": start, "to": end, "n": n, **settings, **size, "format": "zip"}, ensure_ascii=True)
    values = {"n": n, **settings, **size}
    return {
        "curl: the images": f"curl -H content-type:application/json {url}/interpolate -d {shlex.quote(body)} "
        "-o walk.zip",
        "Python: the animation": animated(url, f"client.interpolate({arguments([repr(start), repr(end)], values)})"),
    }


def walked_photos(url: str, photos: Sequence[str], n: int, image_size: int, model: str = "") -> dict[str, str]:
    """The same for a walk between photos. photos: names of their files."""
    values: dict[str, Any] = (
        {"n": n} | ({"size": SHOWN} if image_size < SHOWN else {}) | ({"model": model} if model else {})
    )
    files = " ".join(f"-F {shlex.quote(f'{end}=@{name}')}" for end, name in zip(("from", "to"), photos, strict=True))
    ends = [f"Path({name!r}).read_bytes()" for name in photos]
    call = f"client.do(calls.interpolate_images({arguments(ends, values)}))"
    return {
        "curl: the images": f'curl {files} "{url}/interpolate?{urlencode({**values, "format": "zip"})}" -o walk.zip',
        "Python: the animation": "from dsd_serve import calls\n" + animated(url, call),
    }


def animated(url: str, call: str) -> str:
    return (
        f"{DECODED}{CLIENT.format(url=url)}from ui.display import animation\n\n"
        f'walk = {call}\npngs = [b64decode(image["base64"]) for image in walk["images"]]\n'
        f'Path("walk.webp").write_bytes(animation(pngs, {SHOWN}))'
    )


def settings_of(image: Finished, image_size: int) -> dict[str, Any]:
    """The parameters of the request for one image, by their API names, at the size at which the page saves it."""
    settings = image.settings
    values = needed(settings) | ({"strength": settings["strength"]} if "strength" in settings else {})
    label = {"class": settings["class"]["index"]} if settings["class"] else {}
    size = {"size": SHOWN} if image_size < SHOWN else {}
    return {**label, **values, **size, **({"model": image.model} if image.model else {})}


def arguments(first: Sequence[str], values: Mapping[str, Any]) -> str:
    return ", ".join([*first, *(f"{name}={value!r}" for name, value in values.items())])
