"""An image in the terminal, by the protocol of kitty or iTerm2, if the terminal supports one."""

import base64
import os
from collections.abc import Mapping
from typing import TextIO

ROWS = 16  # height of the image in lines of text
CHUNK = 4096  # characters of one escape sequence of kitty's protocol
KITTY = ("kitty", "ghostty")
ITERM = ("iTerm.app", "WezTerm")


def protocol(stream: TextIO, environment: Mapping[str, str] = os.environ) -> str:
    """The protocol of the terminal that `stream` is: kitty, iterm, or "" for none.

    None inside tmux and screen, which do not pass images on.
    """
    terminal, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not stream.isatty() or "TMUX" in environment or terminal.startswith(("screen", "tmux")):
        return ""
    if "KITTY_WINDOW_ID" in environment or any(name in terminal for name in KITTY) or program in KITTY:
        return "kitty"
    return "iterm" if program in ITERM or environment.get("LC_TERMINAL") == "iTerm2" else ""


def escape(png: bytes, name: str) -> str:
    """The escape sequences that show a PNG file by a protocol, ROWS lines high."""
    data = base64.b64encode(png).decode()
    if name == "iterm":
        return f"\033]1337;File=inline=1;size={len(png)};height={ROWS};preserveAspectRatio=1:{data}\a\n"
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    parts = []
    for number, chunk in enumerate(chunks):
        keys = f"a=T,f=100,r={ROWS}," if number == 0 else ""
        parts.append(f"\033_G{keys}m={int(number < len(chunks) - 1)};{chunk}\033\\")
    return "".join(parts) + "\n"
