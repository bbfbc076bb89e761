"""The page: its tabs, and the links between them."""

import json
from collections.abc import Callable
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from dsd_serve.errors import DSDError, shown
from ui import api, html, picker
from ui.controls import EVENT, Updates
from ui.links import Link
from ui.opening import Opening, mark_of, read
from ui.png_settings import label_of
from ui.private_files import Uploads
from ui.server_info import ServerInfo
from ui.tabs import generate, inside, photo, training, walk
from ui.values import image_of, pressed
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
# The page's message to `read`, by ui/memory.js.
OPENS = "() => [window.dsd ? dsd.kept(true) : {search: location.search}]"
KEPT = "() => [window.dsd ? dsd.kept(false) : {}]"


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
                photo_tab = photo.build(info, address)
            with gr.Tab("Walk", id="walk"):
                walk_tab = walk.build(info, address)
            with gr.Tab("Look inside", id="inside"):
                inside_tab = inside.build(info, generate_tab.drawing)
            with gr.Tab("Training", id="training", visible=False) as last:
                training_tab = training.build(last)
        refresh = gr.Button("Refresh", elem_id="refresh", elem_classes="unseen")
        follow = gr.Button("Follow", elem_id="follow", elem_classes="unseen")
        told = html.shown("", elem_id="told", elem_classes="unseen")
        message = gr.JSON(visible=False)  # of the browser, as `read` takes it
        every_tab = (generate_tab, photo_tab, walk_tab, inside_tab, training_tab)
        opening = Opening(info, generate_tab, photo_tab, walk_tab, inside_tab)

        def fitted(opening: str = "") -> Updates:
            """Everything as it is for the chosen model. opening: the number that the browser gave it."""
            names, chosen = info.names, info.client.chosen.current
            menu = gr.update(choices=names, value=chosen or names[0], visible=True) if len(names) > 1 else gr.skip()
            mark = f'<i data-classes="{mark_of(info.classes)}" data-opening="{escape(opening)}"></i>'
            of_tabs = {control: value for tab in every_tab for control, value in tab.fitted(info).items()}
            return {model: menu, told: mark, **of_tabs}

        of_every_tab = {control: None for tab in every_tab for control in tab.fitted(info)}
        controls = [*{model: None, told: None, **of_every_tab, **dict.fromkeys(opening.outputs)}]

        async def open_page(kept: Any) -> Updates:
            """The page as the browser remembers it, or as the address says."""
            found = read(kept)
            if found.link.model and found.link.model != info.client.chosen.current:
                info.client.chosen.choose(found.link.model)
            error = await info.refresh()
            if error:
                return {generate_tab.picker: html.callout(error)}
            if found.link.model and found.link.model not in info.names:
                found = replace(found, link=Link(), error=f"this server has no model {shown(found.link.model)}")
            return opening.updates(found, fitted(found.opening))

        async def choose_model(name: str) -> Updates:
            if name not in info.names:
                raise gr.Error(
                    f"model must be one of {', '.join(info.names)}, got {shown(name)}", print_exception=False
                )
            info.client.chosen.choose(name)
            error = await info.refresh()
            return {generate_tab.picker: html.callout(error)} if error else fitted()

        async def follow_model(kept: Any, chosen: list[int], words: str) -> Updates:
            """After a switch to another model, or of the server: what is shown of it. The controls stay, unless its
            classes differ."""
            found = read(kept)
            if await info.refresh():
                return {generate_tab.picker: gr.skip()}
            if found.classes_of != mark_of(info.classes):
                return opening.updates(found, fitted())
            known = {one["index"] for one in info.classes}
            if not known.issuperset(chosen):  # the visitor's session has expired
                chosen = [one for one in found.classes if one in known] or [info.default_class]
            return {
                **generate_tab.classes(info, chosen),
                generate_tab.picker: picker.grid(info, picker.search(info.classes, words)),
                generate_tab.wall: picker.wall(info),
                inside_tab.model: inside.model_facts(info.model),
                inside_tab.card: info.card,
                **training_tab.fitted(info),
            }

        opened = gr.on([page.load, refresh.click], open_page, message, controls, js=OPENS, **EVENT)
        opened.success(
            generate_tab.draw_wanted, [generate_tab.wanted, generate_tab.drawing], generate_tab.outputs, **EVENT
        )
        opened.success(None, js="() => { window.dsd?.settle(); return []; }", queue=False, **EVENT)
        follow.click(follow_model, [message, generate_tab.chosen, generate_tab.search], controls, js=KEPT, **EVENT)
        model.input(choose_model, model, controls, **EVENT)
        remembered = opening.controls
        gr.on(
            [control.change for control in remembered.values()],
            None, [*remembered.values()], None,
            js=f"(...values) => {{ window.dsd?.remember({json.dumps([*remembered])}, values); return []; }}",
            queue=False, **EVENT,
        )  # fmt: skip
        connect(info, address, tabs, generate_tab, photo_tab, walk_tab, inside_tab)
    page._queue = EventQueue(page)
    return page


def connect(
    info: ServerInfo,
    address: Callable[[gr.Request], str],
    tabs: gr.Tabs,
    generate_tab: generate.GenerateTab,
    photo_tab: photo.PhotoTab,
    walk_tab: walk.WalkTab,
    inside_tab: inside.InsideTab,
) -> None:
    """Connect the tabs: selecting an image on the board, and sending it to another tab."""

    async def choose(request: gr.Request, event: gr.EventData) -> Updates:
        """The details of an image. The page's script marks it on the board, which is not sent again."""
        try:
            image = await info.images.find(*image_of(event))
        except DSDError as error:
            return {generate_tab.message: html.callout(str(error))}
        return {generate_tab.message: "", **generate.chosen_image(info, generate_tab, image, address(request))}

    details = [generate_tab.message, generate_tab.details, generate_tab.code]
    generate_tab.board.click(choose, None, details, **EVENT)
    generate_tab.history.click(choose, None, details, **EVENT)

    async def send(event: gr.EventData) -> Updates:
        act = pressed(event).get("act")
        if not isinstance(act, str) or act not in html.ACTIONS:
            raise gr.Error(
                f"a button must be one of {', '.join(html.ACTIONS)}, got {shown(act)}", print_exception=False
            )
        try:
            image = await info.images.find(*image_of(event))
        except DSDError as error:
            return {generate_tab.message: html.callout(str(error))}
        settings = dict(image.settings)
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
        path = save_bytes_to_cache(info.images.data(image), "image.png", target[0].GRADIO_CACHE)
        inner = {photo_tab.kinds: gr.update(selected="edit")} if act == "edit" else {}
        return {tabs: gr.update(selected=target[1]), target[0]: path, **inner}

    ends = [control for end in (walk_tab.start, walk_tab.end) for control in (end.label, end.seed, end.index)]
    outputs = [
        tabs, walk_tab.kinds, walk_tab.kind, photo_tab.kinds, *ends,
        *walk_tab.sampling.inputs, photo_tab.photo, inside_tab.photo,
        generate_tab.message, *generate.restored_controls(generate_tab),
    ]  # fmt: skip
    generate_tab.details.click(send, None, outputs, **EVENT)
