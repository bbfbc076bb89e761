"""What the visitors of the page may take: events, memory and time. Gradio bounds none of them by visitor.

Three parts of Gradio are replaced by narrower ones: its queue of events (`Waiting`), what it keeps for each visitor
(`Kept`), and the page itself (`Page`), which reads the values that a browser sends.
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

from dsd_serve.errors import DSDError, InputError
from ui.guard import GuardedBlocks
from ui.inputs import check, shortened
from ui.requests import VISITOR

log = logging.getLogger("dsd.page")

BODY = 1_000_000  # bytes of an event; files are uploaded before it
EVENTS = 16  # of one visitor that wait, run, or have an answer that is not read yet
EVENTS_OF_ALL = 512
UNHEARD = 128  # events of visitors that have not opened their stream of messages; beyond it the oldest goes
UNHEARD_S = 30  # how long an event waits for its visitor to open the stream; it does not begin before
STALLED_S = 180  # how long messages may lie unread, or one be on its way, before their visitor counts as gone
SWEEP_S = 1
VISITORS = 1000  # of whom something is kept
KEPT_MB = 256  # what is kept for all visitors: mostly the images on their boards
LEFT_S = 900  # how long something is kept for a visitor who closed the page: a network may have failed for a while
UNUSED_S = 3600  # the same for one who does nothing
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a visitor (Gradio's session_hash), which the browser makes up


class Mailbox(asyncio.Queue[EventMessage]):
    """The messages to one visitor, and whether anybody reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = False  # somebody has read here
        self.readers = 0  # that wait for a message now
        self.seen = time.monotonic()  # when there was a reader last
        self.read = asyncio.Event()  # set while nothing is unread
        self.read.set()

    async def get(self) -> EventMessage:
        self.heard = True
        self.readers += 1
        try:
            return await super().get()
        finally:
            self.readers -= 1
            self.seen = time.monotonic()

    def _put(self, item: EventMessage) -> None:
        super()._put(item)
        self.read.clear()

    def _get(self) -> EventMessage:
        item = super()._get()
        if self.empty():
            self.read.set()
        return item

    def forsaken(self, now: float) -> bool:
        return not self.readers and now - self.seen > (STALLED_S if self.heard else UNHEARD_S)


class Waiting(Queue):
    """Gradio's queue of events, with bounds by visitor and for all, and for visitors who listen only.

    An event begins when its visitor has opened the stream of messages, and ends when that is closed or no longer read.
    """

    def __init__(self, blocks: gr.Blocks) -> None:
        # As many may run as there may be: drawings wait for each other in ui/requests.py.
        super().__init__(True, EVENTS_OF_ALL, 1, None, blocks, default_concurrency_limit=None)
        self.pending_messages_per_session: dict[str, Mailbox] = {}  # type: ignore[assignment]
        self.ANALYTICS_MAX_EVENTS = 0  # nobody reads them

    def start(self) -> None:
        super().start()
        task = asyncio.get_running_loop().create_task(self.sweep())
        self._asyncio_tasks.add(task)  # held, and cancelled with the others

    def compute_analytics_summary(self, records: Any) -> dict[str, Any]:
        return {}  # Gradio's would make a table of the last 10,000 events after each

    async def push(self, body: PredictBodyInternal, request: Any, username: str | None) -> Any:
        """Take an event. Raises HTTPException 400 for a wrong visitor or event, 429 when there are too many."""
        visitor = body.session_hash = body.session_hash or uuid.uuid4().hex
        checked(visitor)
        if body.fn_index not in self.blocks.fns:
            raise HTTPException(404, f"the page has no event {shortened(body.fn_index)}: reload it")
        pending = self.pending_event_ids_session.get(visitor, ())
        if len(pending) >= EVENTS:
            raise HTTPException(
                429, f"{EVENTS} things that you asked for are not done yet: wait for one of them", {"Retry-After": "2"}
            )
        if len(self) + self.get_active_worker_count() >= EVENTS_OF_ALL:
            raise HTTPException(429, "too many visitors use this page now: try again soon", {"Retry-After": "5"})
        box = self.pending_messages_per_session.get(visitor)
        if box is None or not (pending or box.readers):  # what stream there was has been closed after the last answer
            self.pending_messages_per_session[visitor] = Mailbox()
        taken = await super().push(body, request, username)
        unheard = [event.session_hash for event in self.waiting() if not self.listens(event.session_hash)]
        if len(unheard) > UNHEARD:
            await self.dismiss(unheard[0])
        return taken

    def waiting(self) -> list[Event]:
        """Events that have not begun, the oldest first."""
        events = [event for queue in self.event_queue_per_concurrency_id.values() for event in queue.queue]
        return sorted(events, key=lambda event: event.enqueue_time)

    def running(self) -> list[Event]:
        return [event for job in self.active_jobs if job for event in job]

    def listens(self, visitor: str) -> bool:
        box = self.pending_messages_per_session.get(visitor)
        return box is not None and box.heard

    def get_events(self) -> tuple[list[Event], bool, str] | None:
        """The next event to begin: the oldest whose visitor listens."""
        for event in self.waiting():
            if self.listens(event.session_hash):
                self.event_queue_per_concurrency_id[event.concurrency_id].queue.remove(event)
                return [event], False, event.concurrency_id
        return None

    def send_message(self, event: Event, event_message: EventMessage) -> None:
        box = self.pending_messages_per_session.get(event.session_hash)
        if box is None:
            event.alive = False
        elif box.heard or box.qsize() < EVENTS:  # before that there are only estimates of the time, again and again
            super().send_message(event, event_message)

    async def all_read(self, visitor: str) -> None:
        """Return when the visitor has taken all messages, so that those to a slow one do not pile up."""
        if (box := self.pending_messages_per_session.get(visitor)) is not None:
            await box.read.wait()

    async def clean_events(self, *, session_hash: str | None = None, event_id: str | None = None) -> None:
        """End what the visitor asked for, at once, also what waits for its turn. Gradio calls it when a stream ends."""
        running = {event._id for event in self.running() if event.session_hash == session_hash and event.alive}
        for task in list(self._asyncio_tasks):
            if task.get_name().rpartition("<gradio-sep>")[2] in running:
                task.cancel()
        if session_hash in self.pending_messages_per_session:
            self.pending_messages_per_session[session_hash].heard = False
        await super().clean_events(session_hash=session_hash, event_id=event_id)
        self.pending_event_ids_session.pop(session_hash or "", None)

    async def dismiss(self, visitor: str) -> None:
        await self.clean_events(session_hash=visitor)
        self.pending_messages_per_session.pop(visitor, None)

    async def sweep(self) -> None:
        """Dismiss, again and again, the visitors who do not read what they asked for."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = time.monotonic()
            for visitor, box in list(self.pending_messages_per_session.items()):
                if box.forsaken(now):
                    await self.dismiss(visitor)
            # Gradio forgets an event as the last thing that it does for it, and may be cancelled before that.
            there = {event._id for event in [*self.waiting(), *self.running()]}
            for event_id in self.event_ids_to_events.keys() - there:
                del self.event_ids_to_events[event_id]


class Visit(SessionState):
    """What is kept for one visitor: the values of gr.State, and controls that differ from the page's first ones.

    Gradio's own keeps the last value of each control, too, boards with all their images among them, for links to the
    page as it is now (deep links). There are none here, so its `__init__`, which takes 0.1 s for that, is left out.
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


class Kept(StateHolder):
    """What is kept for all visitors: at most VISITORS visits and KEPT_MB of images. The longest unused goes first."""

    session_data: OrderedDict[str, Visit]  # type: ignore[assignment]

    def __getitem__(self, session_id: str) -> Visit:
        if session_id not in self.session_data:
            checked(session_id)
            self.session_data[session_id] = Visit(self.blocks)
        super().__getitem__(session_id)  # which notes that it is used
        visit = self.session_data[session_id]
        visit.is_closed = False
        return visit

    def update(self, session_id: str) -> None:
        with self.lock:
            self.session_data.move_to_end(session_id)
            if len(self.session_data) > VISITORS:
                # Whoever sends many names loses those, and nobody loses images for them.
                empty = (name for name, visit in self.session_data.items() if name != session_id and not visit.size)
                self.drop(next(empty, next(iter(self.session_data))))

    def drop(self, session_id: str) -> None:
        del self.session_data[session_id]
        self.time_last_used.pop(session_id, None)

    def delete_all_expired_state(self) -> None:
        """Drop what is too old or too much. Gradio calls it every second."""
        now, size = datetime.now(), sum(visit.size for visit in self.session_data.values())
        for name, visit in list(self.session_data.items()):  # the longest unused first
            unused = (now - self.time_last_used[name]).total_seconds() if name in self.time_last_used else 0.0
            if unused > (LEFT_S if visit.is_closed else UNUSED_S) or (size > KEPT_MB * 1e6 and visit.size):
                size -= visit.size
                self.drop(name)


class Page(GuardedBlocks):
    """Blocks for browsers that are not trusted: whatever they send, the answer is a sentence."""

    _queue: Waiting

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **settings: Any) -> dict[str, Any]:
        visitor = settings.get("session_hash") or ""
        VISITOR.set(visitor)
        if settings.get("iterator") is not None:
            await self._queue.all_read(visitor)
        return await super().process_api(block_fn, inputs, *args, **settings)

    async def preprocess_data(self, block_fn: BlockFunction, inputs: Sequence[Any], *args: Any, **settings: Any) -> Any:
        """The values of the controls as the event functions take them. Raises gr.Error for what no control sends."""
        try:
            check(block_fn.inputs, inputs)
            return await super().preprocess_data(block_fn, list(inputs), *args, **settings)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except gr.Error as error:
            raise gr.Error(shortened(error.message, 300), print_exception=False) from None
        except Exception as error:  # each component checks in its own way
            if isinstance(error.__cause__, DSDError):  # one of ours
                raise gr.Error(str(error.__cause__), print_exception=False) from None
            log.warning("values that a browser sent cannot be read: %s", shortened(error, 300))
            raise gr.Error(
                "the page cannot read these values: reload it and try again", print_exception=False
            ) from None


class Ending:
    """ASGI middleware that ends a stream of messages which Gradio breaks off after its last message, which has said
    why (the visitor is not known, or was dismissed), by an exception."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except RuntimeError as error:  # Starlette's: the exception has a handler, but the answer has begun
            if not isinstance(error.__cause__, HTTPException | LookupError):
                raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def checked(visitor: str) -> None:
    """Raises HTTPException 400 for a name that no page gives its visitor."""
    if not NAME.fullmatch(visitor):
        raise HTTPException(
            400, f"session_hash must be 1 to 64 letters, digits, - or _, got {shortened(visitor)}: reload the page"
        )


def install(page: Page, app: FastAPI) -> None:
    """Put the bounds into Gradio's application of the page."""
    app.state_holder = Kept()  # type: ignore[attr-defined]
    app.state_holder.set_blocks(page)  # type: ignore[attr-defined]
    route_utils.SessionState = Visit  # type: ignore[attr-defined]  # of a call without a visitor, for as long as it runs
    for kind in (FnIndexInferError, LookupError, TypeError, ValueError):
        app.add_exception_handler(kind, misread)
    app.add_middleware(Ending)


async def misread(request: Request, error: Exception) -> JSONResponse:
    """Gradio's routes look up and convert what they are sent without a check of their own."""
    log.warning("%s cannot be read: %s: %s", request.url.path, type(error).__name__, shortened(error, 300))
    return JSONResponse({"detail": "the page cannot read this request: reload it and try again"}, 400)
