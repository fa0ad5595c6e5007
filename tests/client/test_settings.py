from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedhead.addresses import is_loopback, split_address
from fedhead.client.settings import (
    ACTIONS,
    Kit,
    insecure_key,
    load_key,
    require_loopback,
)
from fedhead.errors import UserError
from fedhead.protocol.actions import TRAIN
from fedhead.server.provision import provision


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    provision(tmp_path / "kit", "coord.example.org:9092", ["hospital-a"])
    return tmp_path / "kit" / "hospital-a"


def test_a_kit_as_it_is_made_is_read(kit: Path) -> None:
    settings = Kit(kit).settings({"data": "folder:/data/xrays"})
    assert (settings.name, settings.coordinator) == ("hospital-a", "coord.example.org:9092")
    assert settings.data == "folder:/data/xrays"
    assert set(settings.permit.actions) == set(ACTIONS)


def test_flags_lie_over_the_file_limit_by_limit(kit: Path) -> None:
    path = kit / "site.toml"
    path.write_text(path.read_text().replace("min_rows = 20", "min_rows = 400"))
    settings = Kit(kit).settings({"limits": {"min_class_count": 7}, "device": "cpu"})
    assert (settings.limits.min_class_count, settings.limits.min_rows, settings.device) == (7, 400, "cpu")


def test_an_action_that_is_struck_out_is_not_permitted(kit: Path) -> None:
    path = kit / "site.toml"
    lines = [line for line in path.read_text().splitlines() if not line.strip().startswith('"train"')]
    path.write_text("\n".join(lines))
    assert set(Kit(kit).settings({}).permit.actions) == set(ACTIONS) - {TRAIN}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('device = "auto"', 'devise = "auto"', r"no setting 'devise'. Did you mean 'device'"),
        ("min_rows = 20", "min_row = 20", r"no setting 'limits.min_row'. Did you mean 'min_rows'"),
        ("min_rows = 20", "min_rows = -1", r"'limits.min_rows'.*greater than or equal to 0"),
        ('"train",', '"trian",', r"no action 'trian'. Did you mean 'train'"),
        ('"coord.example.org:9092"', '"https://coord.example.org"', "is not HOST:PORT"),
        ("[limits]", "[limits", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(kit: Path, before: str, after: str, words: str) -> None:
    path = kit / "site.toml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(UserError, match=words) as told:
        Kit(kit).settings({})
    assert "site.toml" in str(told.value)


def test_a_private_key_that_others_can_read_is_refused(kit: Path) -> None:
    (kit / "key.pem").chmod(0o640)
    with pytest.raises(UserError, match=r"mode 0640\): chmod 600"):
        Kit(kit)


@pytest.mark.parametrize("name", ["ca.pem", "key.pem"])
def test_a_damaged_or_missing_file_is_named(kit: Path, name: str) -> None:
    content = (kit / name).read_bytes()
    (kit / name).write_bytes(content[: len(content) // 2].replace(b"BEGIN", b"BEG"))
    with pytest.raises(UserError, match=name):
        Kit(kit)
    (kit / name).unlink()
    with pytest.raises(UserError, match=rf"{name} cannot be read.*A kit holds"):
        Kit(kit)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path.touch(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(UserError, match="not an elliptic-curve key"):
        load_key(path)


def test_a_site_without_a_kit_keeps_one_key(tmp_path: Path) -> None:
    first = insecure_key(tmp_path).public_key()
    assert insecure_key(tmp_path).public_key() == first
    assert insecure_key(tmp_path / "other").public_key() != first


@pytest.mark.parametrize("address", ["127.0.0.1:9092", "127.9.9.9:1", "[::1]:9092", "localhost:9092"])
def test_insecure_sites_may_connect_to_this_machine(address: str) -> None:
    require_loopback(address)
    assert is_loopback(split_address(address)[0])


@pytest.mark.parametrize(
    "address", ["10.0.0.1:9092", "0.0.0.0:9092", "coord:9092", "localhost.example.org:9092", "[::]:9092"]
)
def test_other_machines_are_not(address: str) -> None:
    with pytest.raises(UserError, match="goes to this machine alone"):
        require_loopback(address)
