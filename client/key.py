"""A site's keys, made where they are used."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedhead.certificates import site_request
from fedhead.errors import UserError
from fedhead.files import safe_name, write_atomically
from fedhead.secure.masks import new_private_key, public_key
from fedhead.secure.roster import encode

KEY_FILE, SEALING_FILE, REQUEST_FILE = "key.pem", "sealing.key", "request.pem"


def make_key(name: str, folder: Path) -> bytes:
    """Make a site's keys and a request to register them, and return the public key as PEM.

    Args:
        name: of the site.
        folder: takes `key.pem`, by which the site identifies itself, and `sealing.key`, which opens shares of secure
            sums, both readable by their owner only; and `request.pem`.

    Raises:
        UserError: if the name cannot be used, the folder has a key, or it cannot be written.
    """
    if safe_name(name) != name:
        raise UserError(
            f"A site cannot be called {name!r}: names are up to 64 of a-z, 0-9, - and _, and begin with a letter or "
            "digit."
        )
    if (folder / KEY_FILE).exists():
        raise UserError(f"{folder} has a key already. Send its {REQUEST_FILE} again, or choose another --out.")
    key = ec.generate_private_key(ec.SECP256R1())
    sealing = new_private_key()
    write_atomically(folder / REQUEST_FILE, site_request(name, key, public_key(sealing)))
    write_atomically(folder / SEALING_FILE, encode(sealing))
    write_atomically(folder / KEY_FILE, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
