"""The Walk tab: images between two classes, seeds or photos."""

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dsd_serve import calls
from dsd_serve.calls import Call
from dsd_serve.errors import DSDError, InputError
from ui import html, snippets
from ui.controls import EVENT, Sampling, Stop, Updates, actions, sampling_of, unless
from ui.display import SHOWN, animation, enlarged
from ui.finished import Finished
from ui.photo_formats import read_photo
from ui.server_info import NO_CLASS, NONE, ServerInfo, class_of
from ui.values import whole
from ui.words import in_page_words

EMPTY = html.hint("No walk yet", "Choose two ends, then press Walk.")
LABEL = "The walk"
OTHER_END = "n02279972"  # the wnid of the monarch: the class at the other end at first, if the model has it


@dataclass(frozen=True)
class End:
    label: gr.Dropdown
    seed: gr.Number
    index: gr.Number
    photo: gr.Image


@dataclass(frozen=True)
class WalkTab:
    start: End
    end: End
    n: gr.Slider
    kinds: gr.Tabs
    drawn: gr.Tab
    kind: gr.State
    sampling: Sampling
    message: gr.HTML
    strip: gr.HTML
    moving: gr.HTML

    @property
    def remembered(self) -> dict[str, Any]:
        """The controls whose values the browser keeps, by name."""
        start = {"from": self.start.label, "from_seed": self.start.seed, "from_index": self.start.index}
        end = {"to": self.end.label, "to_seed": self.end.seed, "to_index": self.end.index}
        return {**start, **end, "n": self.n, **vars(self.sampling)}

    def fitted(self, info: ServerInfo) -> Updates:
        ends = (self.start, info.default_class, "From", 1), (self.end, info.preferred(OTHER_END, -1), "To", 2)
        return {
            **{
                end.label: gr.update(choices=info.choices, value=label, visible=info.has_classes)
                for end, label, *_ in ends
            },
            **{
                end.seed: gr.update(label="Seed") if info.has_classes else gr.update(label=f"{words}: seed", value=seed)
                for end, _, words, seed in ends
            },
            self.drawn: gr.update(label="Classes and seeds" if info.has_classes else "Seeds"),
            self.n: gr.update(maximum=info.model["limits"]["n"]),
            **self.sampling.fitted(info),
        }


def build(info: ServerInfo, address: Callable[[gr.Request], str]) -> WalkTab:
    kind = gr.State("drawn")
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=2, min_width=300, elem_classes="controls"):
            with gr.Tabs(elem_classes="inner", selected="drawn") as kinds:
                with gr.Tab("Classes and seeds", id="drawn") as drawn:
                    drawn_ends = [drawn_end(words, name) for words, name in (("From", "from"), ("To", "to"))]
                with gr.Tab("Photos", id="photos") as photos:
                    photo_ends = [photo_end(words, name) for words, name in (("From", "from"), ("To", "to"))]
            n = gr.Slider(2, 16, 9, step=1, label="Images", elem_id="walk-n")
            go, button = actions("walk", "Walk")
            sampling = Sampling.build("walk")
        with gr.Column(scale=3, min_width=320):
            message = html.shown("", elem_id="walk-message")
            strip = html.shown(EMPTY, elem_id="walk-strip")
            moving = html.shown("", elem_id="walk-animation")
            with gr.Accordion("Reproduce with code", open=False, elem_id="walk-code"):
                code = html.shown(html.hint("No code yet", "It appears with the images."))
    stop = Stop(button)
    drawn.select(lambda: "drawn", None, kind, queue=False, **EVENT)
    photos.select(lambda: "photos", None, kind, queue=False, **EVENT)

    async def walk(
        request: gr.Request, kind_: str, class0: int, seed0: float, index0: float, class1: int, seed1: float,
        index1: float, photo0: str | None, photo1: str | None, count: float, *how: Any,
    ) -> AsyncIterator[Updates]:  # fmt: skip
        url, size = address(request), info.model["image_size"]
        try:
            n_ = whole("images", count, 2, info.model["limits"]["n"])
            if kind_ == "photos":
                call = between_photos(photo0, photo1, n_)
                names = [Path(str(path)).name for path in (photo0, photo1)]
                lines = snippets.walked_photos(url, names, n_, size, info.client.chosen.current)
            else:
                ends_, settings = ends_of((class0, seed0, index0), (class1, seed1, index1)), sampling_of(info, *how)
                call = calls.interpolate(*ends_, n=n_, **settings)
                named = {"model": name} if (name := info.client.chosen.current) else {}
                lines = snippets.walked(url, ends_, {**settings, **named}, n_, size)
            pressed, started = stop.begin()
            yield {**started, message: html.waiting("Walking")}
            answer = await unless(pressed, info.client.do(call))
        except DSDError as error:
            yield {**stop.end(), message: html.callout(in_page_words(error))}
            return
        if answer is None:
            yield {**stop.end(), message: html.hint("Stopped", "Nothing was drawn.")}
            return
        pngs = [await asyncio.to_thread(enlarged, b64decode(one["base64"]), SHOWN) for one in answer["images"]]
        words = [f"{100 * one['fraction']:.0f}%" for one in answer["images"]]
        webp = await asyncio.to_thread(animation, pngs, SHOWN)
        images = [info.images.keep(png, title) for png, title in zip(pngs, words, strict=True)]
        yield {
            message: "",
            strip: html.strip(images, LABEL),
            moving: animated(info.images.keep(webp, "walk", media="image/webp")),
            code: html.code(lines),
            **stop.end(),
        }

    ends = [control for end in drawn_ends for control in end]
    go.click(
        walk, [kind, *ends, *photo_ends, n, *sampling.inputs], [message, strip, moving, code, *stop.outputs],
        trigger_mode="once", **EVENT,
    )  # fmt: skip
    start, end = (End(*drawn_, photo) for drawn_, photo in zip(drawn_ends, photo_ends, strict=True))
    return WalkTab(start, end, n, kinds, drawn, kind, sampling, message, strip, moving)


def drawn_end(words: str, name: str) -> tuple[gr.Dropdown, gr.Number, gr.Number]:
    """Class, seed, and index of the image among those of the seed."""
    label = gr.Dropdown([(NONE, NO_CLASS)], value=NO_CLASS, label=words, elem_id=f"{name}-class")
    with gr.Row(elem_classes="end", equal_height=True):
        seed = gr.Number(1, label="Seed", elem_id=f"{name}-seed", scale=2, min_width=110)
        index = gr.Number(0, label="Index", elem_id=f"{name}-index", min_width=90)
    return label, seed, index


def photo_end(words: str, name: str) -> gr.Image:
    return html.photo(
        label=words, sources=["upload", "webcam", "clipboard"], height=200,
        elem_id=f"{name}-photo", buttons=[],
    )  # fmt: skip


def ends_of(*ends: tuple[int, float, float]) -> list[dict[str, Any]]:
    """The ends of a walk between classes or seeds, as /interpolate takes them. Raises InputError."""
    return [
        {"class": class_of(label), "seed": whole("seed", seed), "index": whole("index", index)}
        for label, seed, index in ends
    ]


def between_photos(start: str | None, end: str | None, n: int) -> Call[dict[str, Any]]:
    if start is None or end is None:
        raise InputError("a walk between photos needs two of them: From and To")
    return calls.interpolate_images(read_photo(start), read_photo(end), n=n)


def animated(image: Finished) -> str:
    return (
        f'<section class="moving" aria-label="Animation of the walk" {html.reference(image)}>'
        f'<img alt="Animation of the walk" src="{image.url}">'
        f'<a class="action primary" download="walk.webp" href="{image.url}">Save animation</a>'
        '<button type="button" class="action" data-pause aria-pressed="false">Pause</button></section>'
    )
