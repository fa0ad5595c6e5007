"""Network addresses as they are written, and sockets that listen on them."""

import ipaddress
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from fedhead.errors import UserError


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`; an IPv6 address is in brackets.

    Raises:
        UserError: if it is anything else.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if (
        not (colon and host and port.isdecimal() and int(port) <= 65535)
        or (":" in host and not bracketed)
        or set(host) & set("/ ")
    ):
        raise UserError(f"{address!r} is not HOST:PORT, as in coord.example.org:9092 or [::1]:9092.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, by an address that no other machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def proxy_of(host: str, port: int) -> str:
    """Return the URL of the proxy that the environment names for HTTPS connections to a host; empty for none.

    `HTTPS_PROXY` or else `ALL_PROXY` names it, and `NO_PROXY` lists the hosts that are reached directly.

    Raises:
        UserError: if it is no HTTP proxy.
    """
    if any(proxy_bypass(name) for name in (host, f"{host}:{port}")):
        return ""
    named = getproxies_environment()
    proxy = named.get("https") or named.get("all") or ""
    if not proxy:
        return ""
    url = proxy if "://" in proxy else f"http://{proxy}"
    try:
        usable = urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UserError(
            f"HTTPS_PROXY or ALL_PROXY names {shown_proxy(url)!r}, and sites connect through HTTP proxies only; "
            "expected http://HOST:PORT."
        )
    return url


def shown_proxy(url: str) -> str:
    """Return a proxy's URL without user name and password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def listening_socket(host: str, port: int, backlog: int) -> socket.socket:
    """Return a TCP socket that listens.

    Args:
        host: an address or a name of this machine.
        port: 0 for any free one.
        backlog: the number of connections that may wait to be accepted.

    Raises:
        OSError: if it cannot.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(backlog)
    except BaseException:
        opened.close()
        raise
    return opened
