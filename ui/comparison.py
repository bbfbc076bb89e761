"""A photo and its reconstruction, one above the other, with a line between them that the visitor moves."""

from html import escape

from ui.finished import Finished

HELP = "Drag the line, or move it with the arrow keys."


def comparison(photo: Finished, reconstruction: Finished) -> str:
    """A range input lies above the two images, so that mouse, touch and keyboard move the line."""
    first, second = (f'<img alt="{alt}" src="{escape(one.url)}"' for alt, one in
                     (("Your photo", photo), ("Its reconstruction", reconstruction)))  # fmt: skip
    return (
        f'<figure class="compare"><div class="stage">{first}>{second} class="over"><span class="divider"></span>'
        '<input type="range" min="0" max="100" value="50" data-compare aria-label="Photo and reconstruction: how much '
        'of the photo is shown, in percent"></div><figcaption><span>Your photo</span><button type="button" '
        'class="action" data-fullscreen>Full screen</button><span>Reconstruction</span></figcaption></figure>'
    )
