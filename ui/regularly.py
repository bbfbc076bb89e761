"""Work that is repeated in the background, such as deleting what is old."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


@contextlib.asynccontextmanager
async def regularly(work: Callable[[], object], seconds: float) -> AsyncIterator[None]:
    """Call `work` every so many seconds while the context is open."""

    async def repeat() -> None:
        while True:
            await asyncio.sleep(seconds)
            work()

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
