"""The long-running site: one process that answers a coordinator for as long as it is up.

It runs the handlers that are installed here; no code comes over the network. Backbone, features and device stay warm
between messages and runs, and what a run told the site is kept on disk, so that a killed process goes on where it was.
"""

import fcntl
import hashlib
import logging
import os
import re
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType

from flwr.app import Context, Error, Message, RecordDict

from fedhead.certificates import expiry_warning
from fedhead.client.app import discreet, kept, make_app
from fedhead.client.approval import Approvals, Ask
from fedhead.client.connection import LONG_WAIT, Connection, RefusedError, WorkIsOverError
from fedhead.client.guard import Entry, Guard, Ledger, ledger_path
from fedhead.client.settings import Kit, SiteSettings, insecure_key
from fedhead.client.site_data import LocalSite
from fedhead.data.samples import local_path
from fedhead.errors import FedheadError, UserError
from fedhead.files import disk_errors, home, safe_name, write_atomically
from fedhead.flower import FleetClient, content_from_bytes, content_to_bytes
from fedhead.health import Health
from fedhead.messages import DESCRIBE, TRAIN, Payload

logger = logging.getLogger(__name__)

KEPT_RUNS = 8
"""Of how many runs a site keeps what it was told."""
FAILED = 2
"""Flower's code of an app that raised an exception."""
_HOLDER = re.compile(rb"[a-z0-9_-]+, process [0-9]+")


class StopSite(BaseException):
    """The process was asked to end; not an `Exception`, so that nothing on the way takes it for a failure."""


def serve(
    settings: SiteSettings, kit: Kit | None, *, approve: bool = False, ask: Ask | None = None, health: str = ""
) -> None:
    """Run a site until it is stopped: check its data and device, connect, and answer.

    Args:
        settings: the site's own, which decide.
        kit: its keys; None on one machine, without TLS.
        approve: whether a person must agree to the first release of each kind.
        ask: how to reach one; None if nobody is there.
        health: `HOST:PORT` of a gRPC health service, if any; it serves while the site is connected.

    Raises:
        UserError: if data or device are not to be had, or another process has them; before anything is sent.
        CannotHealError: if the connection is lost for good.
        StopSite: when the process is asked to end.
    """
    if not settings.data:
        raise UserError('Say what data this site has: --data folder:PATH, or data = "folder:PATH" in site.toml.')
    if kit is not None and (warning := expiry_warning(kit.path / "ca.pem", "Ask the coordinator for a new kit.")):
        logger.warning("%s", warning)
    folder = home() / "sites" / safe_name(settings.name)
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    whom = settings.coordinator if kit is None else hashlib.sha256(kit.root_certificates).hexdigest()
    approvals = Approvals(folder / "approvals.json", whom, ask) if approve else None

    released: list[Entry] = []

    def last_word(entry: Entry) -> None:
        if approvals is not None:
            approvals(entry)
        released.append(entry)

    with stopping_by_signal(), only_process(settings):
        guard = Guard(settings.limits.min_class_count, settings.limits.min_rows)
        ledger = Ledger(ledger_path(settings.name), guard.min_class_count, last_word)
        site = LocalSite(settings.name, settings.data, settings.device, settings.strict_data, guard, ledger)
        logger.info("%s has %d rows of %s, on %s.", site.name, site.num_rows, settings.data, site.device)
        key, certificates = (insecure_key(folder), None) if kit is None else (kit.key, kit.root_certificates)
        fleet = FleetClient(settings.coordinator, key, certificates, LONG_WAIT, settings.name)
        state = Health()
        connection = Connection(
            fleet, settings.coordinator, folder / "node.json", insecure=kit is None, on_change=state.serving
        )
        with state.served(health) if health else nullcontext():
            SiteProcess(settings, site, connection, folder, released).run()


class KeptContexts:
    """What each run told the site, in memory and on disk.

    Args:
        folder: where it is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._contexts: dict[int, Context] = {}

    def of(self, message: Message) -> Context:
        """Return the context of a message's run."""
        run, node = message.metadata.run_id, message.metadata.dst_node_id
        if run not in self._contexts:
            self._contexts[run] = Context(run, node, {}, self._read(run), {})
            while len(self._contexts) > KEPT_RUNS:
                del self._contexts[next(iter(self._contexts))]
        return self._contexts[run]

    def keep(self, context: Context) -> None:
        """Write what changed since it was read or last kept."""
        blob = content_to_bytes(context.state)
        path = self._path(context.run_id)
        if not context.state or (path.exists() and path.read_bytes() == blob):
            return
        write_atomically(path, blob)
        for old in sorted(self._folder.glob("*.state"), key=lambda each: each.stat().st_mtime)[:-KEPT_RUNS]:
            old.unlink(missing_ok=True)

    def _read(self, run: int) -> RecordDict:
        try:
            return content_from_bytes(self._path(run).read_bytes())
        except FileNotFoundError:
            return RecordDict()
        except (OSError, ValueError):
            logger.warning("What this run told the site cannot be read any more; the coordinator must tell it again.")
            return RecordDict()

    def _path(self, run: int) -> Path:
        return self._folder / f"{run & (2**64 - 1):016x}.state"


class SiteProcess:
    """Answers messages until it is stopped.

    Args:
        settings: the site's own, which decide.
        site: its data.
        connection: to the coordinator.
        folder: where it keeps what runs told it.
        released: grows by an entry with each release of the site's ledger.
    """

    def __init__(
        self,
        settings: SiteSettings,
        site: LocalSite,
        connection: Connection,
        folder: Path,
        released: list[Entry] | None = None,
    ) -> None:
        self.settings = settings
        self._site = site
        self._connection = connection
        self._contexts = KeptContexts(folder / "runs")
        self._released = [] if released is None else released
        self._app = make_app(lambda context: site, [discreet])
        self._working_on: Message | None = None

    def run(self) -> None:
        """Serve until `StopSite` is raised, then say goodbye.

        Raises:
            CannotHealError: if the connection is lost for good.
            StopSite: when the process is asked to end.
        """
        try:
            self._connection.open()
            while True:
                self._serve_one()
        except StopSite:
            logger.info("Stopping.")
            raise
        finally:
            unfinished = self._working_on
            last = None if unfinished is None else _failure(unfinished, f"{self.settings.name} was stopped meanwhile.")
            self._connection.close(last)

    def _serve_one(self) -> None:
        try:
            message = self._connection.receive()
            if message is None:
                return
            self._working_on = message
            began = time.monotonic()
            reply = self.answer(message)
            took = time.monotonic() - began
            try:
                self._connection.send(reply, took)
            except RefusedError as error:
                # Too large, perhaps: the coordinator is told that there is nothing to wait for.
                logger.error("%s: %s", self._asked(message), error)
                reply = _failure(message, f"Its reply was not taken. {error}")
                self._connection.send(reply, took)
            if not reply.has_error():
                logger.info("%s: done in %.2f s.%s", self._asked(message), took, self._said_of_releases())
        except WorkIsOverError as error:
            logger.info("%s", error)
        self._working_on = None

    def answer(self, message: Message) -> Message:
        """Return the reply to a message: what the handler made, or why there is nothing."""
        action = message.metadata.message_type
        self._released.clear()
        if action not in self.settings.permit.actions:
            logger.warning("%s: refused, because site.toml does not permit it.", self._asked(message))
            return _failure(message, f"{self.settings.name} does not permit {action}.")
        logger.info("%s.", self._asked(message))
        context = self._contexts.of(message)
        try:
            if action == DESCRIBE:
                self._site.refresh()
            reply = self._app(message, context)
            self._contexts.keep(context)
        except UserError as error:
            # The data is not there any more; where it was is nobody else's business.
            logger.error("%s: refused. %s", self._asked(message), error)
            return _failure(message, "The site cannot do it; its own log says why.")
        except FedheadError as error:
            logger.error("%s: refused. %s", self._asked(message), error)
            return _failure(message, str(error))
        # A site answers for as long as it is up: whatever is asked for, the failure is of this message alone.
        except Exception as error:
            logger.exception("%s: failed, unexpectedly.", self._asked(message))
            return _failure(message, f"The site failed ({type(error).__name__}); its own log says why.")
        return reply

    def _asked(self, message: Message) -> str:
        """Return what a message asks for, as the log tells it."""
        action = message.metadata.message_type
        try:
            values = Payload.from_content(message.content).values if action in (DESCRIBE, TRAIN) else {}
            run = values["run"] if action == DESCRIBE else kept(self._contexts.of(message)).manifest.run
        except (FedheadError, ValueError, KeyError):
            return f"An unknown run, {action}"
        return f"Run {str(run)[:8]}, {action}" + (f" of round {values.get('server_round')}" if action == TRAIN else "")

    def _said_of_releases(self) -> str:
        return "".join(
            f" Released {entry.bytes} bytes about {entry.rows} rows of {len(entry.classes)} classes, digest "
            f"{entry.digest[:12]}…"
            for entry in self._released
        )


def _failure(message: Message, reason: str) -> Message:
    return Message(Error(FAILED, reason), reply_to=message)


@contextmanager
def stopping_by_signal() -> Iterator[None]:
    """Raise `StopSite` on SIGTERM or SIGINT, once; until the process has ended, further ones are ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise StopSite(signal.Signals(number).name)

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def only_process(settings: SiteSettings) -> Iterator[None]:
    """Hold this site's name and its data, so that no second process answers for either.

    Raises:
        UserError: if another process holds one of them.
    """
    there = local_path(settings.data)
    # Sites may share a table, each with its own rows of it: then the options tell them apart.
    options = settings.data.partition("?")[2]
    data = settings.data if there is None else f"{there}?{options}" if options else str(there)
    locks = home() / "sites" / "locks"
    with ExitStack() as held:
        for name, what in (
            (f"name-{safe_name(settings.name)}", f"the site {settings.name}"),
            (f"data-{hashlib.sha256(data.encode()).hexdigest()[:32]}", f"the data {settings.data}"),
        ):
            with disk_errors(locks / name):
                locks.mkdir(mode=0o700, parents=True, exist_ok=True)
                handle = os.open(locks / name, os.O_RDWR | os.O_CREAT, 0o600)
            _hold(handle, what, held)
            os.truncate(handle, 0)
            os.write(handle, f"{settings.name}, process {os.getpid()}".encode())
        if there is not None and not options and os.access(there, os.R_OK):
            # The lock that processes with another FEDHEAD_HOME see, where the file system has one to give.
            _hold(os.open(there, os.O_RDONLY), f"the data {settings.data}", held)
        yield


def _hold(handle: int, what: str, held: ExitStack) -> None:
    held.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"Another fedhead client is up for {what} on this machine{_holder(handle)}; a site has one. End it first."
        ) from None
    except OSError as error:
        logger.debug("No lock is to be had: %s.", error)


def _holder(handle: int) -> str:
    """Return who holds a lock: by what it wrote into one of ours, or by its process, where the system tells."""
    about = os.fstat(handle)
    if stat.S_ISREG(about.st_mode) and (said := _HOLDER.match(os.read(handle, 200))):
        return f": {said[0].decode()}"
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, process, file, *_ = line.split()
            if kind == "FLOCK" and int(file.rpartition(":")[2]) == about.st_ino and int(process) > 0:
                return f": process {process}"
    return ""
