"""The coordinator's open connections, and the choice of the one that gives way when there are too many."""

import ipaddress
from collections import defaultdict
from collections.abc import Callable

from fedhead.server.network.limits import ConnectionLimits

SPARE_FILES = 8
"""Files that stay free for the coordinator's own work once it found that it could open no more."""


class Connection:
    """One accepted connection.

    Args:
        address: of the peer.
        connections: it belongs to.

    Attributes:
        site: the name of the site that signed its last request; empty before the first.
        hang_up: closes it at once.
    """

    def __init__(self, address: str, connections: "Connections") -> None:
        self.network = _network(address)
        self.site = ""
        self.hang_up: Callable[[], object] = lambda: None
        self._connections = connections

    def proves(self, site: str) -> None:
        """Note that a request of a registered site came on it."""
        self._connections.leave(self)
        self.site = site
        self._connections.enter(self)

    def leave(self) -> None:
        """Note that it is closed."""
        self._connections.leave(self)


class Connections:
    """Every open connection; at a limit, an earlier one gives way to a new one.

    A stranger's idle connections thus lock out neither sites nor, while it opens few a second, each other. The oldest
    connection of the network with the most connections gives way, so that one stranger does not displace others.
    Use it from the event loop only.

    Args:
        limits: on their numbers.
        most: connections in all, of sites too.
        say: logs a sentence.
    """

    def __init__(self, limits: ConnectionLimits, most: int, say: Callable[[str], None]) -> None:
        self.limits = limits
        self._most = most
        self._say = say
        # Dictionaries keep the order of connecting, or of the last use.
        self._unproven: defaultdict[str, dict[Connection, None]] = defaultdict(dict)
        self._proven: defaultdict[str, dict[Connection, None]] = defaultdict(dict)
        self._unproven_number = self._number = 0

    def open(self, address: str) -> Connection | None:
        """Take in a connection of a peer that has proven nothing yet; None if there is no room for it."""
        connection = Connection(address, self)
        if len(self._unproven.get(connection.network, ())) >= self.limits.unproven_per_address:
            self._displace(connection.network)
        elif self._unproven_number >= self.limits.unproven:
            self.displace_one()
        if self._number >= self._most and not self.displace_one():
            self._say("Refused: a connection, since the coordinator has as many as it can hold.")
            return None
        self.enter(connection)
        return connection

    def displace_one(self) -> bool:
        """Hang up on one connection without a signed request; return whether there was one."""
        if not self._unproven:
            return False
        self._displace(max(self._unproven, key=lambda network: len(self._unproven[network])))
        return True

    def make_room(self) -> None:
        """Lower the number of connections for good, as the process may open no more files."""
        self._most = max(self._number - SPARE_FILES, SPARE_FILES)
        self._say(f"The coordinator has no file left to open: from here on it holds {self._most} connections.")
        while self._number > self._most and self.displace_one():
            pass

    def enter(self, connection: Connection) -> None:
        """Count a connection, as the newest of its site or network."""
        groups = self._proven if connection.site else self._unproven
        group = groups[connection.site or connection.network]
        group[connection] = None
        self._number += 1
        self._unproven_number += not connection.site
        if connection.site and len(group) > self.limits.per_site:
            self._hang_up(next(iter(group)))

    def leave(self, connection: Connection) -> None:
        """Count a connection no more; it may have left before."""
        groups = self._proven if connection.site else self._unproven
        name = connection.site or connection.network
        group = groups.get(name, {})
        if connection not in group:
            return
        del group[connection]
        if not group:
            del groups[name]
        self._number -= 1
        self._unproven_number -= not connection.site

    def late(self, connection: Connection) -> None:
        """Hang up on a connection whose time for a signed request is over, if none came."""
        if not connection.site and connection in self._unproven.get(connection.network, {}):
            self._say(f"Refused: connections from {connection.network} that sent no signed request in time.")
            self._hang_up(connection)

    def _displace(self, network: str) -> None:
        self._say(
            f"Refused: connections from {network} that sent no signed request, since there were too many of them."
        )
        self._hang_up(next(iter(self._unproven[network])))

    def _hang_up(self, connection: Connection) -> None:
        self.leave(connection)
        connection.hang_up()


def _network(address: str) -> str:
    """Return an IPv4 address, or the /64 network of an IPv6 one, which one machine may own all of."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
