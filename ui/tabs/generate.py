"""The Generate tab: images of classes."""

import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from dsd_serve import calls
from dsd_serve.errors import DSDError, InputError
from ui import html, snippets
from ui.controls import EVENT, Sampling, Seed, Stop, Updates, actions, roll, sampling_of, until
from ui.fair_limit import PER_CLICK
from ui.png_settings import drawn_settings, label_of
from ui.private_files import read_upload
from ui.requests import DrawRequest, draw
from ui.server_info import NO_CLASS, ServerInfo, class_of
from ui.values import number_of, whole

PREVIEWS = 12  # of each image
MAX_SHOWN = 24  # classes in the picker
MAX_CHOSEN = 16  # classes


@dataclass(frozen=True)
class GenerateTab:
    drawing: gr.State
    number: gr.State  # of the selected image
    chosen: gr.State  # classes
    search: gr.Textbox
    picker: gr.HTML
    n: gr.Slider
    index: gr.Number
    seed: Seed
    sampling: Sampling
    board: gr.HTML
    details: gr.HTML
    code: gr.HTML

    def fitted(self, info: ServerInfo) -> Updates:
        chosen = [info.default_class]
        return {
            self.chosen: chosen,
            self.picker: gr.update(value=picked(info, info.classes, chosen), visible=info.has_classes),
            self.search: gr.update(
                placeholder=f"Search by name, such as {info.search_example}", visible=info.has_classes
            ),
            self.n: gr.update(
                maximum=info.model["limits"]["n"], label="Images per class" if info.has_classes else "Images"
            ),
            **self.sampling.fitted(info),
        }


def build(info: ServerInfo, address: Callable[[gr.Request], str]) -> GenerateTab:
    drawing, number, chosen = gr.State(None), gr.State(0), gr.State([NO_CLASS])
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=2, min_width=320, elem_classes="controls"):
            search = gr.Textbox(
                label="Class",
                placeholder="Search by name",
                elem_id="class-search",
                info="Choose one or more. Each shows an image that the model drew.",
            )
            picker = html.pressable(elem_id="picker")
            n = gr.Slider(1, 16, 4, step=1, label="Images per class", elem_id="n")
            seed = Seed.build("generate")
            go, button = actions("generate", "Generate")
            sampling = Sampling.build("generate")
            with gr.Accordion("Redraw a saved image", open=False, elem_id="again"):
                index = gr.Number(
                    0, label="Index of the first image", precision=0, elem_id="index",
                    info="A seed gives a sequence of images. A saved PNG restores its seed and index.",
                )  # fmt: skip
                saved = gr.File(label="PNG saved from this page", elem_id="saved", height=170)
        with gr.Column(scale=3, min_width=320):
            board = html.pressable(html.board(None), elem_id="board")
            details = html.pressable(elem_id="details")
            with gr.Accordion("Code", open=False, elem_id="code"):
                code = html.shown(html.hint("No code yet", "It appears with the images."))
    stop = Stop(button)
    tab = GenerateTab(drawing, number, chosen, search, picker, n, index, seed, sampling, board, details, code)

    async def generate(
        request: gr.Request, classes: list[int], number_: float, keep: bool, count: float, first: float, *how: Any
    ) -> AsyncIterator[Updates]:
        try:
            settings = {
                "seed": whole("seed", number_) if keep else roll(),
                **({"index": whole("index of the first image", first)} if first else {}),
                **({"model": name} if (name := info.client.chosen.current) else {}),
                **sampling_of(info, *how),
            }
            n_, steps = whole("images per class", count, 1), settings["steps"]
            classes = classes if classes != [NO_CLASS] else [await first_class(info)]
            check_count(n_, len(classes))
        except DSDError as error:
            yield {board: html.callout(str(error))}
            return
        requests = [
            DrawRequest(
                info.name_of(one),
                calls.generate_events(class_of(one), n=n_, preview_every=max(1, -(-steps // PREVIEWS)), **settings),
                n_,
                steps,
            )
            for one in classes
        ]
        code_ = html.code(snippets.lines(address(request), classes, settings, n_))
        pressed, started = stop.begin()
        now: Updates = {**started, seed.number: settings["seed"], details: "", code: code_}
        async with contextlib.aclosing(until(pressed, draw(info.client, requests))) as updates:
            async for current in updates:
                if current.running:
                    yield {**now, board: html.board(current), drawing: current, number: 0}
                    now = {}
        yield {
            **stop.end(),
            board: html.board(current, current.first),
            details: html.details(current.images[current.first]),
            number: current.first,
        }

    outputs = [seed.number, *stop.outputs, board, drawing, number, details, code]
    go.click(
        generate,
        [chosen, seed.number, seed.lock, n, index, *sampling.inputs],
        outputs,
        trigger_mode="once",
        **EVENT,
    )
    search.change(finder(info), [search, chosen], picker, trigger_mode="always_last", **EVENT)
    picker.click(chooser(info), [search, chosen], [chosen, picker], trigger_mode="multiple", **EVENT)
    saved.upload(restorer(info, tab), [saved], [*restored_controls(tab), board], **EVENT)
    return tab


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


def finder(info: ServerInfo) -> Callable[..., Any]:
    async def find(words: str, chosen: list[int]) -> str:
        try:
            found = await info.client.do(calls.classes((words or "")[:200]))
        except DSDError as error:
            return html.callout(str(error))
        return picked(info, found, chosen)

    return find


def picked(info: ServerInfo, classes: Sequence[dict[str, Any]], chosen: Collection[int]) -> str:
    """The picker with the first of some classes."""
    return html.picker(classes[:MAX_SHOWN], chosen, info.model, info.search_example, info.client.chosen.current)


def chooser(info: ServerInfo) -> Callable[..., Any]:
    find = finder(info)

    async def choose(words: str, chosen: list[int], event: gr.EventData) -> tuple[list[int], str]:
        """Toggle a class; the last one stays. The list is changed in place and before anything is awaited, because the
        next click may come before this one ends."""
        one = number_of(event, {one["index"] for one in info.classes}.union(chosen))
        if one not in chosen and len(chosen) >= MAX_CHOSEN:
            return chosen, html.callout(
                f"at most {MAX_CHOSEN} classes can be drawn at once: deselect one first"
            ) + await find(words, chosen)
        others = [index for index in chosen if index != one]
        chosen[:] = others if one in chosen and others else [*others, one]
        return chosen, await find(words, chosen)

    return choose


def restored_controls(tab: GenerateTab) -> list[Any]:
    return [tab.chosen, tab.search, tab.picker, tab.n, tab.index, tab.seed.number, tab.seed.lock, *tab.sampling.inputs]


def restored(info: ServerInfo, tab: GenerateTab, settings: dict[str, Any]) -> Updates:
    """The controls with the settings of an image, to draw it again."""
    label = label_of(settings)
    if (label == NO_CLASS) == info.has_classes:  # drawn by a model of the other kind
        label = info.default_class
    return {
        tab.chosen: [label],
        tab.search: "",
        tab.picker: picked(info, info.classes, [label]),
        tab.n: 1,
        tab.index: whole("index of the first image", settings["index"]),
        tab.seed.number: whole("seed", settings["seed"]),
        tab.seed.lock: True,
        **tab.sampling.restored(settings),
    }


def restorer(info: ServerInfo, tab: GenerateTab) -> Callable[[str | None], Updates]:
    def restore(path: str | None) -> Updates:
        if path is None:
            return {tab.board: gr.skip()}
        try:
            settings = drawn_settings(read_upload(path))
        except DSDError as error:
            return {tab.board: html.callout(str(error))}
        if settings is None:
            sentence = "this file has no DSD settings: choose a PNG that was saved from this page or by /generate"
            return {tab.board: html.callout(sentence)}
        found = restored(info, tab, settings)
        words = f"seed {settings['seed']}: press Generate to draw it again."
        if settings.get("fingerprint") != info.model["fingerprint"]:
            words = "another model drew this image, so the result will differ."
        return {**found, tab.board: html.hint(f"Settings restored: {info.name_of(label_of(settings))}", words)}

    return restore
