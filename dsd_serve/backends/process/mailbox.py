"""One end of the connection between a process and its child: bundles of messages over a ZeroMQ socket."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import zmq
from msgspec import Struct

from dsd_serve.backends.process.engine_messages import DROPPABLE, from_frames, to_frames
from dsd_serve.rows import Array

MAX_BUNDLE = 256  # messages
MAX_UNSENT = 32_000_000  # bytes and hundredths of messages, above which those that may be lost are dropped
QUEUED = 100  # bundles that ZeroMQ takes while the other end does not read


class Mailbox:
    """Sends and receives messages. `put` may be called from any thread; all the rest by one thread only.

    decoder: of the messages that come. linger: milliseconds for which `close` goes on sending.
    """

    def __init__(self, decoder: Any, linger: int = 0) -> None:
        self.decoder, self.linger = decoder, linger
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.set_hwm(QUEUED)
        self.unsent: deque[tuple[Struct, Sequence[Array]]] = deque()
        self.unsent_size = 0
        self.lock = threading.Lock()
        self.woken = False
        self.full = False  # ZeroMQ takes nothing more for now
        self.closed = False
        self.bell, self.button = os.pipe()
        self.poller = zmq.Poller()
        self.poller.register(self.bell, zmq.POLLIN)

    def put(self, message: Struct, arrays: Sequence[Array] = (), *, wake: bool = True) -> None:
        """Send a message with its arrays soon. wake: at once; otherwise with the next one, or when `exchange` ends."""
        size = 1000 + sum(array.nbytes for array in arrays)
        with self.lock:
            if self.closed or (self.unsent_size + size > MAX_UNSENT and isinstance(message, DROPPABLE)):
                return
            self.unsent.append((message, arrays))
            self.unsent_size += size
        if wake:
            self.ring()

    def ring(self) -> None:
        """Let `exchange` return soon."""
        with self.lock:
            if not self.woken and not self.closed:
                self.woken = True
                os.write(self.button, b"x")

    def watch(self, descriptor: int) -> None:
        """Let `exchange` return as soon as there is something to read from this descriptor."""
        self.poller.register(descriptor, zmq.POLLIN)

    def exchange(self, timeout: float) -> list[tuple[Any, list[Array]]]:
        """Send what was put, and return what has come; waits up to `timeout` seconds for either.

        Raises BrokenMessage for a bundle that cannot be read.
        """
        self.send()
        self.poller.register(self.socket, zmq.POLLIN | (zmq.POLLOUT if self.full else 0))
        self.poller.poll(max(0, round(1000 * timeout)))
        with self.lock:
            if self.woken:
                self.woken = False
                os.read(self.bell, 1)
        self.send()
        received: list[tuple[Any, list[Array]]] = []
        with contextlib.suppress(zmq.Again):
            for _ in range(QUEUED):  # then the caller has a turn
                received += from_frames(
                    [frame.buffer for frame in self.socket.recv_multipart(zmq.NOBLOCK, copy=False)], self.decoder
                )
        return received

    def send(self) -> None:
        """Give ZeroMQ what was put, as far as it takes it."""
        while self.unsent:
            with self.lock:
                count = min(len(self.unsent), MAX_BUNDLE)
                bundle = [self.unsent.popleft() for _ in range(count)]
            try:
                self.socket.send_multipart(to_frames(bundle), zmq.NOBLOCK, copy=True)
            except zmq.Again:
                self.full = True
                with self.lock:
                    self.unsent.extendleft(reversed(bundle))
                return
            with self.lock:
                self.unsent_size -= sum(1000 + sum(array.nbytes for array in arrays) for _, arrays in bundle)
        self.full = False

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.closed = True
        self.socket.close(self.linger)
        self.context.term()
        os.close(self.bell)
        os.close(self.button)
