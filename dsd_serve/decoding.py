"""Decoding images that strangers send, within a budget of memory."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from dsd_serve import images
from dsd_serve.errors import InputError
from dsd_serve.rows import Pixels

MAX_TOTAL = 400_000_000  # bytes


class Decoder:
    """Decodes images of strangers, outside the event loop; all that are decoded at one time take at most `max_total`
    bytes, others wait. max_pixels: of one image."""

    def __init__(self, max_pixels: int = images.MAX_PIXELS, max_total: int = MAX_TOTAL) -> None:
        self.max_pixels, self.max_total = max_pixels, max_total
        self.total = 0
        # Few threads of its own: the processor is not shared among many pictures, nor memory among many heaps.
        self.threads = ThreadPoolExecutor(os.cpu_count(), "decoder")
        self.turn = asyncio.Lock()  # first come, first served
        self.freed = asyncio.Event()

    async def read(self, data: bytes, size: int, *, opacity: bool = False) -> Pixels:
        """The centre square of a picture, uint8 [3, size, size]. Raises InputError with what is wrong with it.

        opacity: see `images.decode`.
        """
        loop = asyncio.get_running_loop()
        picture = await loop.run_in_executor(self.threads, images.open_picture, data, self.max_pixels)
        needed = images.decode_memory(picture, size)
        if needed > self.max_total:
            raise InputError(
                f"decoding this {picture.format} of {picture.width} x {picture.height} pixels takes "
                f"{needed / 1e6:.0f} MB, this server allows {self.max_total / 1e6:g} MB; send it smaller"
            )
        async with self.memory(needed):
            decode = partial(images.decode, picture, size, opacity=opacity)
            return await loop.run_in_executor(self.threads, decode)

    @contextlib.asynccontextmanager
    async def memory(self, needed: int) -> AsyncIterator[None]:
        async with self.turn:
            while self.total + needed > self.max_total:
                self.freed.clear()
                await self.freed.wait()
            self.total += needed
        try:
            yield
        finally:
            self.total -= needed
            self.freed.set()
