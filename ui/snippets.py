"""Code that requests the same images without the page."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from ui.server_info import NO_CLASS

CLIENT = 'from pathlib import Path\nfrom dsd_serve.client import Client\n\nclient = Client("{url}")\n'


def lines(url: str, classes: Sequence[int], settings: Mapping[str, Any], n: int) -> dict[str, str]:
    """curl commands and Python code for `n` images of each class with the same settings. url: of the server."""
    values = {**settings, "n": n}
    if list(classes) == [NO_CLASS]:
        arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return {
            "curl": f'curl "{url}/generate?{urlencode(values)}" -o image.png',
            "Python": f'{CLIENT.format(url=url)}Path("image.png").write_bytes(client.generate({arguments}))',
        }
    return {
        "curl": "\n".join(
            f'curl "{url}/generate?{urlencode({"class": index, **values})}" -o {index}.png' for index in classes
        ),
        "Python": python(url, classes, values),
    }


def python(url: str, classes: Sequence[int], values: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return (
        f"{CLIENT.format(url=url)}"
        f"for index in {list(classes)}:\n"
        f'    Path(f"{{index}}.png").write_bytes(client.generate(index, {arguments}))'
    )
