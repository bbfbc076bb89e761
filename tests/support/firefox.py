"""Firefox, driven over WebDriver BiDi, which it speaks itself: no driver is needed."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("firefox", "firefox-esr")
SECONDS = 240  # for an answer
STARTING = "WebDriver BiDi listening on "


class Firefox:
    """One tab of Firefox. address: of its BiDi socket."""

    def __init__(self, address: str) -> None:
        self.loop, self.number = asyncio.new_event_loop(), 0
        threading.Thread(target=self.loop.run_forever, daemon=True).start()  # a thread may have one loop only
        self.socket = self.wait(self.connect(address))
        self.call("session.new", capabilities={})
        self.tab = self.call("browsingContext.getTree")["contexts"][0]["context"]

    def wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(SECONDS)

    async def connect(self, address: str) -> Any:
        self.session = aiohttp.ClientSession()
        return await self.session.ws_connect(f"{address}/session", max_msg_size=0)

    async def ask(self, message: dict[str, Any]) -> Any:
        await self.socket.send_json(message)
        while (answer := await self.socket.receive_json()).get("id") != message["id"]:
            pass
        assert answer["type"] == "success", answer
        return answer["result"]

    def call(self, method: str, **params: Any) -> Any:
        self.number += 1
        return self.wait(self.ask({"id": self.number, "method": method, "params": params}))

    def close(self) -> None:
        self.wait(self.session.close())
        self.loop.call_soon_threadsafe(self.loop.stop)

    def goto(self, url: str) -> None:
        self.call("browsingContext.navigate", context=self.tab, url=url, wait="complete")

    def evaluate(self, function: str, argument: Any = None) -> Any:
        """The result of a JavaScript function of one argument, which may be asynchronous; both in JSON."""
        code = f"(async () => JSON.stringify(await ({function})({json.dumps(argument)})))()"
        found = self.call("script.evaluate", expression=code, target={"context": self.tab}, awaitPromise=True)
        assert found["type"] == "success", found["exceptionDetails"]["text"]
        return json.loads(found["result"]["value"])


@contextlib.contextmanager
def firefox(profile: Path) -> Iterator[Firefox]:
    """A new Firefox with an empty profile, or a skipped test without it."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("this test needs Firefox: apt-get install firefox-esr")
    profile.mkdir()
    command = [program, "--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stderr
        address = next((line.partition(STARTING)[2].strip() for line in process.stderr if STARTING in line), "")
        assert address, "Firefox did not start"
        tab = Firefox(address)
        yield tab
        tab.close()
    finally:
        process.terminate()
        process.wait(30)
