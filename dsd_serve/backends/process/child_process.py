"""A child process, for its parent: starting it, ending it, and the reason for which it ended."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import zmq

from dsd_serve.backends.process.engine_messages import Start
from dsd_serve.backends.process.mailbox import Mailbox
from dsd_serve.errors import EngineUnavailableError
from dsd_serve.rows import Array

LAST_MESSAGES_WITHIN = 0.1  # seconds, from the end of the process or from each other


class ChildProcess:
    """A running child process, and the mailbox to it. Used by one thread, except for `mailbox.put`; the process ends
    with that thread.

    module: its code. start: makes the first line of its standard input, from the endpoint. decoder: of its messages.
    descriptors: that it inherits. stdout: where its standard output goes, None for that of this process. The socket
    lies in a private folder, which is removed as soon as the process is connected. Raises EngineUnavailableError when
    the process cannot be started; without: the end of its sentence.
    """

    def __init__(
        self,
        module: str,
        start: Callable[[str], Start],
        decoder: Any,
        *,
        descriptors: Sequence[int] = (),
        stdout: int | None = 2,
        without: str,
    ) -> None:
        with contextlib.ExitStack() as stack:
            try:
                self.folder = tempfile.mkdtemp(prefix="dsd-child-")  # of mode 0700
                stack.callback(self.has_connected)
                self.mailbox = Mailbox(decoder)
                stack.callback(self.mailbox.close)
                endpoint = f"ipc://{self.folder}/socket"
                self.mailbox.socket.bind(endpoint)
                self.life, own_end = os.pipe()  # readable once the process, which has the other end, has ended
                stack.callback(os.close, self.life)
                # The modules are those of this process. -P: never those of the folder that it happens to be in.
                path = os.pathsep.join(map(os.path.abspath, sys.path))
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", module],
                    stdin=subprocess.PIPE,
                    stdout=stdout,
                    env={**os.environ, "PYTHONPATH": path},
                    pass_fds=[own_end, *descriptors],
                )
                os.close(own_end)
            except (OSError, zmq.ZMQError) as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise EngineUnavailableError(
                        "TMPDIR must name a folder with a shorter path, because a socket is made in it, got "
                        f"{tempfile.gettempdir()}"
                    ) from None
                raise EngineUnavailableError(
                    f"a process cannot be started ({error}): it needs a folder for a socket, which TMPDIR can name; "
                    f"{without}"
                ) from None
            self.at_end = stack.pop_all()
        self.mailbox.watch(self.life)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already, which is noticed next
            self.process.stdin.write(msgspec.json.encode(start(endpoint)) + b"\n")
            self.process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def last_messages(self) -> Iterator[tuple[Any, list[Array]]]:
        """What a process that has ended sent before."""
        self.mailbox.poller.unregister(self.life)
        while received := self.mailbox.exchange(LAST_MESSAGES_WITHIN):
            yield from received

    def has_connected(self) -> None:
        """Remove the folder of the socket, which has no further use."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self, seconds: float = 0.0) -> None:
        """Give it `seconds` to end by itself, then kill it; and release what belongs to it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.process.kill()  # has no effect on one that has ended
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.at_end.close()

    def how_it_ended(self) -> str:
        """A clause, to follow a name of the process."""
        status = self.process.returncode
        if status >= 0:
            return f"ended with exit status {status}"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"was ended by {name}{', perhaps because memory ran out' if name == 'SIGKILL' else ''}"
