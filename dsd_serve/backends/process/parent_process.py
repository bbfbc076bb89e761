"""A parent process, for its child: what the parent sends at the start, and ending the child when the parent ends."""

import ctypes
import faulthandler
import os
import select
import signal
import sys
from typing import TypeVar

import msgspec

from dsd_serve.backends.process.engine_messages import Start

S = TypeVar("S", bound=Start)

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
IGNORED = ("SIGINT", "SIGTERM", "SIGHUP")  # for the whole group, as by Ctrl-C; the parent drains and then ends this


def begin(kind: type[S]) -> S:
    """Begin as a child process: read what the parent says, and leave signals to it."""
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    faulthandler.enable()
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=kind)
    die_with(start.parent)
    return start


def die_with(parent: int) -> None:
    """Let the system kill this process when its parent ends, also while it is stopped or hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def parent_ended() -> bool:
    """True once standard input, which the parent holds open, is at its end."""
    return bool(select.select([sys.stdin], [], [], 0)[0]) and not os.read(sys.stdin.fileno(), 1)
