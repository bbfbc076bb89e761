"""DSD: one vision transformer that encodes, denoises and decodes images, and the library that runs it.

    import dsd_serve
    model = dsd_serve.load()                                # the demo model, or a model directory
    model.generate("golden retriever", seed=7).save("dog.png")

Importing this package loads nothing else; its names are loaded when they are used, and none of them needs torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsd_serve.client import AsyncClient, Client
    from dsd_serve.imaging.codec import to_png
    from dsd_serve.loading import load
    from dsd_serve.model import Model
    from dsd_serve.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Model", "SamplingParams", "__version__", "load", "to_png"]

HOMES = {
    "AsyncClient": "client",
    "Client": "client",
    "Model": "model",
    "SamplingParams": "params",
    "load": "loading",
    "to_png": "imaging.codec",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
