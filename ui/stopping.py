"""The Stop button of a tab.

Work that is stopped shows so itself, in its last update. Gradio can cancel an event from outside, but an update that
was still on its way could then arrive after the answer to Stop, and the tab would look as if it were still at work.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import gradio as gr

from ui.controls import EVENT, Updates

T = TypeVar("T")


class Stop:
    """What a tab's button tells the event that is at work: `begin` and `end` are its first and its last update."""

    def __init__(self, button: gr.Button) -> None:
        self.button = button
        self.pressed = gr.State(None)
        button.click(press, self.pressed, button, queue=False, **EVENT)

    @property
    def outputs(self) -> list[Any]:
        return [self.button, self.pressed]

    def begin(self) -> tuple[asyncio.Event, Updates]:
        """An event that is set when the button is pressed, and the update that lets it be pressed."""
        pressed = asyncio.Event()
        return pressed, {self.pressed: pressed, self.button: gr.update(interactive=True)}

    def end(self) -> Updates:
        return {self.button: gr.update(interactive=False)}


async def press(pressed: asyncio.Event | None) -> Any:
    if pressed is not None:
        pressed.set()
    return gr.update(interactive=False)


async def unless(pressed: asyncio.Event, work: Awaitable[T]) -> T | None:
    """What `work` gives; None when Stop is pressed before, which cancels it. Raises what it raises."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(pressed.wait())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return None if pressed.is_set() else tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(pressed: asyncio.Event, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The items, none of them None, until Stop is pressed. Closes them, however it ends; be sure to close it, too."""

    async def following() -> T | None:
        return await anext(items, None)

    async with contextlib.aclosing(items):
        while (item := await unless(pressed, following())) is not None:
            yield item
