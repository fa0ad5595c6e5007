"""Processes of the command-line programs, forked from one that has imported them.

Such a start takes a fraction of a second of a processor, and not the seconds that importing takes. The processes are
real ones, with pids, signals, files and connections of their own, and share memory only as copies.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.context import ForkServerProcess
from pathlib import Path

IMPORTED = ("fedhead.cli.server", "fedhead.cli.client", "fedhead.server.app", "fedhead.client.site")
"""What is imported once."""

_context = multiprocessing.get_context("forkserver")


class Forked:
    """One run of `fedhead`, in a process and a session of its own.

    Args:
        arguments: of `fedhead`.
        environment: the whole environment of the process.
        log: gets its standard output and standard error, at its end.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        _context.set_forkserver_preload([*IMPORTED, __name__])
        self._process: ForkServerProcess = _context.Process(
            target=_run, args=(list(arguments), dict(environment), str(log))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, or minus the signal that ended the process; None while it runs."""
        return self._process.exitcode

    def send(self, sent: signal.Signals) -> None:
        """Send a signal, if the process has not ended."""
        with suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, sent)

    def wait(self, seconds: float) -> int | None:
        """Wait for the end, no longer than some seconds; return `poll`."""
        self._process.join(seconds)
        return self.poll()

    def end(self) -> None:
        """Kill the process in any state."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGKILL)
        self._process.join()
        self._process.close()


def _run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (handle, 1), (handle, 2)):
        os.dup2(source, target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["fedhead", *arguments]
    # The command line is above the benchmarks in the layers of the package.
    import_module("fedhead.cli").main()
