"""Limits on the events, memory and time of each visitor of the page. Gradio itself has none by visitor.

Three parts of Gradio are replaced by narrower ones: its queue of events (`EventQueue`), the state that it keeps for
each visitor (`Sessions`), and the page itself (`Page`), which reads the values that a browser sends.
"""

import asyncio
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from datetime import datetime
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from gradio import route_utils
from gradio.block_function import BlockFunction
from gradio.components import State
from gradio.data_classes import PredictBodyInternal
from gradio.queueing import Event, Queue
from gradio.route_utils import FnIndexInferError
from gradio.server_messages import EventMessage
from gradio.state_holder import SessionState, StateHolder
from starlette.types import ASGIApp, Receive, Scope, Send

from dsd_serve.errors import DSDError, InputError, shown
from ui.chosen_model import VISITOR
from ui.guard import GuardedBlocks
from ui.values import check

log = logging.getLogger("dsd.page")

MAX_BODY = 1_000_000  # bytes of an event; files are uploaded before it
MAX_EVENTS = 16  # of one visitor, that wait, run, or have an unread answer
MAX_EVENTS_OF_ALL = 512
MAX_UNOPENED = 128  # events of visitors that have not opened their message stream; beyond it the oldest is dropped
UNOPENED_S = 30  # for which an event waits for its visitor to open the stream; it does not start before
STALLED_S = 180  # for which messages may stay unread, or one be in flight, before their visitor counts as gone
SWEEP_S = 1
MAX_SESSIONS = 1000
MAX_STATE_MB = 256  # of all sessions: mostly the previews on their boards
CLOSED_S = 900  # lifetime of the session of a visitor who closed the page: the network may have failed for a while
IDLE_S = 3600  # lifetime of the session of an idle visitor
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a visitor (Gradio's session_hash), chosen by the browser


class Mailbox(asyncio.Queue[EventMessage]):
    """The messages to one visitor, and whether anybody reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = False  # a reader has come
        self.readers = 0  # waiting for a message now
        self.last_read = time.monotonic()
        self.read = asyncio.Event()  # set while nothing is unread
        self.read.set()

    async def get(self) -> EventMessage:
        self.opened = True
        self.readers += 1
        try:
            return await super().get()
        finally:
            self.readers -= 1
            self.last_read = time.monotonic()

    def _put(self, item: EventMessage) -> None:
        super()._put(item)
        self.read.clear()

    def _get(self) -> EventMessage:
        item = super()._get()
        if self.empty():
            self.read.set()
        return item

    def abandoned(self, now: float) -> bool:
        """Whether no reader has come in time."""
        return not self.readers and now - self.last_read > (STALLED_S if self.opened else UNOPENED_S)


class EventQueue(Queue):
    """Gradio's queue of events with limits for each visitor and for all.

    An event starts once its visitor has opened the message stream, and ends when that is closed or no longer read.
    """

    def __init__(self, blocks: gr.Blocks) -> None:
        # All may run at once: their images wait for each other in ui/fair_limit.py.
        super().__init__(True, MAX_EVENTS_OF_ALL, 1, None, blocks, default_concurrency_limit=None)
        self.pending_messages_per_session: dict[str, Mailbox] = {}  # type: ignore[assignment]
        self.ANALYTICS_MAX_EVENTS = 0  # none are kept

    def start(self) -> None:
        super().start()
        task = asyncio.get_running_loop().create_task(self.sweep())
        self._asyncio_tasks.add(task)  # keeps a reference; cancelled with the others

    def compute_analytics_summary(self, records: Any) -> dict[str, Any]:
        return {}  # Gradio tabulates the last 10,000 events after each one

    async def push(self, body: PredictBodyInternal, request: Any, username: str | None) -> Any:
        """Accept an event.

        Raises HTTPException 400 for an invalid visitor, 404 for an unknown event, 429 if there are too many.
        """
        visitor = body.session_hash = body.session_hash or uuid.uuid4().hex
        check_name(visitor)
        if body.fn_index not in self.blocks.fns:
            raise HTTPException(404, f"the page has no event {shown(body.fn_index)}: reload it")
        pending = self.pending_event_ids_session.get(visitor, ())
        if len(pending) >= MAX_EVENTS:
            raise HTTPException(
                429, f"{MAX_EVENTS} of your events are unfinished: wait for one of them", {"Retry-After": "2"}
            )
        if len(self) + self.get_active_worker_count() >= MAX_EVENTS_OF_ALL:
            raise HTTPException(429, "too many visitors are using this page now: try again soon", {"Retry-After": "5"})
        box = self.pending_messages_per_session.get(visitor)
        if box is None or not (pending or box.readers):  # any earlier stream was closed after the last answer
            self.pending_messages_per_session[visitor] = Mailbox()
        accepted = await super().push(body, request, username)
        unopened = [event.session_hash for event in self.waiting() if not self.is_open(event.session_hash)]
        if len(unopened) > MAX_UNOPENED:
            await self.drop(unopened[0])
        return accepted

    def waiting(self) -> list[Event]:
        """Events that have not started, oldest first."""
        events = [event for queue in self.event_queue_per_concurrency_id.values() for event in queue.queue]
        return sorted(events, key=lambda event: event.enqueue_time)

    def running(self) -> list[Event]:
        return [event for job in self.active_jobs if job for event in job]

    def is_open(self, visitor: str) -> bool:
        box = self.pending_messages_per_session.get(visitor)
        return box is not None and box.opened

    def get_events(self) -> tuple[list[Event], bool, str] | None:
        """The next event to start: the oldest of a visitor whose stream is open."""
        for event in self.waiting():
            if self.is_open(event.session_hash):
                self.event_queue_per_concurrency_id[event.concurrency_id].queue.remove(event)
                return [event], False, event.concurrency_id
        return None

    def send_message(self, event: Event, event_message: EventMessage) -> None:
        box = self.pending_messages_per_session.get(event.session_hash)
        if box is None:
            event.alive = False
        elif box.opened or box.qsize() < MAX_EVENTS:  # until then there are only repeated estimates of the waiting time
            super().send_message(event, event_message)

    async def all_read(self, visitor: str) -> None:
        """Wait until the visitor has read all messages, so that those to a slow one do not pile up."""
        if (box := self.pending_messages_per_session.get(visitor)) is not None:
            await box.read.wait()

    async def clean_events(self, *, session_hash: str | None = None, event_id: str | None = None) -> None:
        """Cancel the visitor's events, running and waiting. Gradio calls it when a stream ends."""
        running = {event._id for event in self.running() if event.session_hash == session_hash and event.alive}
        for task in list(self._asyncio_tasks):
            if task.get_name().rpartition("<gradio-sep>")[2] in running:
                task.cancel()
        if session_hash in self.pending_messages_per_session:
            self.pending_messages_per_session[session_hash].opened = False
        await super().clean_events(session_hash=session_hash, event_id=event_id)
        self.pending_event_ids_session.pop(session_hash or "", None)

    async def drop(self, visitor: str) -> None:
        await self.clean_events(session_hash=visitor)
        self.pending_messages_per_session.pop(visitor, None)

    async def sweep(self) -> None:
        """Regularly drop visitors who do not read their messages."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for visitor, box in list(self.pending_messages_per_session.items()):
                if box.abandoned(now):
                    await self.drop(visitor)
            # Gradio removes an event as its last step, and may be cancelled before that.
            current = {event._id for event in [*self.waiting(), *self.running()]}
            for event_id in self.event_ids_to_events.keys() - current:
                del self.event_ids_to_events[event_id]


class Session(SessionState):
    """The state of one visitor: the values of gr.State, and controls that differ from the page's initial ones.

    Gradio's own class also keeps the last value of each control, boards with all their images included, for deep links.
    This page has none, so `__init__`, which takes 0.1 s for them, is not called.
    """

    def __init__(self, blocks: gr.Blocks) -> None:
        self.blocks_config = copy(blocks.default_config)
        self.config_values: dict[int, Any] = {}
        self.state_data: dict[int, Any] = {}
        self._state_ttl: dict[int, Any] = {}
        self.is_closed = False

    def __setitem__(self, key: int, value: Any) -> None:
        if isinstance(self.blocks_config.blocks.get(key), State):
            self.state_data[key] = value
        else:
            self.blocks_config.blocks[key] = value

    def _update_config(self, key: int) -> None: ...

    def _update_value_in_config(self, key: int, value: Any) -> None: ...

    @property
    def size(self) -> int:
        """Bytes of the images."""
        return sum(
            len(value) if isinstance(value, bytes) else getattr(value, "size", 0) for value in self.state_data.values()
        )


class Sessions(StateHolder):
    """The sessions of all visitors: at most MAX_SESSIONS with MAX_STATE_MB of images. The least recently used go
    first."""

    session_data: OrderedDict[str, Session]  # type: ignore[assignment]

    def __getitem__(self, session_id: str) -> Session:
        if session_id not in self.session_data:
            check_name(session_id)
            self.session_data[session_id] = Session(self.blocks)
        super().__getitem__(session_id)  # which records the use
        session = self.session_data[session_id]
        session.is_closed = False
        return session

    def update(self, session_id: str) -> None:
        with self.lock:
            self.session_data.move_to_end(session_id)
            if len(self.session_data) > MAX_SESSIONS:
                # Whoever sends many names loses those; nobody else loses images because of them.
                empty = (name for name, other in self.session_data.items() if name != session_id and not other.size)
                self.drop(next(empty, next(iter(self.session_data))))

    def drop(self, session_id: str) -> None:
        del self.session_data[session_id]
        self.time_last_used.pop(session_id, None)

    def delete_all_expired_state(self) -> None:
        """Drop sessions that are too old or too many. Gradio calls it every second."""
        now, size = datetime.now(), sum(session.size for session in self.session_data.values())
        for name, session in list(self.session_data.items()):  # least recently used first
            unused = (now - self.time_last_used[name]).total_seconds() if name in self.time_last_used else 0.0
            if unused > (CLOSED_S if session.is_closed else IDLE_S) or (size > MAX_STATE_MB * 1e6 and session.size):
                size -= session.size
                self.drop(name)


class Page(GuardedBlocks):
    """Blocks for untrusted browsers: invalid input gets a sentence as an answer."""

    _queue: EventQueue

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **settings: Any) -> dict[str, Any]:
        visitor = settings.get("session_hash") or ""
        VISITOR.set(visitor)
        if settings.get("iterator") is not None:
            await self._queue.all_read(visitor)
        return await super().process_api(block_fn, inputs, *args, **settings)

    async def preprocess_data(self, block_fn: BlockFunction, inputs: Sequence[Any], *args: Any, **settings: Any) -> Any:
        """The values of the controls as event functions take them. Raises gr.Error for values that no control sends."""
        try:
            check(block_fn.inputs, inputs)
            return await super().preprocess_data(block_fn, list(inputs), *args, **settings)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except gr.Error as error:
            raise gr.Error(str(error.message)[:300], print_exception=False) from None
        except Exception as error:  # each component has its own checks
            if isinstance(error.__cause__, DSDError):  # one of ours
                raise gr.Error(str(error.__cause__), print_exception=False) from None
            log.warning("unreadable values from a browser: %.300s", error)
            raise gr.Error(
                "the page cannot read these values: reload it and try again", print_exception=False
            ) from None


class EndOfStream:
    """ASGI middleware that ends a message stream which Gradio breaks off by an exception after its last message. That
    message has the reason: the visitor is unknown or was dropped."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except RuntimeError as error:  # from Starlette: the exception has a handler, but the response has started
            if not isinstance(error.__cause__, HTTPException | LookupError):
                raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def check_name(visitor: str) -> None:
    """Raises HTTPException 400 for a visitor's name that no page makes."""
    if not NAME.fullmatch(visitor):
        raise HTTPException(
            400, f"session_hash must be 1 to 64 letters, digits, - or _, got {shown(visitor)}: reload the page"
        )


def install(page: Page, app: FastAPI) -> None:
    """Put the limits into Gradio's application of the page."""
    app.state_holder = Sessions()  # type: ignore[attr-defined]
    app.state_holder.set_blocks(page)  # type: ignore[attr-defined]
    route_utils.SessionState = Session  # type: ignore[attr-defined]  # of a call without a visitor, while it runs
    for kind in (FnIndexInferError, LookupError, TypeError, ValueError):
        app.add_exception_handler(kind, unreadable)
    app.add_middleware(EndOfStream)


async def unreadable(request: Request, error: Exception) -> JSONResponse:
    """The response to a request that Gradio's routes fail to convert: they have no checks of their own."""
    log.warning("%s cannot be read: %s: %.300s", request.url.path, type(error).__name__, error)
    return JSONResponse({"detail": "the page cannot read this request: reload it and try again"}, 400)
