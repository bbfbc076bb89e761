"""The tab that looks inside: the latents of a picture, the way of a sample, the model, the server at this moment."""

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
from dsd_serve.errors import DSDError
from dsd_serve.imaging import codec
from dsd_serve.rows import Latents
from dsd_serve.samplers import initial_noise
from ui import html
from ui.controls import EVENT, Updates, actions, whole
from ui.display import SHOWN, drawn_settings, effective_rank, enlarged, principal_components
from ui.private_files import read_upload
from ui.requests import Drawing
from ui.server_info import Known
from ui.stopping import Stop, unless, until

EMPTY = html.hint("No picture yet", "Send one here from Generate, or upload one.")
MOST = 16  # pictures whose latents are compared


@dataclass(frozen=True)
class InsideTab:
    photo: gr.Image
    label: gr.Dropdown
    seed: gr.Number
    index: gr.Number
    steps: gr.Slider
    model: gr.HTML
    card: gr.Markdown

    def fitted(self, known: Known) -> Updates:
        return {
            self.label: gr.update(choices=known.choices, value=known.usual),
            self.steps: gr.update(value=known.model["defaults"]["steps"]),
            self.model: model_facts(known.model),
            self.card: known.card,
        }


def build(known: Known, drawn: gr.State) -> InsideTab:
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=2, min_width=300, elem_classes="controls"):
            photo = html.photo(
                label="A picture", sources=["upload", "webcam", "clipboard"],
                height=300, elem_id="inside-photo", buttons=[],
            )  # fmt: skip
        with gr.Column(scale=3, min_width=320):
            gr.Markdown("### What the network writes down of a picture", elem_classes="title")
            latents = html.shown(EMPTY, elem_id="latents")
    gr.Markdown("### From noise to a picture", elem_classes="title")
    with gr.Row(elem_classes="way", equal_height=True):
        label = gr.Dropdown([("golden retriever", 207)], value=207, label="Class", elem_id="way-class", min_width=230)
        seed = gr.Number(1, label="Seed", precision=0, elem_id="way-seed", min_width=110)
        index = gr.Number(0, label="Picture of it", precision=0, elem_id="way-index", min_width=90)
        steps = gr.Slider(2, 50, 25, step=1, label="Steps", elem_id="way-steps", min_width=170)
        with gr.Column(min_width=250):
            go, button = actions("way", "Watch it")
    stop = Stop(button)
    way = html.shown(
        html.hint("Nothing watched yet", "After each step, the network's expectation of the clean picture is shown."),
        elem_id="way",
    )
    with gr.Row(elem_classes="sides"):
        with gr.Column(min_width=320):
            gr.Markdown("### The server now", elem_classes="title")
            html.shown('<div id="now" aria-live="off"></div>')
            model = html.shown("", elem_id="model-facts")
        with gr.Column(min_width=320):
            gr.Markdown("### Model card", elem_classes="title")
            card = gr.Markdown("", elem_id="model-card", elem_classes="card-text")
    photo.change(looking(known), [photo, drawn], [latents, label, seed, index, steps], **EVENT)
    go.click(
        watching(known, way, stop), [label, seed, index, steps], [way, *stop.outputs], trigger_mode="once", **EVENT
    )
    return InsideTab(photo, label, seed, index, steps, model, card)


def looking(known: Known) -> Callable[..., Any]:
    async def look(path: str | None, drawing: Drawing | None) -> tuple[Any, ...]:
        """Latents of a picture; when it was drawn here, its class and seed too."""
        unchanged = (gr.skip(),) * 4
        if path is None:
            return EMPTY, *unchanged
        try:
            data = read_upload(path)
            z = await known.client.do(calls.encode(data))
            kept = await known.client.do(calls.reconstruct(data))
            others = await latents_of(known, drawing)
            shown = await known.decoder.read(data, SHOWN)
        except DSDError as error:
            return html.callout(str(error)), *unchanged
        settings = drawn_settings(data)
        found = (
            (settings["class"]["index"], settings["seed"], settings["index"], min(settings["steps"], 50))
            if settings
            else unchanged
        )
        return latents_shown(shown, z, kept, others), *found

    return look


async def latents_of(known: Known, drawing: Drawing | None) -> list[Latents]:
    """Those of the pictures on the board of Generate."""
    done = [one.png for one in drawing.pictures if one.done][:MOST] if drawing else []
    return list(await asyncio.gather(*(known.client.do(calls.encode(png)) for png in done)))


def latents_shown(shown: Any, z: Latents, kept: dict[str, Any], others: list[Latents]) -> str:
    colours = Image.fromarray(principal_components(z).transpose(1, 2, 0)).resize(
        (SHOWN, SHOWN), Image.Resampling.NEAREST
    )
    pictures = [
        (codec.write_image(shown), "the picture"),
        (codec.write_image(np.asarray(colours).transpose(2, 0, 1)), "its latents"),
        (enlarged(b64decode(kept["base64"]), SHOWN), f"read back, {kept['psnr']:.1f} dB"),
    ]
    tokens, channels = z.shape
    most = min(tokens, channels)
    words = (
        f"<dt>Written down</dt><dd>{tokens} tokens of {channels} numbers; the colours are the three directions in "
        "which these tokens differ most (principal components)</dd>"
        f"<dt>Effective rank</dt><dd><b data-rank>{effective_rank([z]):.1f}</b> of {most} for this picture</dd>"
    )
    if len(others) > 1:
        words += (
            f"<dt></dt><dd><b>{effective_rank(others):.1f}</b> of {channels} for the {len(others)} pictures on "
            "Generate</dd>"
        )
    return f'{html.strip(pictures, "Latents")}<dl class="facts">{words}</dl>'


def watching(known: Known, way: gr.HTML, stop: Stop) -> Callable[..., Any]:
    async def watch(label: int, seed: float, index: float, steps: float) -> AsyncIterator[Updates]:
        """A strip that grows: the noise, the expectation after each step, the picture."""
        frames: list[tuple[bytes, str]] = []
        try:
            seed_, index_, steps_ = whole("seed", seed), whole("picture of it", index), whole("steps", steps, 2)
            pressed, begun = stop.begin()
            yield begun  # it may have to wait for its first row already
            (tokens, channels) = known.model["latent_shape"]
            noise = initial_noise(seed_, index_, (tokens, channels))
            decoded = await unless(pressed, known.client.do(calls.decode(noise)))
            if decoded is not None:
                frames.append((decoded, "noise"))
                yield {way: html.strip(frames, "From noise to a picture")}
            call = calls.generate_events(label, seed=seed_, index=index_, steps=steps_, preview_every=1)
            async with contextlib.aclosing(until(pressed, known.client.stream(call))) as events:
                async for event in events:
                    if event.name == "error":
                        yield {way: html.callout(event.data["detail"])}
                        break
                    if event.name != "done":
                        words = "the picture" if event.name == "image" else str(event.data["step"])
                        frames.append((b64decode(event.data["base64"]), words))
                        yield {way: html.strip(frames, "From noise to a picture")}
        except DSDError as error:
            yield {way: html.callout(str(error))}
        yield stop.end()

    return watch


def model_facts(model: dict[str, Any]) -> str:
    """What is served, in a table."""
    if not model["fingerprint"]:
        return ""
    engine, test, limits = model["engine"], model["self_test"], model["limits"]
    rows = {
        "Model": model["name"],
        "Pictures": f"{model['image_size']} x {model['image_size']} pixels, {len(model['classes'])} classes",
        "Engine": " ".join(str(engine[name]) for name in ("engine", "device", "precision") if name in engine),
        "Rows a tick": model["row_budget"],
        "Self-test": "a row's result never depends on its neighbours"
        if test["batch_invariant"]
        else f"results may depend on neighbours, by at most {test['max_difference']:.1e}",
        "Limits": f"{limits['n']} pictures, {limits['steps']} steps, {limits['size']} pixels a side",
        "Fingerprint": model["fingerprint"][:16],
    }
    words = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items())
    return f'<dl class="facts">{words}</dl>'
