"""TLS of the coordinator: its certificate, and sentences for handshakes that fail."""

import ssl
from collections.abc import Callable
from datetime import UTC, datetime

from fedhead.certificates import valid_until
from fedhead.errors import UserError
from fedhead.files import require_private
from fedhead.server.kit import CoordinatorKit, expiry_warnings

_HANDSHAKES = {
    "HTTP_REQUEST": "it spoke plain HTTP; sites connect with TLS, with the kit that fedhead provision made for them",
    "UNKNOWN_CA": "it does not trust this coordinator's certificate: the site has the kit of another coordinator",
    "CERTIFICATE_EXPIRED": "it finds this coordinator's certificate expired, or its clock is wrong; "
    "fedhead provision --renew makes a new one",
    "BAD_CERTIFICATE": "it does not accept this coordinator's certificate, perhaps since it connects to another name "
    "than the certificate has; fedhead provision --renew --also NAME adds one",
}


def server_context(kit: CoordinatorKit, say: Callable[[str], None]) -> ssl.SSLContext:
    """Return a context with the kit's certificate; it passes the reason of a failed handshake to `say`.

    Raises:
        UserError: if the certificate has expired, or cannot be used.
    """

    class Handshake(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except ssl.SSLError as error:
                reason = next((why for part, why in _HANDSHAKES.items() if part in (error.reason or "")), None)
                if reason is not None:
                    say(f"Refused: a connection, since {reason}.")
                raise

    if valid_until(kit.certificate) < datetime.now(UTC):
        raise UserError(" ".join(expiry_warnings(kit)))
    require_private(kit.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(kit.certificate, kit.key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"{kit.certificate} and {kit.key} cannot be used together ({error}).") from None
    context.sslobject_class = Handshake
    return context
