"""Addresses of schedulers, and who can reach them."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from urllib.parse import urlsplit


def is_open_to_others(address: str) -> bool:
    """Whether a scheduler's address is one of the network, without TLS; a name is asked for its IP addresses."""
    protocol, _, place = address.rpartition("://")
    host = urlsplit(f"//{place}").hostname
    if protocol in ("tls", "wss") or not host:
        return False
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:  # connecting says why
        return False
    return not all(ip_address(str(ip)).is_loopback for ip in found)
