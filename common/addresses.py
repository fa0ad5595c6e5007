"""Network addresses as they are written."""

import ipaddress

from fedhead.errors import UserError


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`; an IPv6 address stands in brackets.

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
    """Tell whether a host is this machine, by an address that no other can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
