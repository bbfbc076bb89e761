"""The tab that draws pictures of classes."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from dsd_serve import calls
from dsd_serve.errors import DSDError, InputError
from ui import html, snippets
from ui.controls import EVENT, Sampling, Seed, Updates, actions, roll, sampling_of, whole
from ui.display import drawn_settings
from ui.inputs import number_of
from ui.private_files import read_upload
from ui.requests import AT_ONCE, Wish, draw
from ui.server_info import Known
from ui.stopping import Stop, until

PREVIEWS = 12  # of each picture
FOUND = 24  # classes that are shown at a time
CLASSES = 16  # that may be chosen at a time


@dataclass(frozen=True)
class GenerateTab:
    drawing: gr.State
    number: gr.State  # of the chosen picture
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

    def fitted(self, known: Known) -> Updates:
        chosen = [known.usual]
        return {
            self.chosen: chosen,
            self.picker: html.picker(known.classes[:FOUND], chosen, known.model),
            self.n: gr.update(maximum=known.model["limits"]["n"]),
            **self.sampling.fitted(known),
        }


def build(known: Known, address: Callable[[gr.Request], str]) -> GenerateTab:
    drawing, number, chosen = gr.State(None), gr.State(0), gr.State([207])
    with gr.Row(elem_classes="sides"):
        with gr.Column(scale=2, min_width=320, elem_classes="controls"):
            search = gr.Textbox(
                label="Class",
                placeholder="Search by name, like retriever",
                elem_id="class-search",
                info="One or several; the pictures are what the model draws for each.",
            )
            picker = html.pressable(elem_id="picker")
            n = gr.Slider(1, 16, 4, step=1, label="Pictures of each class", elem_id="n")
            seed = Seed.build("generate")
            go, button = actions("generate", "Generate")
            sampling = Sampling.build("generate")
            with gr.Accordion("Draw a saved picture again", open=False, elem_id="again"):
                index = gr.Number(
                    0, label="First picture of the seed", precision=0, elem_id="index",
                    info="A seed has a row of pictures; that of a PNG is restored with its settings.",
                )  # fmt: skip
                saved = gr.File(label="Drop a PNG that was saved here", elem_id="saved", height=170)
        with gr.Column(scale=3, min_width=320):
            board = html.pressable(html.board(None), elem_id="board")
            details = html.pressable(elem_id="details")
            with gr.Accordion("The same from a program", open=False, elem_id="code"):
                code = html.shown(html.hint("No lines yet", "They appear with the pictures."))
    stop = Stop(button)
    tab = GenerateTab(drawing, number, chosen, search, picker, n, index, seed, sampling, board, details, code)

    async def generate(
        request: gr.Request, classes: list[int], number_: float, keep: bool, count: float, first: float, *how: Any
    ) -> AsyncIterator[Updates]:
        try:
            settings = {
                "seed": whole("seed", number_) if keep else roll(),
                **({"index": whole("first picture", first)} if first else {}),
                **sampling_of(*how),
            }
            n_, steps = whole("pictures", count, 1), settings["steps"]
            check_count(n_, len(classes))
        except DSDError as error:
            yield {board: html.callout(str(error))}
            return
        wishes = [
            Wish(
                known.name_of(one),
                calls.generate_events(one, n=n_, preview_every=max(1, -(-steps // PREVIEWS)), **settings),
                n_,
                steps,
            )
            for one in classes
        ]
        lines = html.code(snippets.lines(address(request), classes, settings, n_))
        pressed, begun = stop.begin()
        now: Updates = {**begun, seed.number: settings["seed"], details: "", code: lines}
        async with contextlib.aclosing(until(pressed, draw(known.server, known.turns, wishes))) as looks:
            async for look in looks:
                if look.running:
                    yield {**now, board: html.board(look), drawing: look, number: 0}
                    now = {}
        yield {
            **stop.end(),
            board: html.board(look, look.first),
            details: html.details(look.pictures[look.first]),
            number: look.first,
        }

    outputs = [seed.number, *stop.outputs, board, drawing, number, details, code]
    go.click(
        generate,
        [chosen, seed.number, seed.lock, n, index, *sampling.inputs],
        outputs,
        trigger_mode="once",
        **EVENT,
    )
    search.change(finding(known), [search, chosen], picker, trigger_mode="always_last", **EVENT)
    picker.click(choosing(known), [search, chosen], [chosen, picker], trigger_mode="multiple", **EVENT)
    saved.upload(restoring(known, tab), [saved], [*restored_controls(tab), board], **EVENT)
    return tab


def check_count(n: int, classes: int) -> None:
    """Raises InputError when n images of each of so many classes are too many for one press."""
    if n * classes > AT_ONCE:
        raise InputError(
            f"at most {AT_ONCE} images can be drawn at once, got {n} of each of {classes} classes: "
            "choose fewer classes or images"
        )


def finding(known: Known) -> Callable[..., Any]:
    async def find(words: str, chosen: list[int]) -> str:
        try:
            found = await known.client.do(calls.classes((words or "")[:200]))
        except DSDError as error:
            return html.callout(str(error))
        return html.picker(found[:FOUND], chosen, known.model)

    return find


def choosing(known: Known) -> Callable[..., Any]:
    find = finding(known)

    async def choose(words: str, chosen: list[int], event: gr.EventData) -> tuple[list[int], str]:
        """Toggle a class; the last one stays. The list is changed in place and before anything is awaited, because
        the next press may come meanwhile and must find it changed."""
        one = number_of(event, {one["index"] for one in known.classes}.union(chosen))
        if one not in chosen and len(chosen) >= CLASSES:
            return chosen, html.callout(
                f"at most {CLASSES} classes can be drawn at once: press one of those chosen to leave it out"
            ) + await find(words, chosen)
        others = [index for index in chosen if index != one]
        chosen[:] = others if one in chosen and others else [*others, one]
        return chosen, await find(words, chosen)

    return choose


def restored_controls(tab: GenerateTab) -> list[Any]:
    return [tab.chosen, tab.search, tab.picker, tab.n, tab.index, tab.seed.number, tab.seed.lock, *tab.sampling.inputs]


def restored(known: Known, tab: GenerateTab, settings: dict[str, Any]) -> Updates:
    """The controls that draw an image again."""
    label = int(settings["class"]["index"])
    return {
        tab.chosen: [label],
        tab.search: "",
        tab.picker: html.picker(known.classes[:FOUND], [label], known.model),
        tab.n: 1,
        tab.index: whole("first picture", settings["index"]),
        tab.seed.number: whole("seed", settings["seed"]),
        tab.seed.lock: True,
        **tab.sampling.restored(settings),
    }


def restoring(known: Known, tab: GenerateTab) -> Callable[[str | None], Updates]:
    def restore(path: str | None) -> Updates:
        if path is None:
            return {tab.board: gr.skip()}
        try:
            settings = drawn_settings(read_upload(path))
        except DSDError as error:
            return {tab.board: html.callout(str(error))}
        if settings is None:
            sentence = "this file has no settings of ours: drop a PNG that was saved here or came from /generate"
            return {tab.board: html.callout(sentence)}
        found = restored(known, tab, settings)
        words = f"seed {settings['seed']}: press Generate to draw it again."
        if settings.get("fingerprint") != known.model["fingerprint"]:
            words = "another model drew it, so this one will draw something else."
        return {**found, tab.board: html.hint(f"Settings of a {known.name_of(settings['class']['index'])}", words)}

    return restore
