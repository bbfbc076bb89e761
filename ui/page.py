"""The page: its tabs, and the links between them."""

from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from dsd_serve.errors import shown
from ui import api, html
from ui.controls import EVENT, Updates
from ui.png_settings import label_of
from ui.private_files import Uploads
from ui.requests import Drawing
from ui.server_info import ServerInfo
from ui.tabs import generate, inside, photo, training, walk
from ui.values import number_of, pressed
from ui.visitors import EventQueue, Page

HEADER = """
<header class="top">
  <div class="name"><span class="mark" aria-hidden="true"></span><h1>DSD</h1>
    <p>One network encodes, denoises and decodes.</p></div>
  <div class="state"><span id="pill" role="status" class="pill">connecting</span>
    <button type="button" id="shade" aria-label="Toggle light and dark">Dark</button></div>
</header>
<div id="down" role="alert" hidden></div>
<div id="refused" role="alert" hidden></div>
"""


def build_page(info: ServerInfo, address: Callable[[gr.Request], str], uploads: Uploads) -> Page:
    """The page for one server, which need not be up yet. address: the URL under which a visitor reaches that server."""
    with Page(uploads, title="DSD", analytics_enabled=False) as page:
        api.build(info)  # first, so that its names are free
        html.shown(HEADER)
        model = gr.Dropdown([""], value="", label="Model", elem_id="model", visible=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                generate_tab = generate.build(info, address)
            with gr.Tab("Your photo", id="photo"):
                photo_tab = photo.build(info)
            with gr.Tab("Walk", id="walk"):
                walk_tab = walk.build(info)
            with gr.Tab("Look inside", id="inside"):
                inside_tab = inside.build(info, generate_tab.drawing)
            with gr.Tab("Training", id="training", visible=False) as last:
                training_tab = training.build(last)
        refresh = gr.Button("Refresh", elem_id="refresh", elem_classes="unseen")
        follow = gr.Button("Follow", elem_id="follow", elem_classes="unseen")
        every_tab = (generate_tab, photo_tab, walk_tab, inside_tab, training_tab)

        def fitted() -> Updates:
            """Everything as it is for the chosen model."""
            names, chosen = info.names, info.client.chosen.current
            menu = gr.update(choices=names, value=chosen or names[0], visible=True) if len(names) > 1 else gr.skip()
            return {model: menu} | {control: value for tab in every_tab for control, value in tab.fitted(info).items()}

        controls = [model, *{control: None for tab in every_tab for control in tab.fitted(info)}]

        async def open_page() -> Updates:
            error = await info.refresh()
            return {generate_tab.picker: html.callout(error)} if error else fitted()

        async def choose_model(name: str) -> Updates:
            if name not in info.names:
                raise gr.Error(
                    f"model must be one of {', '.join(info.names)}, got {shown(name)}", print_exception=False
                )
            info.client.chosen.choose(name)
            return await open_page()

        async def follow_model(chosen: list[int], words: str) -> Updates:
            """After a switch to another model: what is shown of it. The controls stay, unless its classes differ."""
            classes = info.classes
            if await info.refresh():
                return {generate_tab.picker: gr.skip()}
            if info.classes != classes:
                return fitted()
            return {
                generate_tab.picker: await generate.finder(info)(words, chosen),
                inside_tab.model: inside.model_facts(info.model),
                inside_tab.card: info.card,
                **training_tab.fitted(info),
            }

        gr.on([page.load, refresh.click], open_page, None, controls, **EVENT)
        follow.click(follow_model, [generate_tab.chosen, generate_tab.search], controls, **EVENT)
        model.input(choose_model, model, controls, **EVENT)
        connect(info, tabs, generate_tab, photo_tab, walk_tab, inside_tab)
    page._queue = EventQueue(page)
    return page


def connect(
    info: ServerInfo,
    tabs: gr.Tabs,
    generate_tab: generate.GenerateTab,
    photo_tab: photo.PhotoTab,
    walk_tab: walk.WalkTab,
    inside_tab: inside.InsideTab,
) -> None:
    """Connect the tabs: selecting an image on the board, and sending it to another tab."""

    def choose(drawing: Drawing | None, event: gr.EventData) -> tuple[Any, Any]:
        """The details of an image. The page's script marks it on the board, which is not sent again."""
        if drawing is None:
            return html.callout(html.EXPIRED), gr.skip()
        number = number_of(event, range(len(drawing.images)))
        if drawing.running or not drawing.images[number].done:
            return gr.skip(), gr.skip()
        return html.details(drawing.images[number]), number

    generate_tab.board.click(choose, generate_tab.drawing, [generate_tab.details, generate_tab.number], **EVENT)

    def send(drawing: Drawing | None, number: int, event: gr.EventData) -> Updates:
        if drawing is None:
            return {generate_tab.details: html.callout(html.EXPIRED)}
        image, act = drawing.images[number], pressed(event).get("act")
        if image.settings is None:
            return {tabs: gr.skip()}
        settings = image.settings
        if act not in html.ACTIONS:
            raise gr.Error(
                f"a button must be one of {', '.join(html.ACTIONS)}, got {shown(act)}", print_exception=False
            )
        if act == "again":
            return generate.restored(info, generate_tab, settings)
        if act in ("from", "to"):
            end = walk_tab.start if act == "from" else walk_tab.end
            return {
                tabs: gr.update(selected="walk"),
                walk_tab.kinds: gr.update(selected="drawn"),
                walk_tab.kind: "drawn",
                end.label: label_of(settings),
                end.seed: settings["seed"],
                end.index: settings["index"],
                **walk_tab.sampling.restored(settings),
            }
        target = {"edit": (photo_tab.photo, "photo"), "inside": (inside_tab.photo, "inside")}[act]
        path = save_bytes_to_cache(image.png, "image.png", target[0].GRADIO_CACHE)
        return {tabs: gr.update(selected=target[1]), target[0]: path}

    ends = [control for end in (walk_tab.start, walk_tab.end) for control in (end.label, end.seed, end.index)]
    outputs = [
        tabs, walk_tab.kinds, walk_tab.kind, *ends, *walk_tab.sampling.inputs, photo_tab.photo, inside_tab.photo,
        generate_tab.details, *generate.restored_controls(generate_tab),
    ]  # fmt: skip
    generate_tab.details.click(send, [generate_tab.drawing, generate_tab.number], outputs, **EVENT)
