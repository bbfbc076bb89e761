"""The page's named endpoints, for programs that use gradio_client. The page does not show them."""

from base64 import b64decode
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from dsd_serve import calls
from dsd_serve.effective_rank import effective_rank
from dsd_serve.errors import DSDError
from dsd_serve.imaging.provenance import settings_of
from ui import html
from ui.display import SHOWN, animation, enlarged
from ui.private_files import read_upload
from ui.server_info import ServerInfo
from ui.values import whole


def build(info: ServerInfo) -> None:
    """generate, reconstruct, edit, walk, inspect, classes and model."""
    with gr.Column(visible=False):
        label_in = gr.Textbox("", label="Class")
        other_in = gr.Textbox("", label="Class at the other end")
        seed_in, other_seed_in, n_in = (gr.Number(value) for value in (0, 0, 1))
        index_in, other_index_in = gr.Number(0), gr.Number(0)
        steps_in, guidance_in, strength_in = gr.Number(None), gr.Number(None), gr.Number(0.6)
        sampler_in, query_in = gr.Textbox(None), gr.Textbox("")
        image_in, mask_in = html.photo("Image"), html.photo("Mask: white where to draw")
        images = gr.Gallery(label="PNGs with their settings", format="png")
        image, moving = gr.Image(type="filepath", format="png"), gr.File()
        settings, number = gr.JSON(), gr.Number()

    def endpoint(function: Any, inputs: list[Any], outputs: list[Any]) -> None:
        name = function.__name__
        gr.Button(visible=False).click(function, inputs, outputs, api_name=name, concurrency_limit=None)

    def saved(png: bytes) -> str:
        return str(save_bytes_to_cache(enlarged(png, SHOWN), "image.png", images.GRADIO_CACHE))

    async def generate(
        class_: str,
        seed: float,
        n: float = 1,
        steps: float | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        index: float | None = None,
    ) -> Any:
        """Draw n images of a class; a model without classes takes none. Returns their files and settings."""
        given = {**sampling(seed, index, steps, sampler, guidance), "n": whole_number("n", n, 1)}
        answer = await send(info, calls.generate_json(class_ or None, **given))
        files = [saved(b64decode(one["base64"])) for one in answer.pop("images")]
        return files, answer

    async def reconstruct(image: str | None) -> Any:
        """Encode an image and decode its latents. Returns the file and the PSNR in dB."""
        answer = await send(info, calls.reconstruct(read(image)))
        return saved(b64decode(answer["base64"])), answer["psnr"]

    async def edit(
        image: str | None,
        mask: str | None,
        class_: str,
        strength: float,
        seed: float,
        steps: float | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        index: float | None = None,
    ) -> Any:
        """Redraw an image, or the white part of its mask, towards a class. Returns the file and the settings."""
        mask_ = None if mask is None else read(mask)
        given = {**sampling(seed, index, steps, sampler, guidance), "strength": strength}
        answer = await send(info, calls.edit_json(read(image), mask_, class_=class_ or None, **given))
        (one,) = answer.pop("images")
        return saved(b64decode(one["base64"])), answer

    async def walk(
        class_: str,
        seed: float,
        to_class: str,
        to_seed: float,
        n: float,
        steps: float | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        index: float | None = None,
        to_index: float | None = None,
    ) -> Any:
        """Walk from a class and seed to another. Returns the files of n images and of an animation."""
        start = {
            "class": class_ or None,
            "seed": whole_number("seed", seed),
            "index": whole_number("index", index or 0),
        }
        end = {
            "class": to_class or None,
            "seed": whole_number("to_seed", to_seed),
            "index": whole_number("to_index", to_index or 0),
        }
        given = {"steps": steps if steps is None else whole_number("steps", steps, 1), "sampler": sampler or None}
        call = calls.interpolate(start, end, n=whole_number("n", n, 2), guidance=guidance, **given)
        answer = await send(info, call)
        pngs = [b64decode(one["base64"]) for one in answer["images"]]
        webp = save_bytes_to_cache(animation(pngs, SHOWN), "walk.webp", moving.GRADIO_CACHE)
        return [saved(png) for png in pngs], str(webp)

    async def inspect(image: str | None) -> Any:
        """The latents of an image, their effective rank, and the settings in its PNG."""
        data = read(image)
        z = await send(info, calls.encode(data))
        return {"latents": z.tolist(), "effective_rank": effective_rank(z), "settings": settings_of(data)}

    async def classes(query: str) -> Any:
        """The classes that the model can draw, or those that match."""
        return await send(info, calls.classes(query))

    async def model() -> Any:
        """The model that the server serves."""
        return await send(info, calls.model())

    how_in = [steps_in, sampler_in, guidance_in, index_in]
    endpoint(generate, [label_in, seed_in, n_in, *how_in], [images, settings])
    endpoint(reconstruct, [image_in], [image, number])
    endpoint(edit, [image_in, mask_in, label_in, strength_in, seed_in, *how_in], [image, settings])
    endpoint(walk, [label_in, seed_in, other_in, other_seed_in, n_in, *how_in, other_index_in], [images, moving])
    endpoint(inspect, [image_in], [settings])
    endpoint(classes, [query_in], [settings])
    endpoint(model, [], [settings])


def read(path: str | None) -> bytes:
    if path is None:
        raise gr.Error("image must be a PNG, JPEG or WebP, got nothing", print_exception=False)
    try:
        return read_upload(path)
    except DSDError as error:
        raise gr.Error(str(error), print_exception=False) from None


def whole_number(name: str, value: float, least: int = 0) -> int:
    """A whole number that a program has sent. Raises gr.Error."""
    try:
        return whole(name, value, least)
    except DSDError as error:
        raise gr.Error(str(error), print_exception=False) from None


def sampling(
    seed: float, index: float | None, steps: float | None, sampler: str | None, guidance: float | None
) -> dict[str, Any]:
    """The settings of a request; those that are None are the model's. Raises gr.Error."""
    return {
        "seed": whole_number("seed", seed),
        "index": whole_number("index", index or 0),
        "steps": None if steps is None else whole_number("steps", steps, 1),
        "sampler": sampler or None,
        "guidance": guidance,
    }


async def send(info: ServerInfo, call: Any) -> Any:
    """Send a call to the server. Raises gr.Error with the sentence of the server's error."""
    try:
        return await info.client.do(call)
    except DSDError as error:
        raise gr.Error(str(error), print_exception=False) from None
