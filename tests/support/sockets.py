"""Raw HTTP/1.1 over a socket."""

OFFERS = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
    b"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    b"Connection: upgrade\r\nUpgrade: TLS/1.2, something/else\r\n",
    b"upgrade: h2c\r\nconnection: UPGRADE\r\nConnection: close\r\n",
]


def read_all(opened):
    """All bytes until the peer closes."""
    received = b""
    while part := opened.recv(65536):
        received += part
    return received


def read_answer(opened):
    """One answer with a content-length, from a connection that stays open: (status, body)."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = opened.recv(65536)
        assert part, received
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(next(line.split(b":")[1] for line in head.splitlines() if line.lower().startswith(b"content-length")))
    while len(body) < length:
        part = opened.recv(65536)
        assert part, received
        body += part
    return int(head.split()[1]), body
