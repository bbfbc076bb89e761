"""What all routes that draw share: classes, tasks, and the settings of a picture."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from dsd_serve import labels
from dsd_serve.labels import ImageClass
from dsd_serve.params import SamplingParams, to_api
from dsd_serve.programs import Edit, Task
from dsd_serve.rows import Array, Pixels
from server.service import Service


def find_class(service: Service, name: str | int, what: str = "class") -> ImageClass:
    """The class that a request names in its parameter `what`. Raises InputError."""
    return labels.resolve(str(name), service.config.trained_classes, what)


def edits(
    service: Service,
    pixels: Pixels,
    wanted: ImageClass | None,
    params: Sequence[SamplingParams],
    strength: float,
    mask: Array | None = None,
) -> list[Task]:
    """Redraw a picture towards a class, or none, once for each of `params`."""
    label = service.config.null_label if wanted is None else wanted.index
    return [Edit(pixels, label, p, strength, mask) for p in params]


def described(service: Service, wanted: ImageClass | None, params: SamplingParams) -> dict[str, Any]:
    """The settings of a picture under the names of the request."""
    return {
        "class": None if wanted is None else {"index": wanted.index, "wnid": wanted.wnid, "name": wanted.name},
        **to_api(params),
        "model": service.model.name,
        "fingerprint": service.model.fingerprint,
    }


def settings_headers(settings: Mapping[str, Any]) -> dict[str, str]:
    wanted = settings["class"]
    return {
        "X-DSD-Class": "none" if wanted is None else str(wanted["index"]),
        **{f"X-DSD-{name.title()}": str(settings[name]) for name in ("seed", "steps", "sampler")},
        "X-DSD-Model": quote(settings["model"], safe=" "),  # a folder may have any name
        "X-DSD-Guidance": f"{settings['guidance']:g}",
    }
