"""The endpoints of the page that programs call by name through gradio_client. They are not seen on the page."""

from base64 import b64decode
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from dsd_serve import calls
from dsd_serve.errors import DSDError
from ui import html
from ui.display import SHOWN, animation, effective_rank, enlarged, settings_of
from ui.private_files import read_upload
from ui.server_info import Known


def build(known: Known) -> None:
    """generate, reconstruct, edit, walk, inspect, classes and model."""
    with gr.Column(visible=False):
        label_in = gr.Textbox("207", label="Class: index, wnid or name")
        other_in = gr.Textbox("1", label="Class at the other end")
        seed_in, other_seed_in, n_in = (gr.Number(value, precision=0) for value in (0, 0, 1))
        steps_in, guidance_in, strength_in = gr.Number(None, precision=0), gr.Number(None), gr.Number(0.6)
        sampler_in, query_in = gr.Textbox(None), gr.Textbox("")
        image_in, mask_in = html.photo("Picture"), html.photo("Mask, white where to draw")
        pictures = gr.Gallery(label="PNGs with their settings", format="png")
        picture, moving = gr.Image(type="filepath", format="png"), gr.File()
        settings, number = gr.JSON(), gr.Number()

    def endpoint(function: Any, inputs: list[Any], outputs: list[Any]) -> None:
        name = function.__name__
        gr.Button(visible=False).click(function, inputs, outputs, api_name=name, concurrency_limit=None)

    def saved(png: bytes) -> str:
        return str(save_bytes_to_cache(enlarged(png, SHOWN), "picture.png", pictures.GRADIO_CACHE))

    async def generate(
        class_: str,
        seed: int,
        n: int = 1,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
    ) -> Any:
        """Draw n pictures of a class: their files, and the settings that were used."""
        asked = {"seed": seed, "n": n, "steps": steps, "sampler": sampler or None, "guidance": guidance}
        answer = await said(known, calls.generate_json(class_, **asked))
        images = [saved(b64decode(one["base64"])) for one in answer.pop("images")]
        return images, answer

    async def reconstruct(image: str | None) -> Any:
        """Encode a picture and decode its latents: the file, and the PSNR in dB."""
        answer = await said(known, calls.reconstruct(read(image)))
        return saved(b64decode(answer["base64"])), answer["psnr"]

    async def edit(image: str | None, mask: str | None, class_: str, strength: float, seed: int) -> Any:
        """Redraw a picture towards a class, with a mask only where that is white: the file, and the settings."""
        covered = None if mask is None else read(mask)
        answer = await said(known, calls.edit_json(read(image), covered, class_=class_, strength=strength, seed=seed))
        (one,) = answer.pop("images")
        return saved(b64decode(one["base64"])), answer

    async def walk(class_: str, seed: int, to_class: str, to_seed: int, n: int) -> Any:
        """Walk from a class and seed to another: the files of n pictures, and of an animation."""
        answer = await said(
            known, calls.interpolate({"class": class_, "seed": seed}, {"class": to_class, "seed": to_seed}, n=n)
        )
        pngs = [b64decode(one["base64"]) for one in answer["images"]]
        webp = save_bytes_to_cache(animation(pngs, SHOWN), "walk.webp", moving.GRADIO_CACHE)
        return [saved(png) for png in pngs], str(webp)

    async def inspect(image: str | None) -> Any:
        """The latents of a picture, their effective rank, and the settings that its PNG carries."""
        data = read(image)
        z = await said(known, calls.encode(data))
        return {"latents": z.tolist(), "effective_rank": effective_rank([z]), "settings": settings_of(data)}

    async def classes(query: str) -> Any:
        """The classes that the model can draw, or those that match."""
        return await said(known, calls.classes(query))

    async def model() -> Any:
        """What the server serves."""
        return await said(known, calls.model())

    endpoint(generate, [label_in, seed_in, n_in, steps_in, sampler_in, guidance_in], [pictures, settings])
    endpoint(reconstruct, [image_in], [picture, number])
    endpoint(edit, [image_in, mask_in, label_in, strength_in, seed_in], [picture, settings])
    endpoint(walk, [label_in, seed_in, other_in, other_seed_in, n_in], [pictures, moving])
    endpoint(inspect, [image_in], [settings])
    endpoint(classes, [query_in], [settings])
    endpoint(model, [], [settings])


def read(path: str | None) -> bytes:
    if path is None:
        raise gr.Error("there must be a picture: a PNG, JPEG or WebP", print_exception=False)
    try:
        return read_upload(path)
    except DSDError as error:
        raise gr.Error(str(error), print_exception=False) from None


async def said(known: Known, call: Any) -> Any:
    """Ask the server; its errors become Gradio's, with their sentence."""
    try:
        return await known.client.do(call)
    except DSDError as error:
        raise gr.Error(str(error), print_exception=False) from None
