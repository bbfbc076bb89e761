"""Images in the terminal: only where it says that it can, and in the form of its protocol."""

import base64
import io
import re

import pytest

from dsd_serve.shell import terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color"}, ""),
        ({}, ""),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, ""),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, ""),
    ],
)
def test_the_protocol_is_the_terminals(environment, name):
    assert terminal.protocol(Terminal(), environment) == name
    assert terminal.protocol(io.StringIO(), environment) == ""


def test_the_sequences_hold_the_file():
    png = bytes(range(256)) * 40
    shown = terminal.escape(png, "kitty")
    chunks = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", shown)
    assert base64.b64decode("".join(data for _, data in chunks)) == png
    assert [keys[-3:] for keys, _ in chunks] == ["m=1", "m=1", "m=1", "m=0"] or chunks[-1][0].endswith("m=0")
    assert all(len(data) <= 4096 for _, data in chunks) and chunks[0][0].startswith("a=T,f=100")
    shown = terminal.escape(png, "iterm")
    (found,) = re.findall(r"\033\]1337;File=inline=1;size=10240;[^:]*:([^\a]*)\a", shown)
    assert base64.b64decode(found) == png
