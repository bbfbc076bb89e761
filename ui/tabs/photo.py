"""The tab for the visitor's own photo: reconstruction, edits, inpainting."""

import asyncio
import contextlib
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.components.image_editor import EditorData

from dsd_serve import calls
from dsd_serve.errors import DSDError, InputError
from dsd_serve.imaging import codec
from ui import html, snippets
from ui.comparison import HELP, comparison
from ui.controls import EVENT, Sampling, Seed, Stop, Updates, actions, roll, sampling_of, until
from ui.fair_limit import Refused
from ui.finished import Finished
from ui.photo_formats import read_photo
from ui.requests import DrawRequest, draw
from ui.server_info import NO_CLASS, NONE, ServerInfo, class_of
from ui.tabs.generate import PREVIEWS, nothing_drawn
from ui.values import image_of, whole
from ui.words import in_page_words

SIDE = 512  # pixels a side of the photo's centre square, as it is shown and painted on
PAINT = (
    '<p class="note">Paint over the part to redraw. Without a graphics card the photo takes some seconds to appear. '
    "Reloading the page erases the mask.</p>"
    '<p class="callout no-webgl-note">Painting needs WebGL, which this browser does not offer: use another browser, or '
    "Edit, which redraws the whole photo.</p>"
)
MAX_PAINTING = 4 * SIDE**2  # pixels of the editor's canvas, on a screen of twice the usual density


@dataclass(frozen=True)
class Redraw:
    """The controls of an edit or an inpainting, and the places of its images."""

    label: gr.Dropdown
    strength: gr.Slider
    n: gr.Slider
    seed: Seed
    sampling: Sampling
    message: gr.HTML
    board: gr.HTML
    details: gr.HTML
    code: gr.HTML

    @property
    def remembered(self) -> dict[str, Any]:
        """The controls whose values the browser keeps, by name."""
        own = {"class": self.label, "strength": self.strength, "n": self.n, "seed": self.seed.number}
        return {**own, "keep": self.seed.lock, **vars(self.sampling)}

    def fitted(self, info: ServerInfo) -> Updates:
        return {
            self.label: gr.update(
                choices=list(dict.fromkeys([(NONE, NO_CLASS), *info.choices])),
                value=info.default_class,
                visible=info.has_classes,
            ),
            self.n: gr.update(maximum=info.model["limits"]["n"]),
            **self.sampling.fitted(info),
        }


@dataclass(frozen=True)
class PhotoTab:
    photo: gr.Image
    kinds: gr.Tabs
    edit: Redraw
    inpaint: Redraw

    def fitted(self, info: ServerInfo) -> Updates:
        return {**self.edit.fitted(info), **self.inpaint.fitted(info)}


def build(info: ServerInfo, address: Callable[[gr.Request], str]) -> PhotoTab:
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=2, min_width=300, elem_classes="controls"):
            photo = html.photo(
                label="Your photo", sources=["upload", "webcam", "clipboard"],
                height=340, elem_id="photo", buttons=[],
            )  # fmt: skip
            html.shown(
                '<p class="line">The centre square is sent to the server and scaled to the size of the model. '
                "The file is deleted after an hour.</p>"
            )
        with gr.Column(scale=3, min_width=320), gr.Tabs(elem_classes="inner") as kinds:
            with gr.Tab("Reconstruct", id="keeps"):
                words = html.shown(html.hint("No photo yet", "Upload, take or paste one."), elem_id="kept")
                both = html.shown("", elem_id="compare")
            with gr.Tab("Edit", id="edit"):
                edit = redraw("edit", "Edit", 0.6, info, address, photo)
            with gr.Tab("Inpaint", id="inpaint"):
                html.shown(PAINT)
                editor = gr.ImageEditor(
                    label="Paint a mask", sources=(), transforms=(), layers=False,
                    brush=gr.Brush(colors=["#ff4d6d"], color_mode="fixed", default_size=48), eraser=gr.Eraser(48),
                    canvas_size=(SIDE, SIDE), fixed_canvas=True, height=SIDE + 60, elem_id="painting", format="png",
                    buttons=[],
                )  # fmt: skip
                editor.preprocess = painting  # type: ignore[method-assign, assignment]  # Gradio's would decode anything
                inpaint = redraw("inpaint", "Inpaint", 1.0, info, address, photo, editor)
    photo.change(reconstructing(info), photo, [words, both, editor], trigger_mode="always_last", **EVENT)
    return PhotoTab(photo, kinds, edit, inpaint)


def reconstructing(info: ServerInfo) -> Callable[..., Any]:
    async def reconstruct(path: str | None) -> AsyncIterator[tuple[Any, Any, Any]]:
        if path is None:
            yield html.hint("No photo yet", "Upload, take or paste one."), "", None
            return
        # Not gr.skip() for the editor: Gradio would make another one, with its own preprocess in place of ours.
        yield html.waiting("Waiting for the server"), gr.skip(), None
        try:
            data = read_photo(path)
            answers = info.client.attempts(calls.reconstruct(data, size=min(SIDE, info.model["limits"]["size"])))
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    if isinstance(answer, Refused):
                        yield html.waiting(f"Waiting: {html.full_queue(answer.pause)}"), gr.skip(), None
                    else:
                        yield await reconstructed(info, data, answer)
        except DSDError as error:
            yield html.callout(in_page_words(error)), "", None

    return reconstruct


async def reconstructed(info: ServerInfo, data: bytes, answer: dict[str, Any]) -> tuple[str, str, Any]:
    """A sentence about the reconstruction of a photo, the comparison of the two, and the photo for the editor."""
    shown = await info.decoder.read(data, SIDE)
    decoded = codec.resize(codec.read_image(b64decode(answer["base64"])), SIDE)
    size, (tokens, channels) = info.model["image_size"], info.model["latent_shape"]
    words = (
        f'<p class="figure"><b data-psnr>{answer["psnr"]:.1f} dB</b> PSNR at {size} x {size} pixels, from '
        f"{tokens * channels} numbers: {tokens} tokens with {channels} channels. PSNR says how close the "
        f"reconstruction is: 20 dB is rough, above 30 dB it is hard to tell apart. {HELP}</p>"
    )
    sides = [
        info.images.keep(await asyncio.to_thread(codec.write_image, pixels), title)
        for pixels, title in ((shown, "photo"), (decoded, "reconstruction"))
    ]
    return words, comparison(*sides), shown.transpose(1, 2, 0)


def redraw(
    name: str,
    words: str,
    strength: float,
    info: ServerInfo,
    address: Callable[[gr.Request], str],
    photo: gr.Image,
    editor: gr.ImageEditor | None = None,
) -> Redraw:
    drawing, made_from = gr.State(None), gr.State(None)
    with gr.Row():
        label = gr.Dropdown(
            [(NONE, NO_CLASS)], value=NO_CLASS, label="Target class", elem_id=f"{name}-class", min_width=180
        )
        amount = gr.Slider(
            0.05, 1, strength, step=0.05, label="Strength",
            info="How much may change, and the share of the steps that run; 1 ignores the photo",
            elem_id=f"{name}-strength", min_width=180,
        )  # fmt: skip
    with gr.Row():
        n = gr.Slider(1, 16, 4, step=1, label="Images", elem_id=f"{name}-n", min_width=180)
        with gr.Column(min_width=180):
            seed = Seed.build(name)
    sampling = Sampling.build(name)
    go, button = actions(name, words)
    stop = Stop(button)
    place = f"{name}-board"
    message = html.shown("", elem_id=f"{name}-message")
    board = html.board_element({}, elem_id=place)
    details = html.pressable("", elem_id=f"{name}-details")
    with gr.Accordion("Reproduce with code", open=False, elem_id=f"{name}-code"):
        code = html.shown(html.hint("No code yet", "It appears with the images."))
    tab = Redraw(label, amount, n, seed, sampling, message, board, details, code)

    async def run(
        request: gr.Request,
        path: str | None,
        mask: bytes | None,
        towards: int,
        part: float,
        count: float,
        number: float,
        keep: bool,
        *rest: Any,
    ) -> AsyncIterator[Updates]:
        *how, previous = rest
        try:
            image = photo_bytes(path)
            if editor is not None:
                image = await square(info, image, mask)
            settings = {"seed": whole("seed", number) if keep else roll(), "strength": part, **sampling_of(info, *how)}
            n_ = whole("images", count, 1, info.model["limits"]["n"])
        except DSDError as error:
            yield {message: html.callout(in_page_words(error))}
            return
        if towards == NO_CLASS:
            settings.pop("guidance", None)  # there is no class to guide to
        steps = max(1, -(-int(settings["steps"] * part * 1000) // 1000))
        title = "Your photo" if towards == NO_CLASS else info.name_of(towards)
        every = max(1, -(-steps // PREVIEWS))
        call = calls.edit_events(image, mask, class_=class_of(towards), n=n_, preview_every=every, **settings)
        pressed, started = stop.begin()
        now: Updates = {**started, seed.number: settings["seed"], message: ""}
        requests = [DrawRequest(title, call, n_, steps, info.client.chosen.current)]
        sources_ = sources(info, str(path), image, mask)
        previous = None if previous is None or previous.empty else previous
        begun = False
        async with contextlib.aclosing(until(pressed, draw(info.client, requests, info.images))) as updates:
            async for current in updates:
                if not current.running:
                    continue
                if current.empty and previous:
                    yield {**now, message: html.status(current)}
                elif begun:
                    yield {board: html.board(current, place=place)}
                else:
                    begun = True
                    cleared = {message: "", details: "", code: "", made_from: sources_}
                    yield {**now, **cleared, drawing: current, board: html.board(current, place=place)}
                now = {}
        if current.empty:
            shown = html.board(previous, place=place) if previous else {}
            yield {**stop.end(), message: nothing_drawn(current), board: shown, drawing: previous}
            return
        chosen = current.images[current.first].finished
        yield {
            **stop.end(),
            message: "",
            drawing: current,
            board: html.board(current, current.first, place),
            details: html.edited(chosen),
            code: code_of(info, address(request), chosen, sources_),
        }

    mask = gr.State(None)
    trigger = go.click
    if editor is not None:
        # A separate event: the editor sends its layers again at each update of an event that reads it.
        trigger = go.click(mask_of, editor, mask, trigger_mode="once", **EVENT).success
    trigger(
        run,
        [photo, mask, label, amount, n, seed.number, seed.lock, *sampling.inputs, drawing],
        [seed.number, *stop.outputs, message, board, drawing, details, code, made_from],
        trigger_mode="once",
        **EVENT,
    )

    async def choose(
        request: gr.Request, sources_: list[tuple[str, str]] | None, event: gr.EventData
    ) -> tuple[str, str, str]:
        try:
            image = await info.images.find(*image_of(event))
        except DSDError as error:
            return html.callout(str(error)), "", ""
        return "", html.edited(image), code_of(info, address(request), image, sources_)

    board.click(choose, made_from, [message, details, code], **EVENT)
    return tab


def sources(info: ServerInfo, path: str, image: bytes, mask: bytes | None) -> list[tuple[str, str]]:
    """The files that an edit is made from, as names and addresses: the photo is the visitor's own and has none, unless
    it was cut to the square that was painted on."""
    if mask is None:
        return [(Path(path).name, "")]
    return [
        ("square.png", info.images.keep(image, "square").url),
        ("mask.png", info.images.keep(mask, "mask").url),
    ]


def code_of(info: ServerInfo, url: str, image: Finished | None, sources_: list[tuple[str, str]] | None) -> str:
    """The code that gives the file of an edit, and links to the files that it needs."""
    if image is None or not sources_:
        return ""
    lines = snippets.edited(url, image, info.model["image_size"], *(name for name, _ in sources_))
    return html.saves([one for one in sources_ if one[1]]) + html.code(lines)


def photo_bytes(path: str | None) -> bytes:
    """The bytes of the photo. Raises InputError if there is none."""
    if path is None:
        raise InputError("there is no photo yet: upload, take or paste one")
    return read_photo(path)


async def square(info: ServerInfo, image: bytes, mask: bytes | None) -> bytes:
    """The centre square of a photo, as the visitor painted on it. Raises InputError without a mask."""
    if mask is None:
        raise InputError("nothing is painted over yet: paint over the part of the photo to redraw")
    shown = await info.decoder.read(image, SIDE)
    return await asyncio.to_thread(codec.write_image, shown)


def painting(payload: EditorData | None) -> bytes | None:
    """The one layer of the editor, as an image file; None if nothing is painted.

    Raises gr.Error for several layers, which the editor of this page cannot make.
    """
    layers = [layer for layer in (payload.layers if payload else []) if layer is not None]
    if len(layers) > 1:
        raise gr.Error(f"the painting must have one layer, got {len(layers)}", print_exception=False)
    return Path(layers[0].path).read_bytes() if layers else None


def mask_of(layer: bytes | None) -> bytes | None:
    """The painted area as a PNG, white on black; None if nothing was painted."""
    if layer is None:
        return None
    try:
        opacity = codec.decode(codec.open_file(layer, MAX_PAINTING), opacity=True)
    except InputError as error:
        raise gr.Error(str(error), print_exception=False) from None
    mask = np.where(opacity > 0, np.uint8(255), np.uint8(0))
    return codec.write_image(mask) if mask.any() else None
