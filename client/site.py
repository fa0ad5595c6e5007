"""The long-running site: one process that answers a coordinator for as long as it is up.

It runs the handlers that are installed here; no code comes over the network. Backbone, features and device stay warm
between messages and runs, and a run's messages to the site are kept on disk, so that a killed process continues where
it was.
"""

import hashlib
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from flwr.app import Context, Error, Message, RecordDict

from fedhead.certificates import expiry_warning
from fedhead.client.agreement import agreement
from fedhead.client.app import discreet, make_app
from fedhead.client.attempts import Attempts
from fedhead.client.backbones import nobody_agrees, origin_of
from fedhead.client.connection import (
    LONG_WAIT,
    CannotHealError,
    Connection,
    RefusedError,
    TooLargeError,
    WorkIsOverError,
)
from fedhead.client.local_site import LocalSite
from fedhead.client.metrics import SiteMetrics
from fedhead.client.refusals import SAID_IN_LOG, sayable
from fedhead.client.release.approval import Approvals, Ask, approvals_path
from fedhead.client.release.ledger import Entry, ledger_path
from fedhead.client.release.payloads import Payloads
from fedhead.client.settings import Kit, SiteSettings, insecure_key, trusted
from fedhead.client.site_locks import only_process
from fedhead.client.site_opening import require_data, secure_keys_of, site_of
from fedhead.errors import FedheadError, UserError
from fedhead.files import disk_errors, home, safe_name, write_atomically
from fedhead.flower import content_from_bytes, content_to_bytes
from fedhead.flower.fleet_client import FleetClient
from fedhead.flower.messages import Delivery
from fedhead.health import Health
from fedhead.monitoring import Monitoring
from fedhead.protocol.actions import DESCRIBE, GRADIENT, TRAIN
from fedhead.protocol.messages import Payload
from fedhead.wording import counted, one_line

logger = logging.getLogger(__name__)

KEPT_RUNS = 8
"""Number of runs whose agreements a site keeps."""
UNREADABLE_SECONDS = 1.0
"""Time before the next message is asked for after one that cannot be read."""
FAILED = 2
"""Flower's code of an app that raised an exception."""


class EndedTwiceError(FedheadError):
    """A message ended the site's process twice."""


class StopSite(BaseException):
    """The process was asked to end; not an `Exception`, so that nothing on the way takes it for a failure."""


def _approvals(settings: SiteSettings, whom: str, ask: Ask | None, written: Payloads) -> Approvals:
    return Approvals(
        approvals_path(settings.name),
        whom,
        ask,
        written,
        data=settings.data,
        address=settings.coordinator,
        origin=partial(origin_of, settings.backbones.allow),
    )


def serve(
    settings: SiteSettings,
    kit: Kit | None,
    *,
    approve: bool = False,
    ask: Ask | None = None,
    payloads: Path | None = None,
    monitoring: Monitoring | None = None,
) -> None:
    """Run a site until it is stopped: check its data and device, connect, and answer.

    Args:
        settings: the site's own, which decide.
        kit: its keys; None on one machine, without TLS.
        approve: whether a person must agree to each kind of release of a run, and to unknown weights.
        ask: asks one; None without one.
        payloads: a folder that each reply is written to before it leaves; None for none.
        monitoring: its endpoints, if any; the health service serves while the site is connected.

    Raises:
        UserError: if data or device are not available, or another process has them; before anything is sent.
        CannotHealError: if the connection is lost for good.
        StopSite: when the process is asked to end.
    """
    folder, whom = _prepare(settings, kit)
    # Of several coordinators, each is served by a process of its own, with a folder of its own.
    coordinator = hashlib.sha256(whom.encode()).hexdigest()[:16]
    own_folder = folder / "coordinators" / coordinator
    written = Payloads(payloads or folder / "to-approve")
    approvals = _approvals(settings, whom, ask, written)
    released, counts, state = list[Entry](), SiteMetrics(settings.name), Health()

    def note(entry: Entry) -> None:
        released.append(entry)
        counts.released(entry)

    def on_change(connected: bool) -> None:
        state.serving(connected)
        counts.connected(connected)

    with stopping_by_signal(), only_process(settings, coordinator):
        steps = (*([approvals] if approve else ()), *([written] if payloads else ()))
        receiver = f"{settings.name}-{coordinator}"
        secure = secure_keys_of(kit, settings) if kit is not None else None
        agree = approvals.agree if approve else nobody_agrees
        site = site_of(settings, ledger_path(settings.name), steps, agree, note, receiver, secure)
        logger.info("%s has %d rows of %s, on %s.", site.name, site.num_rows, settings.data, site.device)
        counts.watch(site)
        key, certificates = (insecure_key(folder), None) if kit is None else (kit.key, trusted(kit, settings))
        fleet = FleetClient(
            settings.coordinator, key, certificates, LONG_WAIT, settings.name, lambda: site.told_extraction
        )
        node = own_folder / "node.json"
        connection = Connection(fleet, settings.coordinator, node, insecure=kit is None, on_change=on_change)
        with (monitoring or Monitoring()).served(state, counts):
            SiteProcess(settings, site, connection, own_folder, released, counts).run()


def _prepare(settings: SiteSettings, kit: Kit | None) -> tuple[Path, str]:
    """Check data and keys, and return the site's folder and the identity of its coordinator.

    Raises:
        UserError: if the data is not available.
    """
    require_data(settings)
    if kit is not None and (warning := expiry_warning(kit.path / "ca.pem", "Ask the coordinator for a new kit.")):
        logger.warning("%s", warning)
    folder = home() / "sites" / safe_name(settings.name)
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder, settings.coordinator if kit is None else hashlib.sha256(kit.root_certificates).hexdigest()


class KeptContexts:
    """The messages of each run to the site, in memory and on disk.

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
        """Write changes since the last read or write."""
        blob = content_to_bytes(context.state)
        path = self._path(context.run_id)
        if not context.state:
            path.unlink(missing_ok=True)
            return
        if path.exists() and path.read_bytes() == blob:
            return
        write_atomically(path, blob)
        for old in sorted(self._folder.glob("*.state"), key=lambda each: each.stat().st_mtime)[:-KEPT_RUNS]:
            old.unlink(missing_ok=True)

    def _read(self, run: int) -> RecordDict:
        try:
            return content_from_bytes(self._path(run).read_bytes())
        except FileNotFoundError:
            return RecordDict()
        # Flower raises many kinds on records that do not fit each other.
        except Exception:
            logger.warning("The site's state of this run can no longer be read; the coordinator must send it again.")
            return RecordDict()

    def _path(self, run: int) -> Path:
        return self._folder / f"{run & (2**64 - 1):016x}.state"


class SiteProcess:
    """Answers messages until it is stopped.

    Args:
        settings: the site's own, which decide.
        site: its data.
        connection: to the coordinator.
        folder: for the state of runs.
        released: grows by an entry with each release of the site's ledger.
        counts: of its answers.
    """

    def __init__(
        self,
        settings: SiteSettings,
        site: LocalSite,
        connection: Connection,
        folder: Path,
        released: list[Entry] | None = None,
        counts: SiteMetrics | None = None,
    ) -> None:
        self.settings = settings
        self._site = site
        self._connection = connection
        self._contexts = KeptContexts(folder / "runs")
        self._released = [] if released is None else released
        self._counts = counts or SiteMetrics(settings.name)
        self._attempts = Attempts(folder / "attempts.json")
        self._app = make_app(lambda context: site, [discreet])
        self._working_on: Message | None = None
        self._undelivered: tuple[str, Message] | None = None

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
            self._attempts.end(answered=False)
            self._connection.close(last)

    def _serve_one(self) -> None:
        """Answer one message. No content of a message raises anything out of here."""
        answered = False
        try:
            try:
                message = self._connection.receive(self._begin)
                if message is not None:
                    self._working_on = message
                    self._reply(message)
                    answered = True
            except (CannotHealError, WorkIsOverError):
                raise
            except Exception as error:
                self._refuse(error)
        except WorkIsOverError as error:
            logger.info("%s", error)
        self._attempts.end(answered=answered)
        self._working_on = None

    def _begin(self, delivery: Delivery) -> None:
        """Note in the journal that a message is being answered.

        Raises:
            EndedTwiceError: if it ended the process twice before.
        """
        self._working_on = delivery.message
        asks = hashlib.sha256(delivery.message.metadata.message_type.encode(errors="replace"))
        # Ids of objects are digests of their content; the message's own differs for each time that it is sent.
        for object_id in sorted({*delivery.objects} - {delivery.message.metadata.message_id}):
            asks.update(object_id.encode(errors="replace"))
        if not self._attempts.begin(asks.hexdigest()):
            raise EndedTwiceError(
                "This site's process ended twice while it answered this message, so it does not answer it again."
            )

    def _refuse(self, error: Exception) -> None:
        """Answer a message that could not be taken in, or whose reply could not be sent."""
        message = self._working_on
        if message is None:
            logger.error("What the coordinator sent cannot be read.", exc_info=error)
            time.sleep(UNREADABLE_SECONDS)
            return
        reason = "The site cannot take the message in, or send its reply; its own log says why."
        if isinstance(error, EndedTwiceError | TooLargeError):
            reason = str(error)
            logger.error("%s Remove %s to have it tried again.", reason, self._attempts.path)
        else:
            logger.error("A message cannot be taken in, or its reply sent.", exc_info=error)
        self._connection.send(_failure(message, reason), 0.0)

    def _reply(self, message: Message) -> None:
        began = time.monotonic()
        reply = self._earlier_reply(message) or self.answer(message)
        took = time.monotonic() - began
        self._counts.answered(message.metadata.message_type, took, refused=reply.has_error())
        self._undelivered = (message.metadata.message_id, reply)
        try:
            self._connection.send(reply, took)
        except RefusedError as error:
            # Too large, perhaps: tell the coordinator not to wait for it.
            logger.error("%s: %s", self._asked(message), error)
            reply = _failure(message, f"Its reply was not taken. {error}")
            self._connection.send(reply, took)
        self._undelivered = None
        if not reply.has_error():
            logger.info("%s: done in %.2f s.%s", self._asked(message), took, self._said_of_releases())

    def _earlier_reply(self, message: Message) -> Message | None:
        """Return the reply to a message that is delivered again since its reply did not arrive."""
        message_id, reply = self._undelivered or ("", None)
        return reply if message_id == message.metadata.message_id else None

    def answer(self, message: Message) -> Message:
        """Return the reply to a message: the handler's, or the reason why there is none."""
        action = message.metadata.message_type
        self._released.clear()
        if action not in self.settings.permit.actions:
            logger.warning("%s: refused, because site.toml does not permit it.", self._asked(message))
            return _failure(message, f"{self.settings.name} does not permit {one_line(action, 64)}.")
        logger.info("%s.", self._asked(message))
        try:
            context = self._contexts.of(message)
            if action == DESCRIBE:
                self._site.refresh()
            reply = self._app(message, context)
            self._contexts.keep(context)
        except UserError as error:
            # The data is not there any more; where it was is nobody else's business.
            logger.error("%s: refused. %s", self._asked(message), error)
            return _failure(message, SAID_IN_LOG)
        except FedheadError as error:
            logger.error("%s: refused. %s", self._asked(message), error)
            return _failure(message, sayable(error))
        except StopSite:
            raise
        # A panic of a library written in Rust, or a function that exits, is no `Exception` either.
        except BaseException as error:
            logger.exception("%s: failed, unexpectedly.", self._asked(message))
            return _failure(message, f"The site failed ({type(error).__name__}); its own log says why.")
        return reply

    def _asked(self, message: Message) -> str:
        """Return a message's request in words, for the log."""
        action = one_line(message.metadata.message_type, 64)
        try:
            values = Payload.from_content(message.content).values if action in (DESCRIBE, TRAIN, GRADIENT) else {}
            run = values["run"] if action == DESCRIBE else agreement(self._contexts.of(message)).manifest.run
        except StopSite:
            raise
        except BaseException:
            return f"An unknown run, {action}"
        which = f" of round {one_line(str(values.get('server_round')), 12)}" if action in (TRAIN, GRADIENT) else ""
        return f"Run {one_line(str(run), 8)}, {action}{which}"

    def _said_of_releases(self) -> str:
        return "".join(
            f" Released {entry.bytes} bytes about {counted(entry.rows, 'row')} of "
            f"{counted(len(entry.classes), 'class', 'classes')}, digest {entry.digest[:12]}…"
            for entry in self._released
        )


def _failure(message: Message, reason: str) -> Message:
    return Message(Error(FAILED, one_line(reason)), reply_to=message)


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
