import base64
import random
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from fedhead.certificates import MAX_REQUEST_BYTES, fingerprint, read_request, site_request
from fedhead.cli import app
from fedhead.client.key import make_key
from fedhead.client.settings import Kit
from fedhead.errors import UserError
from fedhead.server.kit import CoordinatorKit
from fedhead.server.provision import provision, revoke
from fedhead.server.site_requests import sign_requests


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    provision(tmp_path / "kit", "coord.example.org:9092", ["a"])
    return tmp_path / "kit"


def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_key_made_at_the_site_and_the_answer_to_its_request_are_a_kit(kits: Path, tmp_path: Path) -> None:
    site = tmp_path / "ward"
    public = make_key("ward", site)
    assert stat.S_IMODE((site / "key.pem").stat().st_mode) == 0o600
    assert sign_requests(kits, [site / "request.pem"]) == {"ward": public}
    answer = kits / "ward"
    assert sorted(path.name for path in answer.iterdir()) == ["ca.pem", "key.pub", "roster.toml", "site.toml"]
    assert CoordinatorKit.read(kits / "coordinator").sites["ward"] == public
    for name in ("ca.pem", "site.toml"):
        (site / name).write_bytes((answer / name).read_bytes())
    kit = Kit(site)
    assert (kit.settings({}).name, kit.settings({}).coordinator) == ("ward", "coord.example.org:9092")
    with pytest.raises(UserError, match="has a key already"):
        make_key("ward", site)


def test_requests_that_cannot_be_registered_change_nothing(kits: Path, tmp_path: Path) -> None:
    shared = key()
    good = written(tmp_path / "good.pem", site_request("good", shared))
    again = written(tmp_path / "again.pem", site_request("again", shared))
    taken = written(tmp_path / "taken.pem", site_request("a", key()))
    reserved = written(tmp_path / "reserved.pem", site_request("coordinator", key()))
    make_key("gone", tmp_path / "gone")
    sign_requests(kits, [tmp_path / "gone" / "request.pem"])
    revoke(kits, ["gone"])
    before = state(kits)
    for requests, words in (
        ([good, again], "each site needs its own"),
        ([good, good], "There is a site 'good' already"),
        ([good, taken], "There is a site 'a' already"),
        ([good, reserved], "is taken"),
        ([good, tmp_path / "gone" / "request.pem"], "was revoked from 'gone'"),
        ([good, tmp_path / "missing.pem"], "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            sign_requests(kits, requests)
    assert state(kits) == before


def signed(name: str, private: object, *more: x509.NameAttribute) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), *more])
    algorithm = None if isinstance(private, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(private, algorithm).public_bytes(Encoding.PEM)  # type: ignore[arg-type]


def certificate() -> bytes:
    private, name, now = key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ward")]), datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    return builder.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n",
        certificate(),
        signed("../escape", key()),
        signed("ward\x1b[2J", key()),
        signed("Ward", key()),
        signed("ward", key(), x509.NameAttribute(NameOID.COMMON_NAME, "other")),
        signed("ward", ec.generate_private_key(ec.SECP384R1())),
        signed("ward", rsa.generate_private_key(65537, 2048)),
        signed("ward", ed25519.Ed25519PrivateKey.generate()),
        b"\n" * MAX_REQUEST_BYTES + site_request("ward", key()),
    ],
)
def test_malformed_requests_are_refused_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no request by fedhead site init") as refused:
        read_request(written(tmp_path / "request.pem", content))
    assert str(refused.value).isprintable()
    # What the parser says is for programmers.
    assert "http" not in str(refused.value)


def test_no_changed_request_is_accepted(tmp_path: Path) -> None:
    whole = site_request("ward", key())
    expected = read_request(written(tmp_path / "request.pem", whole))
    body = x509.load_pem_x509_csr(whole).public_bytes(Encoding.DER)
    generator = random.Random(0)
    for _ in range(300):
        changed = bytearray(body)
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        text = b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(bytes(changed))
        try:
            read = read_request(written(tmp_path / "request.pem", text + b"-----END CERTIFICATE REQUEST-----\n"))
        except UserError:
            continue
        # A signature can be encoded in more than one way; what it signs cannot.
        assert read == expected


def test_the_commands_make_and_sign_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(arguments))
        return result.exit_code, " ".join(click.unstyle(result.output).split())

    status, made = run("site", "init", "ward")
    shown = fingerprint(read_request(Path("ward/request.pem"))[1])
    assert (status, shown in made) == (0, True), made
    (tmp_path / "broken.pem").write_text("x")
    new = ("provision", "--coordinator", "coord.example.org:9092", "--out", "kit")
    status, said = run(*new, "--sign", "ward/request.pem", "--sign", "broken.pem")
    assert (status, Path("kit").exists()) == (2, False), said
    status, said = run(*new, "--sign", "ward/request.pem")
    assert (status, shown in said) == (0, True), said
    assert list(CoordinatorKit.read(Path("kit/coordinator")).sites) == ["ward"]
    assert run("site", "init", "ward")[0] == run("site", "init", "../ward")[0] == run(*new)[0] == 2
