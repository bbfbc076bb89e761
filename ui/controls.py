"""The controls that tabs share, and what they say to the server."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ui.inputs import whole as whole  # the tabs take it from here, with the controls
from ui.server_info import Known

Updates = dict[Any, Any]

SEEDS = 10**6  # that are rolled: short enough to remember; any other may be typed
# All that a visitor may ask for (ui/visitors.py) runs at a time: images wait for each other in ui/requests.py.
EVENT: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}


def roll() -> int:
    return secrets.randbelow(SEEDS)


@dataclass(frozen=True)
class Seed:
    """A seed with a dice, and a lock that keeps it from rolling by itself."""

    number: gr.Number
    lock: gr.Checkbox
    dice: gr.Button

    @classmethod
    def build(cls, name: str) -> "Seed":
        with gr.Row(elem_classes="seed", equal_height=True):
            number = gr.Number(0, label="Seed", precision=0, min_width=110, scale=3, elem_id=f"{name}-seed")
            dice = gr.Button("Roll", min_width=64, scale=1, elem_id=f"{name}-dice", elem_classes="quiet")
            lock = gr.Checkbox(False, label="Keep", min_width=84, scale=1, elem_id=f"{name}-lock", container=False)
        dice.click(roll, None, number, queue=False, **EVENT)
        return cls(number, lock, dice)


@dataclass(frozen=True)
class Sampling:
    """How it is sampled; `inputs` in the order that `settings` takes them."""

    steps: gr.Slider
    sampler: gr.Radio
    guidance: gr.Slider
    start: gr.Slider
    stop: gr.Slider

    @classmethod
    def build(cls, name: str, opened: bool = False) -> "Sampling":
        with gr.Accordion("How it is sampled", open=opened, elem_id=f"{name}-sampling"):
            steps = gr.Slider(1, 250, 25, step=1, label="Steps", elem_id=f"{name}-steps")
            sampler = gr.Radio(["euler", "heun", "dpmpp_2m"], value="heun", label="Sampler", elem_id=f"{name}-sampler")
            guidance = gr.Slider(0, 10, 3, step=0.1, label="Guidance", info="1 is off", elem_id=f"{name}-guidance")
            start = gr.Slider(0, 1, 0, step=0.05, label="Guided from", info="0 is noise, 1 is the picture")
            stop = gr.Slider(0, 1, 1, step=0.05, label="Guided until", info="outside, a step costs half")
        return cls(steps, sampler, guidance, start, stop)

    @property
    def inputs(self) -> list[Any]:
        return [self.steps, self.sampler, self.guidance, self.start, self.stop]

    def fitted(self, known: Known) -> Updates:
        """The controls as this server has them: its limits and its recommendation."""
        limits, defaults = known.model["limits"], known.model["defaults"]
        return {
            self.steps: gr.update(maximum=limits["steps"], value=defaults["steps"]),
            self.sampler: gr.update(choices=known.model["samplers"], value=defaults["sampler"]),
            self.guidance: gr.update(value=defaults["guidance"], maximum=max(10, defaults["guidance"])),
        }

    def restored(self, settings: Mapping[str, Any]) -> Updates:
        """The controls as a picture was drawn."""
        names = {"steps": self.steps, "sampler": self.sampler, "guidance": self.guidance}
        names |= {"guidance_start": self.start, "guidance_stop": self.stop}
        return {control: settings[name] for name, control in names.items()}


def sampling_of(steps: float, sampler: str, guidance: float, start: float, stop: float) -> dict[str, Any]:
    """The settings of a request from the values of `Sampling.inputs`. What is usual is left out."""
    found: dict[str, Any] = {"steps": whole("steps", steps, 1), "sampler": sampler, "guidance": guidance}
    if (start, stop) != (0, 1):
        found |= {"guidance_start": start, "guidance_stop": stop}
    return found


def actions(name: str, words: str) -> tuple[gr.Button, gr.Button]:
    """The button that begins, and the one that stops (see ui/stopping.py)."""
    with gr.Row(elem_classes="go"):
        go = gr.Button(words, variant="primary", scale=3, elem_id=f"{name}-go", min_width=140)
        stop = gr.Button("Stop", interactive=False, scale=1, elem_id=f"{name}-stop", min_width=80)
    return go, stop
