"""The page: draw pictures of a class, and see what the network keeps of your own picture."""

import base64
import io
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no request leaves the machine

import gradio as gr
from PIL import Image

from dsd_serve.client import Client
from dsd_serve.errors import ServerError

SHOWN_SIZE = 256


def build_page(client: Client) -> gr.Blocks:
    """The page for one server. Raises ServerError when the server cannot be reached."""
    model = client.model()
    names = [(f"{c['name']} ({c['index']})", c["index"]) for c in client.classes()]
    defaults, limits = model["defaults"], model["limits"]
    with gr.Blocks(title=f"DSD: {model['name']}") as page:
        gr.Markdown(
            f"# {model['name']}\nOne network encodes, denoises and decodes. It draws {model['image_size']} x "
            f"{model['image_size']} pixels; they are shown larger here."
        )
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1):
                label = gr.Dropdown(names, value=preferred(names), label="Class", filterable=True)
                seed = gr.Number(0, label="Seed (same seed, same picture)", precision=0, minimum=0)
                dice = gr.Checkbox(True, label="A new seed each time")
                n = gr.Slider(1, limits["n"], value=4, step=1, label="Pictures")
                steps = gr.Slider(1, limits["steps"], value=defaults["steps"], step=1, label="Steps")
                sampler = gr.Dropdown(model["samplers"], value=defaults["sampler"], label="Sampler")
                guidance = gr.Slider(0, 10, value=defaults["guidance"], step=0.1, label="Guidance (1 is off)")
                button = gr.Button("Generate", variant="primary")
            gallery = gr.Gallery(label="Pictures", columns=4, scale=2, height=560, object_fit="contain")
        button.click(
            drawing(client),
            [label, seed, dice, n, steps, sampler, guidance],
            [gallery, seed],
            api_name="generate",
        )
        with gr.Tab("Reconstruct"):
            with gr.Row():
                photo = gr.Image(type="pil", label="Your picture", height=360)
                kept = gr.Image(type="pil", label="What the network keeps of it", height=360, interactive=False)
            quality = gr.Markdown()
            photo.change(reconstructing(client), photo, [kept, quality], api_name="reconstruct")
    return page


def preferred(names: list[tuple[str, int]]) -> int:
    indices = [index for _, index in names]
    return 207 if 207 in indices else indices[0]


def drawing(client: Client) -> Callable[..., tuple[list[tuple[Image.Image, str]], int]]:
    def draw(
        label: int, seed: float, dice: bool, n: float, steps: float, sampler: str, guidance: float
    ) -> tuple[list[tuple[Image.Image, str]], int]:
        answer = said(
            client.generate_json,
            label,
            seed=None if dice else int(seed),
            n=int(n),
            steps=int(steps),
            sampler=sampler,
            guidance=guidance,
            size=SHOWN_SIZE,
        )
        pictures = [
            (open_base64(item["base64"]), f"seed {answer['seed']}, {item['index']}") for item in answer["images"]
        ]
        return pictures, answer["seed"]

    return draw


def reconstructing(client: Client) -> Callable[[Image.Image | None], tuple[Image.Image | None, str]]:
    def rebuild(photo: Image.Image | None) -> tuple[Image.Image | None, str]:
        if photo is None:
            return None, ""
        buffer = io.BytesIO()
        photo.convert("RGB").save(buffer, "PNG")
        answer = said(client.reconstruct, buffer.getvalue(), size=SHOWN_SIZE)
        return open_base64(answer["base64"]), f"PSNR {answer['psnr']:.1f} dB at the network's own size"

    return rebuild


def said(call: Callable[..., dict[str, Any]], *arguments: Any, **settings: Any) -> dict[str, Any]:
    """Call the server; its errors become messages on the page."""
    try:
        return call(*arguments, **settings)
    except ServerError as error:
        raise gr.Error(str(error), print_exception=False) from None


def open_base64(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))
