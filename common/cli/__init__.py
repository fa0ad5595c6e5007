"""One command, `fedhead`, thin: parse, call, print. A command imports its dependencies when it is called."""

import os
import sys

from fedhead.cli import (
    adapt,
    approvals,
    backbones,
    client,
    cluster,
    data,
    deploy,
    export,
    fairness,
    flower_app,
    generate,
    ledger,
    membership,
    monitor,
    predict,
    provision,
    rank,
    report,
    roster,
    server,
    similar,
    simulate,
    site,
    solve,
    status,
    stop,
    worth,
)
from fedhead.cli.application import INTERRUPTED, app

__all__ = [
    "adapt",
    "app",
    "approvals",
    "backbones",
    "client",
    "cluster",
    "data",
    "deploy",
    "export",
    "fairness",
    "flower_app",
    "generate",
    "ledger",
    "main",
    "membership",
    "monitor",
    "predict",
    "provision",
    "rank",
    "report",
    "roster",
    "server",
    "similar",
    "simulate",
    "site",
    "solve",
    "status",
    "stop",
    "worth",
]


def main() -> None:
    """Run the command line; the entry point `fedhead`."""
    # Threads that spin while they wait make torch many times slower on a machine with other work to do; threads that
    # never do, twice as slow in small operations. So they spin for some microseconds, where that can be said (libgomp).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
