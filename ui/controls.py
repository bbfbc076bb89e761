"""The controls that tabs share: seed, sampling settings, and the buttons that start and stop work."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import gradio as gr

from dsd_serve.params import API_NAMES, SAMPLER_NAMES
from ui.server_info import UNKNOWN, ServerInfo
from ui.values import whole

T = TypeVar("T")
Updates = dict[Any, Any]

MAX_ROLL = 10**6  # rolled seeds are below it: short enough to remember; any other may be typed
GUIDANCE_SHOWN = 10  # upper end of the slider
# All events that a visitor may have (ui/visitors.py) run at once: their images wait in ui/fair_limit.py.
EVENT: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}


def roll() -> int:
    return secrets.randbelow(MAX_ROLL)


@dataclass(frozen=True)
class Seed:
    """A seed, a button that rolls one, and a checkbox that keeps it from one image to the next."""

    number: gr.Number
    lock: gr.Checkbox
    dice: gr.Button

    @classmethod
    def build(cls, name: str) -> "Seed":
        with gr.Row(elem_classes="seed", equal_height=True):
            number = gr.Number(0, label="Seed", min_width=110, scale=3, elem_id=f"{name}-seed")
            dice = gr.Button("Roll", min_width=64, scale=1, elem_id=f"{name}-dice", elem_classes="quiet")
            lock = gr.Checkbox(False, label="Keep", min_width=84, scale=1, elem_id=f"{name}-lock", container=False)
        dice.click(roll, None, number, queue=False, **EVENT)
        return cls(number, lock, dice)


@dataclass(frozen=True)
class Sampling:
    """Controls of sampling settings, named as the fields of SamplingParams."""

    num_steps: gr.Slider
    sampler: gr.Radio
    guidance_scale: gr.Slider
    guidance_start: gr.Slider
    guidance_stop: gr.Slider

    @classmethod
    def build(cls, name: str) -> "Sampling":
        first, limits = UNKNOWN["defaults"], UNKNOWN["limits"]
        with gr.Accordion("Sampling", open=False, elem_id=f"{name}-sampling"):
            return cls(
                gr.Slider(1, limits["steps"], first["steps"], step=1, label="Steps", elem_id=f"{name}-steps"),
                gr.Radio(list(SAMPLER_NAMES), value=first["sampler"], label="Sampler", elem_id=f"{name}-sampler"),
                gr.Slider(
                    0, GUIDANCE_SHOWN, first["guidance"], step=0.1, label="Guidance",
                    info="How closely images follow the class: higher is less varied, 1 is off",
                    elem_id=f"{name}-guidance",
                ),
                gr.Slider(0, 1, 0, step=0.05, label="Guidance start", info="0 is noise, 1 is the image"),
                gr.Slider(0, 1, 1, step=0.05, label="Guidance stop", info="Steps without guidance cost half."),
            )  # fmt: skip

    @property
    def inputs(self) -> list[Any]:
        return list(vars(self).values())

    def fitted(self, info: ServerInfo) -> Updates:
        """The controls with this server's limits and recommended settings."""
        limits, defaults = info.model["limits"], info.model["defaults"]
        return {
            self.num_steps: gr.update(maximum=limits["steps"], value=defaults["steps"]),
            self.sampler: gr.update(choices=info.model["samplers"], value=defaults["sampler"]),
            self.guidance_scale: gr.update(
                value=defaults["guidance"], maximum=max(GUIDANCE_SHOWN, defaults["guidance"]), visible=info.has_classes
            ),
            self.guidance_start: gr.update(value=defaults["guidance_start"], visible=info.has_classes),
            self.guidance_stop: gr.update(value=defaults["guidance_stop"], visible=info.has_classes),
        }

    def restored(self, settings: Mapping[str, Any]) -> Updates:
        """The controls with the settings of an image."""
        return {control: settings[API_NAMES[name]] for name, control in vars(self).items()}


def sampling_of(info: ServerInfo, *values: Any) -> dict[str, Any]:
    """The settings of a request, by their API names. values: of `Sampling.inputs`. Raises InputError."""
    given = dict(zip(Sampling.__dataclass_fields__, values, strict=True))
    given["num_steps"] = whole("steps", given["num_steps"], 1)
    interval, defaults = ("guidance_start", "guidance_stop"), info.model["defaults"]
    if all(given[name] == defaults[name] for name in interval):  # keeps the command lines short
        given = {name: value for name, value in given.items() if name not in interval}
    return info.possible({API_NAMES[name]: value for name, value in given.items()})


def actions(name: str, words: str) -> tuple[gr.Button, gr.Button]:
    """The buttons that start and stop (see Stop)."""
    with gr.Row(elem_classes="go"):
        go = gr.Button(words, variant="primary", scale=3, elem_id=f"{name}-go", min_width=140)
        stop = gr.Button("Stop", interactive=False, scale=1, elem_id=f"{name}-stop", min_width=80)
    return go, stop


class Stop:
    """The Stop button of a tab. `begin` and `end` make the first and the last update of the event that it stops.

    Stopped work shows that itself, in its last update. Gradio can cancel an event from outside, but an update still in
    flight could then arrive after the answer to Stop, and the tab would look busy for ever.
    """

    def __init__(self, button: gr.Button) -> None:
        self.button = button
        self.pressed = gr.State(None)
        button.click(press, self.pressed, button, queue=False, **EVENT)

    @property
    def outputs(self) -> list[Any]:
        return [self.button, self.pressed]

    def begin(self) -> tuple[asyncio.Event, Updates]:
        """An event that is set when the button is pressed, and the update that enables the button."""
        pressed = asyncio.Event()
        return pressed, {self.pressed: pressed, self.button: gr.update(interactive=True)}

    def end(self) -> Updates:
        return {self.button: gr.update(interactive=False)}


async def press(pressed: asyncio.Event | None) -> Any:
    if pressed is not None:
        pressed.set()
    return gr.update(interactive=False)


async def unless(pressed: asyncio.Event, work: Awaitable[T]) -> T | None:
    """The result of `work`; None if Stop is pressed first, which cancels it. Raises what it raises."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(pressed.wait())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return None if pressed.is_set() else tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(pressed: asyncio.Event, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The items, none of them None, until Stop is pressed. Closes `items` at its end; close it, too."""

    async def following() -> T | None:
        return await anext(items, None)

    async with contextlib.aclosing(items):
        while (item := await unless(pressed, following())) is not None:
            yield item
