"""Limits on the connections to a coordinator: the table `[connections]` of its kit's `coordinator.toml`."""

import contextlib
import sys

from pydantic import BaseModel, ConfigDict, Field

MOST_FILES = 65_536
"""Open files to ask for; some systems allow an unlimited number, and then refuse to set it."""


class ConnectionLimits(BaseModel):
    """Limits on connections to the coordinator, in its kit's `coordinator.toml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    handshake_seconds: float = Field(10.0, gt=0, le=3600, description="Longest TLS handshake.")
    first_request_seconds: float = Field(
        20.0, gt=0, le=3600, description="Time from connecting to the first request that a registered key has signed."
    )
    unproven: int = Field(
        512, ge=1, description="Connections in all without a signed request; a further one displaces the oldest."
    )
    unproven_per_address: int = Field(
        128, ge=1, description="The same for one IPv4 address or one IPv6 /64 network; sites may share it behind a NAT."
    )
    per_site: int = Field(16, ge=4, description="Connections of one site; a further one displaces the least used.")

    def within(self, files: int) -> "ConnectionLimits":
        """Return limits that leave at least half of `files` open files to sites, and to the coordinator itself."""
        unproven = max(1, min(self.unproven, files // 4))
        return self.model_copy(update={"unproven": unproven})


def raise_file_limit() -> int:
    """Raise this process's limit on open files to its hard limit, at most `MOST_FILES`; return the limit in force."""
    if sys.platform == "win32":
        return MOST_FILES
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft
