"""The Look inside tab: the latents of an image, the steps of a sample, the model, the current load of the server."""

import asyncio
import contextlib
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from dsd_serve import calls
from dsd_serve.effective_rank import effective_rank
from dsd_serve.errors import DSDError
from dsd_serve.imaging import codec
from dsd_serve.rows import Latents
from dsd_serve.samplers import initial_noise
from ui import html
from ui.controls import EVENT, Stop, Updates, actions, unless, until
from ui.display import SHOWN, enlarged, principal_components
from ui.finished import Finished
from ui.photo_formats import read_photo
from ui.png_settings import drawn_settings, label_of
from ui.requests import Drawing
from ui.server_info import NO_CLASS, NONE, ServerInfo, class_of
from ui.values import whole
from ui.words import in_page_words

EMPTY = html.hint("No image yet", "Send one here from Generate, or upload one.")
LABEL = "From noise to image"
MAX_COMPARED = 16  # images on Generate whose latents are compared
MAX_STEPS = 50


@dataclass(frozen=True)
class InsideTab:
    photo: gr.Image
    label: gr.Dropdown
    seed: gr.Number
    index: gr.Number
    steps: gr.Slider
    model: gr.HTML
    card: gr.Markdown
    way: gr.HTML

    @property
    def remembered(self) -> dict[str, Any]:
        """The controls whose values the browser keeps, by name."""
        return {"class": self.label, "seed": self.seed, "index": self.index, "steps": self.steps}

    def fitted(self, info: ServerInfo) -> Updates:
        return {
            self.label: gr.update(choices=info.choices, value=info.default_class, visible=info.has_classes),
            self.steps: gr.update(value=info.model["defaults"]["steps"]),
            self.model: model_facts(info.model),
            self.card: info.card,
        }


def build(info: ServerInfo, drawn: gr.State) -> InsideTab:
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=2, min_width=300, elem_classes="controls"):
            photo = html.photo(
                label="Image", sources=["upload", "webcam", "clipboard"],
                height=300, elem_id="inside-photo", buttons=[],
            )  # fmt: skip
        with gr.Column(scale=3, min_width=320):
            gr.Markdown("## Latents", elem_classes="title")
            latents = html.shown(EMPTY, elem_id="latents")
    gr.Markdown("## From noise to image", elem_classes="title")
    with gr.Row(elem_classes="way", equal_height=True):
        label = gr.Dropdown([(NONE, NO_CLASS)], value=NO_CLASS, label="Class", elem_id="way-class", min_width=260)
        seed = gr.Number(1, label="Seed", elem_id="way-seed", min_width=110)
        index = gr.Number(0, label="Index", elem_id="way-index", min_width=90)
        steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="Steps", elem_id="way-steps", min_width=170)
        with gr.Column(min_width=250):
            go, button = actions("way", "Show steps")
    stop = Stop(button)
    message = html.shown("", elem_id="way-message")
    way = html.shown(
        html.hint("No steps yet", "Press Show steps to see the model's estimate of the image after each step."),
        elem_id="way",
    )
    with gr.Row(elem_classes="sides"):
        with gr.Column(min_width=320):
            gr.Markdown("## Server", elem_classes="title")
            html.shown('<div id="now" aria-live="off"></div>')
            model = html.shown("", elem_id="model-facts")
        with gr.Column(min_width=320):
            gr.Markdown("## Model card", elem_classes="title")
            card = gr.Markdown("", elem_id="model-card", elem_classes="card-text")
    photo.change(inspecting(info), [photo, drawn], [latents, label, seed, index, steps], **EVENT)
    go.click(
        watching(info, way, message, stop),
        [label, seed, index, steps],
        [message, way, *stop.outputs],
        trigger_mode="once",
        **EVENT,
    )
    return InsideTab(photo, label, seed, index, steps, model, card, way)


def inspecting(info: ServerInfo) -> Callable[..., Any]:
    async def inspect(path: str | None, drawing: Drawing | None) -> tuple[Any, ...]:
        """The latents of an image, and its class and seed if this page drew it."""
        unchanged = (gr.skip(),) * 4
        if path is None:
            return EMPTY, *unchanged
        try:
            data = read_photo(path)
            z = await info.client.do(calls.encode(data))
            decoded = await info.client.do(calls.reconstruct(data))
            others = await latents_of(info, drawing)
            shown = await info.decoder.read(data, SHOWN)
        except DSDError as error:
            return html.callout(in_page_words(error)), *unchanged
        settings = drawn_settings(data)
        found = (
            (label_of(settings), settings["seed"], settings["index"], min(settings["steps"], MAX_STEPS))
            if settings
            else unchanged
        )
        return latents_html(info, shown, z, decoded, others), *found

    return inspect


async def latents_of(info: ServerInfo, drawing: Drawing | None) -> list[Latents]:
    """The latents of the images on the board of Generate."""
    finished = [one.finished for one in drawing.images if one.finished][:MAX_COMPARED] if drawing else []
    done = [info.images.data(one) for one in finished if info.images.get(one.id)]
    return list(await asyncio.gather(*(info.client.do(calls.encode(png)) for png in done)))


def latents_html(info: ServerInfo, shown: Any, z: Latents, decoded: dict[str, Any], others: list[Latents]) -> str:
    colours = Image.fromarray(principal_components(z).transpose(1, 2, 0)).resize(
        (SHOWN, SHOWN), Image.Resampling.NEAREST
    )
    images = [
        (codec.write_image(shown), "image"),
        (codec.write_image(np.asarray(colours).transpose(2, 0, 1)), "latents"),
        (enlarged(b64decode(decoded["base64"]), SHOWN), f"reconstruction, {decoded['psnr']:.1f} dB"),
    ]
    tokens, channels = z.shape
    most = min(tokens, channels)
    words = (
        f"<dt>Latents</dt><dd>{tokens} tokens with {channels} channels; the colours are the first three principal "
        "components</dd>"
        f"<dt>Effective rank</dt><dd><b data-rank>{effective_rank(z):.1f}</b> of {most} for this image: the number of "
        "directions that the latents use; near 1 they would have collapsed</dd>"
    )
    if len(others) > 1:
        rank = effective_rank(np.stack(others))
        words += f"<dt></dt><dd><b>{rank:.1f}</b> of {channels} for the {len(others)} images on Generate</dd>"
    strip = html.strip([info.images.keep(*one) for one in images], "Latents")
    return f'{strip}<dl class="facts">{words}</dl>'


def watching(info: ServerInfo, way: gr.HTML, message: gr.HTML, stop: Stop) -> Callable[..., Any]:
    async def watch(label: int, seed: float, index: float, steps: float) -> AsyncIterator[Updates]:
        """Yield a growing strip: the noise, the estimate after each step, the image."""
        frames: list[Finished] = []
        try:
            seed_, index_, steps_ = whole("seed", seed), whole("index", index), whole("steps", steps, 1)
            pressed, started = stop.begin()
            yield {**started, message: html.waiting("Waiting for the server")}
            (tokens, channels) = info.model["latent_shape"]
            noise = initial_noise(seed_, index_, (tokens, channels))
            decoded = await unless(pressed, info.client.do(calls.decode(noise)))
            if decoded is not None:
                frames.append(info.images.keep(decoded, "noise"))
                yield {message: "", way: html.strip(frames, LABEL)}
            call = calls.generate_events(class_of(label), seed=seed_, index=index_, steps=steps_, preview_every=1)
            async with contextlib.aclosing(until(pressed, info.client.stream(call))) as events:
                async for event in events:
                    if event.name == "error":
                        yield {**stop.end(), message: html.callout(in_page_words(event.data["detail"]))}
                        return
                    if event.name != "done":
                        words = "image" if event.name == "image" else str(event.data["step"])
                        frames.append(info.images.keep(b64decode(event.data["base64"]), words))
                        yield {way: html.strip(frames, LABEL)}
        except DSDError as error:
            yield {**stop.end(), message: html.callout(in_page_words(error))}
            return
        yield {**stop.end(), **({message: ""} if frames else {message: html.hint("Stopped", "Nothing was drawn.")})}

    return watch


def model_facts(model: dict[str, Any]) -> str:
    """A table of facts about the served model."""
    if not model["fingerprint"]:
        return ""
    engine, test, limits = model["engine"], model["self_test"], model["limits"]
    tried = ", ".join(map(str, test.get("row_counts", ()))) or test["rows"]
    rows = {
        "Model": model["name"],
        "Images": f"{model['image_size']} x {model['image_size']} pixels, {len(model['classes']) or 'no'} classes",
        "Engine": " ".join(str(engine[name]) for name in ("engine", "device", "precision") if name in engine),
        "Rows per tick": model["row_budget"],
        "Self-test": f"a seed gives the same bytes whatever else is drawn (tried in batches of {tried})"
        if test["batch_invariant"]
        else "a seed gives the same image, but not the same bytes: the latents depend on what else is drawn "
        f"by at most {test['max_difference']:.1e}",
        "Limits": f"{limits['n']} images, {limits['steps']} steps, {limits['size']} pixels a side",
        "Fingerprint": model["fingerprint"][:16],
    }
    words = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items())
    return f'<dl class="facts">{words}</dl>'
