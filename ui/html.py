"""The parts of the page that Gradio does not have, as HTML: board, details, strip, class picker. All text is escaped.

What can be pressed is a button with `data-act`; `pressable` makes a gr.HTML whose `click` event brings its data.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

from ui.display import data_uri
from ui.requests import Drawing, Picture

# Presses of buttons, and of what lies in them. Listens on the element, so it outlives new values.
PRESSES = """
element.addEventListener('click', (event) => {
  const pressed = event.target.closest('[data-act]');
  if (pressed) trigger('click', {act: pressed.dataset.act, value: Number(pressed.dataset.value || 0)});
});
"""

# What was drawn is kept by the process of the page, for each visitor, for a while (ui/visitors.py).
FORGOTTEN = "the page has forgotten these pictures: draw them again, their seeds are below them"


def photo(label: str, **settings: Any) -> gr.Image:
    """An image whose file goes to the server as it is: the server says what is wrong with it, and minds its limits.

    Not a subclass of gr.Image: for those Gradio writes a .pyi file beside the source.
    """
    image = gr.Image(label=label, type="filepath", format="png", **settings)

    def path_of(payload: ImageData | None) -> str | None:
        return None if payload is None else payload.path

    image.preprocess = path_of  # type: ignore[method-assign]
    return image


def pressable(value: str = "", **settings: Any) -> gr.HTML:
    return gr.HTML(value, js_on_load=PRESSES, apply_default_css=False, **settings)


def shown(value: str = "", **settings: Any) -> gr.HTML:
    return gr.HTML(value, js_on_load=None, apply_default_css=False, **settings)


def callout(sentence: str) -> str:
    """A sentence that something went wrong, which screen readers speak."""
    return f'<p class="callout" role="alert">{escape(sentence)}</p>' if sentence else ""


def hint(title: str, sentence: str) -> str:
    return f'<div class="hint"><strong>{escape(title)}</strong><span>{escape(sentence)}</span></div>'


def board(drawing: Drawing | None, chosen: int | None = None) -> str:
    """The pictures of a drawing with how far it is; those that are done can be chosen."""
    if drawing is None:
        return hint("Nothing drawn yet", "Choose one class or several, then press Generate.")
    pictures = drawing.pictures
    if not any(picture.png for picture in pictures) and not drawing.running:
        return callout(drawing.error) + ("" if drawing.error else hint("Stopped", "Nothing was drawn."))
    named = len({picture.title for picture in pictures}) > 1
    cards = "".join(
        card(picture, number, number == chosen, named)
        for number, picture in enumerate(pictures)
        if picture.png or drawing.running  # once it has ended nothing waits any more
    )
    size = "few" if len(pictures) <= 8 else "many"
    return f'{status(drawing)}{callout(drawing.error)}<div class="board {size}">{cards}</div>'


def status(drawing: Drawing) -> str:
    done = sum(picture.done for picture in drawing.pictures)
    if drawing.running:
        left = drawing.seconds_left(time.monotonic())
        words = "Waiting for the server" if left is None else f"{left:.0f} s left" if left >= 1 else "almost there"
        return (
            f'<div class="progress" role="progressbar" aria-label="Drawing" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{100 * drawing.progress:.0f}"><span class="bar"><span style="width:'
            f'{100 * drawing.progress:.1f}%"></span></span><span class="words">{done} of {len(drawing.pictures)}, '
            f"{words}</span></div>"
        )
    if drawing.stopped:
        return f'<p class="line" role="status">Stopped. {done} of {len(drawing.pictures)} were done.</p>'
    seconds = time.monotonic() - drawing.began
    return f'<p class="line" role="status">{done} drawn in {seconds:.1f} s. Choose one to see more.</p>'


def card(picture: Picture, number: int, chosen: bool, named: bool) -> str:
    """A picture with a line below; `named` says of which class, where there are several."""
    name = f"<b>{escape(picture.title)}</b>" if named else ""
    image = (
        f'<img decoding="sync" alt="" src="{data_uri(picture.png)}">' if picture.png else '<span class="blank"></span>'
    )
    if not picture.done:
        below = picture.error or (f"step {picture.step} of {picture.steps}" if picture.step else "waiting")
        part = 100 * picture.step / max(picture.steps, 1)
        return (
            f'<figure class="card drawing">{image}<span class="part" style="width:{part:.0f}%"></span>'
            f'<figcaption class="caption">{name}{escape(below)}</figcaption></figure>'
        )
    label = escape(f"{picture.title}, {picture.caption}")
    return (
        f'<button type="button" class="card" data-act="choose" data-value="{number}" '
        f'aria-pressed="{str(chosen).lower()}" aria-label="{label}">{image}'
        f'<span class="caption">{name}{escape(picture.caption)}</span></button>'
    )


ACTIONS = {
    "edit": "Edit it",
    "from": "Walk from it",
    "to": "Walk to it",
    "inside": "Look inside",
    "again": "Use its settings",
}


def details(picture: Picture | None) -> str:
    """The chosen picture, its settings, and what can be done with it."""
    return described(picture, ACTIONS)


def edited(picture: Picture | None) -> str:
    """The same for an edit, which goes nowhere from here."""
    return described(picture, {})


def described(picture: Picture | None, actions: Mapping[str, str]) -> str:
    if picture is None or picture.settings is None:
        return ""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(picture.settings))
    buttons = "".join(
        f'<button type="button" class="action" data-act="{act}">{words}</button>' for act, words in actions.items()
    )
    name = f"{picture.title}-{picture.settings['seed']}-{picture.settings['index']}.png".lower().replace(" ", "-")
    return (
        f'<section class="details" aria-label="The chosen picture"><img decoding="sync" alt="{escape(picture.title)}" '
        f'src="{data_uri(picture.png)}"><div><h3>{escape(picture.title)}</h3><dl>{rows}</dl><div class="actions">'
        f'<a class="action primary" download="{escape(name)}" href="{data_uri(picture.png)}">Save PNG</a>{buttons}'
        "</div></div></section>"
    )


def facts(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings of a picture in words."""
    interval = (settings["guidance_start"], settings["guidance_stop"])
    guidance = f"{settings['guidance']:g}" + ("" if interval == (0, 1) else f", {interval[0]:g} to {interval[1]:g}")
    found = [
        ("Seed", f"{settings['seed']}" + (f", picture {settings['index']}" if settings["index"] else "")),
        ("Steps", f"{settings['steps']}, {settings['sampler']}"),
        ("Guidance", guidance),
        ("Model", str(settings["model"])),
    ]
    return [*found, ("Strength", f"{settings['strength']:g}")] if "strength" in settings else found


def picker(classes: Sequence[Mapping[str, Any]], chosen: Collection[int], model: Mapping[str, Any]) -> str:
    """Classes with what the model draws for them; those that are chosen stand out."""
    if not classes:
        return hint("No such class", "Try a part of its name, like retriever.")
    version = escape(str(model.get("fingerprint", ""))[:12])
    return (
        '<div class="picker" role="group" aria-label="Classes">'
        + "".join(
            f'<button type="button" class="class" data-act="toggle" data-value="{int(one["index"])}" '
            f'aria-pressed="{str(one["index"] in chosen).lower()}" title="{escape(one["name"])}, {int(one["index"])}">'
            f'<img loading="lazy" alt="" src="studio/class/{int(one["index"])}.png?{version}">'
            f"<span>{escape(one['name'])}</span></button>"
            for one in classes
        )
        + "</div>"
    )


def strip(pictures: Sequence[tuple[bytes, str]], label: str) -> str:
    """Pictures in a row, each with a word below."""
    columns = len(pictures) if len(pictures) <= 9 else -(-len(pictures) // 2)
    return (
        f'<div class="strip" style="--columns:{columns}" role="group" aria-label="{escape(label)}">'
        + "".join(
            f'<figure><img decoding="sync" alt="{escape(words)}" src="{data_uri(png)}"><figcaption>{escape(words)}'
            "</figcaption></figure>"
            for png, words in pictures
        )
        + "</div>"
    )


def waiting(words: str) -> str:
    return (
        f'<div class="progress" role="progressbar" aria-label="{escape(words)}"><span class="bar unknown"><span></span>'
        f'</span><span class="words">{escape(words)}</span></div>'
    )


def code(lines: Mapping[str, str]) -> str:
    """Lines to copy, by name; the page's script copies them."""
    return "".join(
        f'<div class="code"><header><span>{escape(name)}</span><button type="button" data-copy>Copy</button></header>'
        f"<pre><code>{escape(text)}</code></pre></div>"
        for name, text in lines.items()
    )
