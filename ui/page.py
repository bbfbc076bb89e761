"""The page: its tabs, and what leads from one to another."""

from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from ui import api, html
from ui.controls import EVENT, Updates
from ui.inputs import number_of, pressed, shortened
from ui.private_files import Uploads
from ui.requests import Drawing
from ui.server_info import Known
from ui.tabs import generate, inside, photo, walk
from ui.visitors import Page, Waiting

HEADER = """
<header class="top">
  <div class="name"><span class="mark" aria-hidden="true"></span><h1>DSD</h1>
    <p>One network encodes, denoises and decodes.</p></div>
  <div class="state"><span id="pill" role="status" class="pill">looking for the server</span>
    <button type="button" id="shade" aria-label="Light or dark">Dark</button></div>
</header>
<div id="down" role="alert" hidden></div>
<div id="refused" role="alert" hidden></div>
"""


def build_page(known: Known, address: Callable[[gr.Request], str], uploads: Uploads) -> Page:
    """The page for one server, which need not be up yet. address: under which a visitor reaches that server."""
    with Page(uploads, title="DSD", analytics_enabled=False) as page:
        api.build(known)  # first, so that its names are free
        html.shown(HEADER)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                drawing_tab = generate.build(known, address)
            with gr.Tab("Your photo", id="photo"):
                photo_tab = photo.build(known)
            with gr.Tab("Walk", id="walk"):
                walk_tab = walk.build(known)
            with gr.Tab("Look inside", id="inside"):
                inside_tab = inside.build(known, drawing_tab.drawing)
        refresh = gr.Button("Ask the server again", elem_id="refresh", elem_classes="unseen")
        every_tab = (drawing_tab, photo_tab, walk_tab, inside_tab)
        fitted = list({control: None for tab in every_tab for control in tab.fitted(known)})

        async def open_page() -> Updates:
            wrong = await known.refresh()
            if wrong:
                return {drawing_tab.picker: html.callout(wrong)}
            return {control: value for tab in every_tab for control, value in tab.fitted(known).items()}

        gr.on([page.load, refresh.click], open_page, None, fitted, **EVENT)
        connect(known, tabs, drawing_tab, photo_tab, walk_tab, inside_tab)
    page._queue = Waiting(page)
    return page


def connect(
    known: Known,
    tabs: gr.Tabs,
    drawing_tab: generate.GenerateTab,
    photo_tab: photo.PhotoTab,
    walk_tab: walk.WalkTab,
    inside_tab: inside.InsideTab,
) -> None:
    """Choosing a picture on the board, and sending it to another tab."""

    def choose(drawing: Drawing | None, event: gr.EventData) -> tuple[Any, Any]:
        """The details of an image. The page's script marks it on the board, which is not sent again for that."""
        if drawing is None:
            return html.callout(html.FORGOTTEN), gr.skip()
        number = number_of(event, range(len(drawing.pictures)))
        if drawing.running or not drawing.pictures[number].done:
            return gr.skip(), gr.skip()
        return html.details(drawing.pictures[number]), number

    drawing_tab.board.click(choose, drawing_tab.drawing, [drawing_tab.details, drawing_tab.number], **EVENT)

    def send(drawing: Drawing | None, number: int, event: gr.EventData) -> Updates:
        if drawing is None:
            return {drawing_tab.details: html.callout(html.FORGOTTEN)}
        picture, act = drawing.pictures[number], pressed(event).get("act")
        if picture.settings is None:
            return {tabs: gr.skip()}
        settings = picture.settings
        if act not in html.ACTIONS:
            raise gr.Error(
                f"a button must be one of {', '.join(html.ACTIONS)}, got {shortened(act)}", print_exception=False
            )
        if act == "again":
            return generate.restored(known, drawing_tab, settings)
        if act in ("from", "to"):
            end = walk_tab.start if act == "from" else walk_tab.end
            return {
                tabs: gr.update(selected="walk"),
                walk_tab.kinds: gr.update(selected="drawn"),
                walk_tab.kind: "drawn",
                end.label: settings["class"]["index"],
                end.seed: settings["seed"],
                end.index: settings["index"],
                **walk_tab.sampling.restored(settings),
            }
        target = {"edit": (photo_tab.photo, "photo"), "inside": (inside_tab.photo, "inside")}[act]
        path = save_bytes_to_cache(picture.png, "picture.png", target[0].GRADIO_CACHE)
        return {tabs: gr.update(selected=target[1]), target[0]: path}

    ends = [control for end in (walk_tab.start, walk_tab.end) for control in (end.label, end.seed, end.index)]
    outputs = [
        tabs, walk_tab.kinds, walk_tab.kind, *ends, *walk_tab.sampling.inputs, photo_tab.photo, inside_tab.photo,
        drawing_tab.details, *generate.restored_controls(drawing_tab),
    ]  # fmt: skip
    drawing_tab.details.click(send, [drawing_tab.drawing, drawing_tab.number], outputs, **EVENT)
