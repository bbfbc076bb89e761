"""Decoding of untrusted images, within a memory budget."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

from dsd_serve.errors import InputError
from dsd_serve.imaging import codec
from dsd_serve.memory import Memory, after
from dsd_serve.rows import Pixels

MAX_TOTAL = 400_000_000  # bytes


class Decoder:
    """Decodes untrusted images outside the event loop.

    max_pixels: of one image. max_total: bytes of all images that are decoded at a time; others wait.
    """

    def __init__(self, max_pixels: int = codec.MAX_PIXELS, max_total: int = MAX_TOTAL) -> None:
        self.max_pixels, self.memory = max_pixels, Memory(max_total)
        # Few threads, of its own: many would share the processor among many images, and memory among many heaps.
        self.threads = ThreadPoolExecutor(os.cpu_count(), "decoder")

    async def read(self, data: bytes, size: int, *, opacity: bool = False, who: str | None = None) -> Pixels:
        """The centre square of an image, uint8 [3, size, size]. Raises InputError with the reason.

        opacity: see `codec.decode`. who: see `Memory.take`.
        """
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(self.threads, codec.open_file, data, self.max_pixels)
        needed = codec.decode_memory(image, size)
        if needed > self.memory.limit:
            raise InputError(
                f"decoding this {image.format} of {image.width} x {image.height} pixels takes "
                f"{needed / 1e6:.0f} MB, this server allows {self.memory.limit / 1e6:g} MB; send it smaller"
            )
        claim = await self.memory.take(needed, who)
        decoding = self.threads.submit(codec.decode, image, size, opacity=opacity)
        after(decoding, claim.release)
        return await asyncio.wrap_future(decoding)
