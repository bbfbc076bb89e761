"""Parts of the page that Gradio does not have, as HTML: board, details, strip. All text is escaped.

Buttons have a `data-act`; `pressable` makes a gr.HTML whose `click` event carries its data.
"""

import base64
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

from ui.finished import Finished
from ui.names import file_name
from ui.requests import Drawing, DrawnImage
from ui.words import in_page_words

# Clicks on buttons and their contents. The listener is on the element, so it survives new values.
PRESSES = """
element.addEventListener('click', (event) => {
  const pressed = event.target.closest('[data-act]');
  if (pressed) trigger('click', {
    act: (event.ctrlKey || event.metaKey || event.shiftKey) && pressed.dataset.more || pressed.dataset.act,
    value: Number(pressed.dataset.value || 0), image: pressed.dataset.image || '',
    query: pressed.dataset.query || '',
  });
});
"""

# A board: its cards are a list, so that Gradio sends those that have changed and no others.
BOARD = """${value.above || ''}${(value.cards || []).length
  ? '<div class="board ' + value.size + '" data-link="' + value.link + '">' + value.cards.join('') + '</div>' : ''}"""


def data_uri(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def photo(label: str, **settings: Any) -> gr.Image:
    """An image control whose file goes to the server unchanged: the server checks it against its limits.

    Not a subclass of gr.Image: Gradio writes a .pyi file next to the source of those.
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


def board_element(value: dict[str, Any], **settings: Any) -> gr.HTML:
    """A place for a board, as `board` makes it."""
    return gr.HTML(value, html_template=BOARD, js_on_load=PRESSES, apply_default_css=False, **settings)


def callout(sentence: str) -> str:
    """An error message, which screen readers read aloud."""
    return f'<p class="callout" role="alert">{escape(sentence)}</p>' if sentence else ""


def hint(title: str, sentence: str) -> str:
    return f'<div class="hint"><strong>{escape(title)}</strong><span>{escape(sentence)}</span></div>'


def board(drawing: Drawing | None, chosen: int | None = None, place: str = "board") -> dict[str, Any]:
    """The images of a drawing and its progress; those that are done can be selected. place: the id of its element."""
    if drawing is None:
        return {"above": hint("Nothing drawn yet", "Press Generate to draw."), "cards": [], "size": "", "link": ""}
    images = drawing.images
    named = len({image.title for image in images}) > 1
    cards = [
        card(image, number, number == chosen, named)
        for number, image in enumerate(images)
        if image.done or image.preview or drawing.running  # once it has ended, none is pending
    ]
    return {
        "above": above(drawing, place) + callout(in_page_words(drawing.error)),
        "cards": cards,
        "size": "few" if len(images) <= 8 else "many",
        "link": escape(drawing.link),
    }


def above(drawing: Drawing, place: str) -> str:
    """The status of a drawing, and once it has ended what can be done with all its images. place: of its board."""
    if drawing.running:
        return status(drawing)
    link = f'<button type="button" class="action" data-copy-link="{escape(drawing.link)}">Copy link</button>'
    every = f'<button type="button" class="action" data-all="{place}">Save all</button>'
    several = every if sum(image.done for image in drawing.images) > 1 else ""
    return (
        f'<div class="above">{status(drawing)}<div class="actions">{link if drawing.link else ""}{several}</div></div>'
    )


def status(drawing: Drawing) -> str:
    done = sum(image.done for image in drawing.images)
    if drawing.running:
        return (
            f'<div class="progress" role="progressbar" aria-label="Drawing" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{100 * drawing.progress:.0f}"><span class="bar"><span style="width:'
            f'{100 * drawing.progress:.1f}%"></span></span><span class="words">{done} of {len(drawing.images)}, '
            f"{waits_for(drawing, time.monotonic())}</span></div>"
        )
    if drawing.stopped:
        return f'<p class="line" role="status">Stopped. {done} of {len(drawing.images)} were done.</p>'
    if not drawing.seconds:
        return '<p class="line" role="status">Drawn earlier. Select an image for details.</p>'
    return f'<p class="line" role="status">{done} drawn in {drawing.seconds:.1f} s. Select one for details.</p>'


def waits_for(drawing: Drawing, now: float) -> str:
    """The time that a drawing still takes, or what it waits for."""
    if (left := drawing.seconds_left(now)) is not None:
        return f"{left:.0f} s left" if left >= 1 else "almost done"
    if drawing.first_event:
        return "drawing"
    if drawing.retry_at > now:
        return full_queue(drawing.retry_at - now)
    if drawing.ahead:
        images = f"{drawing.ahead} image{'s' if drawing.ahead > 1 else ''} ahead"
        return f"{images}, about {max(1, drawing.seconds_ahead):.0f} s"
    return "waiting for the server"


def full_queue(seconds: float) -> str:
    return f"the queue of the server is full: trying again in {seconds:.0f} s"


def card(image: DrawnImage, number: int, chosen: bool, named: bool) -> str:
    """An image with its caption. named: the caption begins with the class."""
    name = f"<b>{escape(image.title)}</b> " if named else ""
    if image.finished is None:
        img = (
            f'<img decoding="sync" alt="" src="{data_uri(image.preview)}">'
            if image.preview
            else '<span class="blank"></span>'
        )
        below = image.error or (f"step {image.step} of {image.steps}" if image.step else "waiting")
        part = 100 * image.step / max(image.steps, 1)
        return (
            f'<figure class="card drawing">{img}<span class="part" style="width:{part:.0f}%"></span>'
            f'<figcaption class="caption">{name}{escape(below)}</figcaption></figure>'
        )
    one = image.finished
    label = "" if named else f'aria-label="{escape(f"{image.title}, {image.caption}")}" '
    return (
        f'<button type="button" class="card" data-act="choose" data-value="{number}" {reference(one)} '
        f'aria-pressed="{str(chosen).lower()}" {label}><img decoding="sync" alt="" '
        f'src="{escape(one.url)}"><span class="caption">{name}{escape(image.caption)}</span></button>'
    )


def reference(image: Finished) -> str:
    """Attributes that name a finished image, and what the page's script shows of it."""
    return (
        f'data-image="{image.id}" data-query="{escape(image.query)}" data-title="{escape(image.title)}" '
        f'data-file="{escape(file_name(image.title, image.settings))}"'
    )


ACTIONS = {
    "edit": "Edit",
    "from": "Walk from here",
    "to": "Walk to here",
    "inside": "Look inside",
    "again": "Reuse settings",
}


def details(image: Finished | None) -> str:
    """The selected image, its settings, and a button for each action."""
    return described(image, ACTIONS)


def edited(image: Finished | None) -> str:
    """The same for an edit, without buttons."""
    return described(image, {})


def described(image: Finished | None, actions: Mapping[str, str]) -> str:
    if image is None:
        return ""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(image.settings))
    buttons = "".join(
        f'<button type="button" class="action" data-act="{act}" {reference(image)}>{words}</button>'
        for act, words in actions.items()
    )
    if image.query:
        buttons += f'<button type="button" class="action" data-copy-link="{escape(image.query)}">Copy link</button>'
    name, title, url = escape(file_name(image.title, image.settings)), escape(image.title), escape(image.url)
    return (
        f'<section class="details" aria-label="Selected image" {reference(image)}>'
        f'<button type="button" class="enlarge" aria-label="Enlarge"><img decoding="sync" alt="{title}" src="{url}">'
        f'</button><div><h2>{title}</h2><dl>{rows}</dl><div class="actions">'
        f'<a class="action primary" download="{name}" href="{url}">Save PNG</a>{buttons}</div></div></section>'
    )


def facts(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings of an image as names and values to show."""
    interval = (settings["guidance_start"], settings["guidance_stop"])
    guidance = f"{settings['guidance']:g}" + ("" if interval == (0, 1) else f", {interval[0]:g} to {interval[1]:g}")
    found = [
        ("Seed", f"{settings['seed']}" + (f", index {settings['index']}" if settings["index"] else "")),
        ("Steps", f"{settings['steps']}, {settings['sampler']}"),
        ("Guidance", guidance),
        ("Model", str(settings["model"])),
    ]
    return [*found, ("Strength", f"{settings['strength']:g}")] if "strength" in settings else found


def strip(images: Sequence[Finished], label: str) -> str:
    """Images in a row, each with its title as a caption."""
    columns = len(images) if len(images) <= 9 else -(-len(images) // 2)
    return (
        f'<div class="strip" style="--columns:{columns}" role="group" aria-label="{escape(label)}">'
        + "".join(
            f'<figure {reference(one)}><img decoding="sync" alt="{escape(one.title)}" src="{escape(one.url)}">'
            f"<figcaption>{escape(one.title)}</figcaption></figure>"
            for one in images
        )
        + "</div>"
    )


def training(run: Mapping[str, Any]) -> str:
    """A column for each checkpoint of a run, the newest on the right, and a row for each class and seed."""
    found = run["checkpoints"]
    if not found:
        return hint("No checkpoint yet", "Its images appear here as soon as it is saved and exported.")
    names = [str(one["name"]) for one in run["classes"]] or ["image"]
    rows = "".join(f"<li>{escape(name)}<small>seed {int(seed)}</small></li>" for name in names for seed in run["seeds"])
    columns = "".join(
        f'<figure><img alt="step {int(one["step"])}" src="studio/checkpoint/{int(one["step"])}.png?version='
        f'{escape(one["fingerprint"][:12])}"><figcaption>{int(one["step"]):,}</figcaption></figure>'
        for one in reversed(found)
    )
    newest = f"{len(found)} checkpoints, the newest of step {int(found[-1]['step']):,}"
    return (
        f'<p class="line" role="status">{escape(str(run["run"]))}: {newest}. Every column has the same seeds.</p>'
        f'<div class="training" style="--rows:{len(names) * len(run["seeds"])}"><ol>{rows}</ol>'
        f'<div class="columns" tabindex="0" role="group" aria-label="Checkpoints"><div>{columns}</div></div></div>'
    )


def waiting(words: str) -> str:
    return (
        f'<div class="progress" role="progressbar" aria-label="{escape(words)}"><span class="bar unknown"><span></span>'
        f'</span><span class="words">{escape(words)}</span></div>'
    )


def saves(files: Sequence[tuple[str, str]]) -> str:
    """Links that save files, given as names and addresses, which code needs."""
    links = "".join(
        f'<a class="action" download="{escape(name)}" href="{escape(url)}">Save {escape(name)}</a>'
        for name, url in files
    )
    return f'<div class="actions">{links}</div>' if links else ""


def code(lines: Mapping[str, str]) -> str:
    """Code to copy, by name; the page's script copies it."""
    return "".join(
        f'<div class="code"><header><span>{escape(name)}</span><button type="button" data-copy>Copy</button></header>'
        f"<pre><code>{escape(text)}</code></pre></div>"
        for name, text in lines.items()
    )
