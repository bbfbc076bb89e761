"""Addresses of Triton servers: HOST:PORT of gRPC, and how gRPC connects to them."""

import os
import re
import urllib.request

from dsd_serve.errors import ConfigError, shown
from dsd_serve.local_hosts import is_this_machine

HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]+)?\]")
MOST_BYTES = 64_000_000  # of one answer; the largest is an image of 4096 x 4096 pixels
CHANNEL = (
    ("grpc.max_receive_message_length", MOST_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # a recovered server is found within a second
)


def parse_addresses(text: str) -> list[str]:
    """Addresses of `HOST:PORT[,HOST:PORT]`, with the gRPC port. Raises ConfigError."""
    addresses = [item.strip() for item in text.split(",")]
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not HOST.fullmatch(host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise ConfigError(
                f"triton must be HOST:PORT[,HOST:PORT] with Triton's gRPC port (8001), an IPv6 address in brackets, "
                f"got {shown(address)}"
            )
    if repeated := [address for address in addresses if addresses.count(address) > 1]:
        raise ConfigError(f"triton names {repeated[0]} twice; give each server once")
    return addresses


def is_local(address: str) -> bool:
    """Whether HOST:PORT is on this machine."""
    return is_this_machine(address.rpartition(":")[0].strip("[]"))


def channel_options(address: str) -> list[tuple[str, int]]:
    """The options of a gRPC channel. A server on this machine is never reached through a proxy."""
    return [*CHANNEL, ("grpc.enable_http_proxy", 0)] if is_local(address) else list(CHANNEL)


def proxy_of(address: str) -> str | None:
    """The variable that makes gRPC connect to HOST:PORT through a proxy, if any. Its value may hold a password."""
    exempt = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy", "")  # noqa: SIM112 gRPC's spelling
    bypass = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]  # the stubs leave it out
    if is_local(address) or bypass(address, {"no": exempt}):
        return None
    return next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), None)
