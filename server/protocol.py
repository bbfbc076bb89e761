"""HTTP on the wire: uvicorn's httptools protocol, with the bound on a request's head that its parser does not have."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 65_536  # bytes of request line and headers


class BoundedProtocol(HttpToolsProtocol):
    """llhttp gathers a head of any size in memory; here a head that goes on after `MAX_HEAD` bytes is answered 400.

    What arrives in one read is parsed whole, so a head of up to `MAX_HEAD` bytes and one read (256 KiB) may pass.
    """

    in_head = True  # the next byte belongs to a head
    head = 0  # bytes that arrived in reads of nothing but this head

    def data_received(self, data: bytes) -> None:
        self.only_head = self.in_head
        super().data_received(data)
        self.head = self.head + len(data) if self.only_head else 0
        if self.head > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response(f"The request line and headers are over {MAX_HEAD} bytes; send less.")

    def on_headers_complete(self) -> None:
        self.in_head = self.only_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self.in_head = True  # of the next request
        super().on_message_complete()
