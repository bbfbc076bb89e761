"""The Generate tab: images of classes."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from dsd_serve import calls
from dsd_serve.errors import DSDError, InputError
from dsd_serve.params import SamplingParams, to_api
from ui import html, picker, snippets
from ui.controls import EVENT, Sampling, Seed, Stop, Updates, actions, roll, sampling_of, until
from ui.fair_limit import PER_CLICK
from ui.finished import Finished
from ui.links import Link
from ui.png_settings import label_of, restorable_settings
from ui.private_files import read_upload
from ui.requests import Drawing, DrawRequest, draw
from ui.requests import restored as earlier
from ui.server_info import NO_CLASS, ServerInfo, class_of
from ui.values import whole
from ui.words import in_page_words

PREVIEWS = 12  # of each image
ALL_PREVIEWS = 480  # of a drawing: many images have fewer each


@dataclass(frozen=True)
class GenerateTab:
    drawing: gr.State
    chosen: gr.State  # classes
    wanted: gr.State  # the link from which the page was opened
    search: gr.Textbox
    chips: gr.HTML
    picker: gr.HTML
    wall: gr.HTML
    n: gr.Slider
    index: gr.Number
    seed: Seed
    sampling: Sampling
    message: gr.HTML
    board: gr.HTML
    details: gr.HTML
    code: gr.HTML
    history: gr.HTML  # filled by the page's script
    draw_wanted: Callable[..., Any]  # an event: inputs wanted and drawing, outputs `outputs`
    outputs: list[Any]

    def fitted(self, info: ServerInfo) -> Updates:
        return {
            **self.classes(info, [info.default_class]),
            self.search: gr.update(
                placeholder=f"Search {len(info.classes)} classes, such as {info.search_example}",
                visible=info.has_classes,
            ),
            self.wall: picker.wall(info),
            self.n: gr.update(
                maximum=info.model["limits"]["n"], label="Images per class" if info.has_classes else "Images"
            ),
            **self.sampling.fitted(info),
        }

    def classes(self, info: ServerInfo, chosen: list[int]) -> Updates:
        """All classes, and those that are chosen."""
        return {
            self.chosen: chosen,
            self.chips: gr.update(value=picker.chips(info, chosen), visible=info.has_classes),
            self.picker: gr.update(value=picker.grid(info, info.classes), visible=info.has_classes),
        }

    @property
    def remembered(self) -> dict[str, Any]:
        """The controls whose values the browser keeps, by name."""
        own = {"n": self.n, "index": self.index, "seed": self.seed.number, "keep": self.seed.lock}
        return {**own, **vars(self.sampling)}


def build(info: ServerInfo, address: Callable[[gr.Request], str]) -> GenerateTab:
    drawing, chosen, wanted = gr.State(None), gr.State([NO_CLASS]), gr.State(None)
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=2, min_width=320, elem_classes="controls"):
            search = gr.Textbox(
                label="Search classes", placeholder="Search classes", elem_id="class-search", show_label=False,
                container=False,
            )  # fmt: skip
            chips = html.pressable(elem_id="chosen")
            classes = html.pressable(elem_id="picker")
            n = gr.Slider(1, 16, 4, step=1, label="Images per class", elem_id="n")
            seed = Seed.build("generate")
            go, button = actions("generate", "Generate")
            sampling = Sampling.build("generate")
            with gr.Accordion("Redraw a saved image", open=False, elem_id="again"):
                index = gr.Number(
                    0, label="Index of the first image", elem_id="index",
                    info="A seed gives a sequence of images. A saved PNG restores its seed and index.",
                )  # fmt: skip
                saved = gr.File(label="PNG saved from this page", elem_id="saved", height=170)
        with gr.Column(scale=3, min_width=320):
            message = html.shown("", elem_id="generate-message")
            wall = html.pressable(html.hint("Nothing drawn yet", "Press Generate to draw."), elem_id="wall")
            board = html.board_element({}, elem_id="board")
            details = html.pressable(elem_id="details")
            with gr.Accordion("Reproduce with code", open=False, elem_id="code"):
                code = html.shown(html.hint("No code yet", "It appears with the images."))
            history = html.pressable('<div class="history-place"></div>', elem_id="history")
    stop = Stop(button)
    outputs = [seed.number, *stop.outputs, message, board, drawing, details, code, wanted]

    async def generate(
        request: gr.Request, classes: list[int], number_: float, keep: bool, count: float, first: float, *rest: Any
    ) -> AsyncIterator[Updates]:
        *how, previous = rest
        try:
            settings = {
                "seed": whole("seed", number_) if keep else roll(),
                **({"index": whole("index of the first image", first)} if first else {}),
                **sampling_of(info, *how),
            }
            n_ = whole("images per class", count, 1, info.model["limits"]["n"])
            classes = classes if classes != [NO_CLASS] else [await first_class(info)]
            check_count(n_, len(classes))
        except DSDError as error:
            yield {message: html.callout(in_page_words(error))}
            return
        named = tuple(one for one in classes if one != NO_CLASS)
        link = Link(named, n_, info.client.chosen.current, settings)
        async with contextlib.aclosing(drawn(request, link, previous)) as updates:
            async for update in updates:
                yield update

    async def drawn(request: gr.Request, link: Link, previous: Drawing | None) -> AsyncGenerator[Updates, None]:
        """Draw the images of a link. If nothing is drawn, the previous images stay."""
        requests = requests_of(info, link)
        previous = None if previous is None or previous.empty else previous
        pressed, started = stop.begin()
        now: Updates = {**started, seed.number: link.settings["seed"], message: ""}
        begun = False
        async with contextlib.aclosing(until(pressed, draw(info.client, requests, info.images, link.query))) as updates:
            async for current in updates:
                if not current.running:
                    continue
                if current.empty and previous:
                    yield {**now, message: html.status(current)}
                elif begun:
                    yield {board: html.board(current)}
                else:
                    begun = True
                    yield {**now, message: "", details: "", code: "", drawing: current, board: html.board(current)}
                now = {}
        if current.empty:
            yield {**stop.end(), message: nothing_drawn(current), board: html.board(previous), drawing: previous}
            return
        yield {
            **stop.end(),
            message: "",
            drawing: current,
            board: html.board(current, current.first),
            **chosen_image(info, tab, current.images[current.first].finished, address(request)),
        }

    async def draw_wanted(request: gr.Request, link: Link | None, previous: Drawing | None) -> AsyncIterator[Updates]:
        """The images of the link with which the page was opened: those that are kept, or drawn now."""
        if link is None:
            yield {wanted: None}
            return
        kept = kept_images(info, link)
        if kept:
            current = earlier(link.query, kept)
            shown = chosen_image(info, tab, kept[0], address(request))
            yield {drawing: current, board: html.board(current, 0), message: "", wanted: None, **shown}
            return
        async with contextlib.aclosing(drawn(request, link, previous)) as updates:
            async for update in updates:
                yield {**update, wanted: None}

    tab = GenerateTab(
        drawing, chosen, wanted, search, chips, classes, wall, n, index, seed, sampling, message, board, details,
        code, history, draw_wanted, outputs,
    )  # fmt: skip
    go.click(
        generate,
        [chosen, seed.number, seed.lock, n, index, *sampling.inputs, drawing],
        outputs,
        trigger_mode="once",
        **EVENT,
    )

    def find(text: str) -> str:
        return picker.grid(info, picker.search(info.classes, text))

    def choose_first(text: str, chosen_: list[int]) -> Updates:
        """Switch to the first class that a search finds, and show all classes again."""
        found = picker.search(info.classes, text)
        return {search: "", **tab.classes(info, [found[0]["index"]])} if found and text.strip() else {search: gr.skip()}

    def choose(chosen_: list[int], event: gr.EventData) -> tuple[list[int], str]:
        return picker.choose(info, chosen_, event)

    search.change(find, search, classes, trigger_mode="always_last", **EVENT)
    search.submit(choose_first, [search, chosen], [search, chosen, chips, classes], **EVENT)
    gr.on([classes.click, chips.click, wall.click], choose, chosen, [chosen, chips], trigger_mode="multiple", **EVENT)
    saved.upload(restorer(info, tab), [saved], [*restored_controls(tab), message], **EVENT)
    return tab


def nothing_drawn(drawing: Drawing) -> str:
    """Why a drawing has ended without an image."""
    return html.callout(in_page_words(drawing.error)) or html.hint("Stopped", "Nothing was drawn.")


def requests_of(info: ServerInfo, link: Link) -> list[DrawRequest]:
    """A request for each class of a link."""
    classes = [*link.classes] or [NO_CLASS]
    steps = int(link.settings["steps"])
    previews = min(PREVIEWS, max(2, ALL_PREVIEWS // (link.n * len(classes))))
    every = max(1, -(-steps // previews))
    return [
        DrawRequest(
            info.name_of(one),
            calls.generate_events(class_of(one), n=link.n, preview_every=every, **link.settings),
            link.n,
            steps,
            link.model,
        )
        for one in classes
    ]


def kept_images(info: ServerInfo, link: Link) -> list[Finished]:
    """The images of a link if all of them are kept; otherwise none."""
    settings = {**to_api(SamplingParams()), **link.settings, "fingerprint": info.model["fingerprint"]}
    found = [
        info.images.drawn_with(
            {**settings, "class": {"index": one} if one != NO_CLASS else None, "index": settings["index"] + number}
        )
        for one in ([*link.classes] or [NO_CLASS])
        for number in range(link.n)
    ]
    return [one for one in found if one is not None] if all(found) else []


def chosen_image(info: ServerInfo, tab: GenerateTab, image: Finished | None, url: str) -> Updates:
    """The details of an image and the code that gives its file."""
    if image is None:
        return {tab.details: "", tab.code: ""}
    lines = snippets.drawn(url, image, info.model["image_size"])
    return {tab.details: html.details(image), tab.code: html.code(lines)}


async def first_class(info: ServerInfo) -> int:
    """The class to draw when none is chosen: the model has none, or the page has not finished opening."""
    if not info.model["fingerprint"]:
        await info.refresh()
    return info.default_class


def check_count(n: int, classes: int) -> None:
    """Raises InputError if n images of each of so many classes are too many for one click."""
    if n * classes > PER_CLICK:
        raise InputError(
            f"at most {PER_CLICK} images can be drawn at once, got {n} of each of {classes} classes: "
            "choose fewer classes or images"
        )


def restored_controls(tab: GenerateTab) -> list[Any]:
    classes = [tab.chosen, tab.search, tab.chips, tab.picker]
    return [*classes, tab.n, tab.index, tab.seed.number, tab.seed.lock, *tab.sampling.inputs]


def restored(info: ServerInfo, tab: GenerateTab, settings: dict[str, Any]) -> Updates:
    """The controls with the settings of an image, to draw it again."""
    label = label_of(settings)
    if label not in {one["index"] for one in info.classes} or (label == NO_CLASS) == info.has_classes:
        label = info.default_class  # another model drew it
    return {
        **tab.classes(info, [label]),
        tab.search: "",
        tab.n: 1,
        tab.index: whole("index of the first image", settings["index"]),
        tab.seed.number: whole("seed", settings["seed"]),
        tab.seed.lock: True,
        **tab.sampling.restored(settings),
    }


def restorer(info: ServerInfo, tab: GenerateTab) -> Callable[[str | None], Updates]:
    def restore(path: str | None) -> Updates:
        if path is None:
            return {tab.message: gr.skip()}
        try:
            settings = restorable_settings(read_upload(path))
        except DSDError as error:
            return {tab.message: html.callout(in_page_words(error))}
        found = restored(info, tab, settings)
        label = label_of(settings)
        heading = f"Settings restored: {info.name_of(label)}"
        words = f"seed {settings['seed']}: press Generate to draw it again."
        if settings.get("fingerprint") != info.model["fingerprint"]:
            words = "another model drew this image, so the result will differ."
        if found[tab.chosen] != [label]:
            heading = "Settings partly restored"
            words = f"the image is of class {label}, which this model does not have; the other settings are restored."
        return {**found, tab.message: html.hint(heading, words)}

    return restore
