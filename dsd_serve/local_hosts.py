"""The names and addresses of this machine."""

import ipaddress
import socket


def is_this_machine(host: str) -> bool:
    """Whether a host name or IP address is this machine. Nothing is looked up in the network."""
    name, own = host.lower().rstrip("."), socket.gethostname().lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name in ("localhost", own, f"{own}.local", own.partition(".")[0]) or name.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)
