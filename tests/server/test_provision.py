import ssl
import stat
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from fedhead.addresses import split_address
from fedhead.certificates import expiry_warning
from fedhead.cli import app
from fedhead.client.handlers import HANDLERS
from fedhead.config import RunConfig
from fedhead.errors import UserError
from fedhead.protocol.actions import ACTIONS
from fedhead.server.kit import CoordinatorKit, expiry_warnings, validity
from fedhead.server.kit_settings import site_settings
from fedhead.server.provision import add_sites, provision, renew, revoke

SITE_KEYS = ("key.pem", "sealing.key")
SITE_FILES = ("site.toml", "ca.pem", "key.pub", "roster.toml", *SITE_KEYS)


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    out = tmp_path / "kit"
    provision(out, "coord.example.org:9092", ["a", "b"], also=["10.0.0.7"])
    return out


def alternatives(kit: Path) -> list[str]:
    context = ssl.create_default_context(cafile=str(kit / "ca.pem"))
    assert context.cert_store_stats()["x509_ca"] == 1
    decoded = ssl._ssl._test_decode_cert(str(kit / "coordinator" / "server.pem"))  # type: ignore[attr-defined]
    return [name for _, name in decoded["subjectAltName"]]


def test_a_kit_is_complete_and_keys_are_their_owners_alone(kits: Path) -> None:
    files = {str(path.relative_to(kits)): path for path in kits.rglob("*") if path.is_file()}
    site_files = [f"{site}/{name}" for site in "ab" for name in SITE_FILES]
    server_files = ["server.pem", "server.key", "ca.pem", "sites.toml", "coordinator.toml", "roster.toml"]
    assert set(files) == {
        "ca.pem",
        "ca.key",
        "roster.key",
        *site_files,
        *(f"coordinator/{name}" for name in server_files),
    }
    secret = {name for name, path in files.items() if stat.S_IMODE(path.stat().st_mode) == 0o600}
    keys = {"ca.key", "roster.key", "coordinator/server.key", *(f"{site}/{key}" for site in "ab" for key in SITE_KEYS)}
    assert keys <= secret
    assert "a/ca.pem" not in secret


def test_the_register_holds_each_sites_own_key(kits: Path) -> None:
    kit = CoordinatorKit.read(kits / "coordinator")
    assert sorted(kit.sites) == ["a", "b"]
    for name, public in kit.sites.items():
        private = serialization.load_pem_private_key((kits / name / "key.pem").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.curve.name == "secp256r1"
        same = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        assert public == same == (kits / name / "key.pub").read_bytes()


def test_a_site_reads_its_settings_and_may_be_asked_everything(kits: Path) -> None:
    settings = tomllib.loads((kits / "a" / "site.toml").read_text())
    assert settings == {
        "name": "a",
        "coordinator": "coord.example.org:9092",
        "data": "",
        "device": "auto",
        "precision": "float32",
        "activations": "auto",
        "strict_data": False,
        "holdout": 0.2,
        "limits": {"min_class_count": 5, "min_rows": 20, "max_backbone_bytes": 2**32},
        "budget": {"releases_per_day": 5000},
        "privacy": {
            "require": "none",
            "min_sites": 3,
            "max_colluding": 1,
            "epsilon": 0.0,
            "delta": 1e-5,
            "unit": "row",
            "noise": "shared",
        },
        "permit": {"actions": list(ACTIONS)},
        "backbones": {"allow": []},
    }


def test_every_action_can_be_permitted_and_has_a_handler() -> None:
    settings = tomllib.loads(site_settings("ward", "coord.example.org:9092", {}))
    assert settings["permit"]["actions"] == list(ACTIONS) == list(HANDLERS)


def test_the_certificate_names_every_address_and_renewal_keeps_them(kits: Path) -> None:
    names = ["coord.example.org", "10.0.0.7", "localhost", "127.0.0.1"]
    assert alternatives(kits)[:4] == names
    before = (kits / "coordinator" / "server.pem").read_bytes()
    renew(kits, also=["other.example.org"], days=10)
    assert (kits / "coordinator" / "server.pem").read_bytes() != before
    assert {*names, "other.example.org"} <= set(alternatives(kits))


def test_another_address_without_a_new_certificate_is_a_mistake(kits: Path) -> None:
    given = ["provision", "--out", str(kits), "--add-site", "c", "--also", "other.example.org"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert not (kits / "c").exists()
    assert CliRunner().invoke(app, [*given, "--renew"]).exit_code == 0
    assert "other.example.org" in alternatives(kits)


def test_expiry_is_told_before_it_comes_and_after(kits: Path) -> None:
    kit = CoordinatorKit.read(kits / "coordinator")
    until = validity(kit)["Certificate"]
    assert until - datetime.now(UTC) > timedelta(days=729)
    assert expiry_warnings(kit) == []
    assert "in 12 days. Renew it." in expiry_warning(kit.certificate, "Renew it.", until - timedelta(days=12, hours=1))
    assert "expired on" in expiry_warning(kit.certificate, "Renew it.", until + timedelta(days=1))
    renew(kits, days=5)
    assert len(expiry_warnings(kit)) == 1


def test_sites_come_and_go(kits: Path) -> None:
    gone = CoordinatorKit.read(kits / "coordinator").sites["b"]
    add_sites(kits, ["c"])
    revoke(kits, ["b"])
    kit = CoordinatorKit.read(kits / "coordinator")
    assert sorted(kit.sites) == ["a", "c"]
    assert kit.revoked == {gone: "b"}
    assert (kits / "c" / "ca.pem").read_bytes() == (kits / "ca.pem").read_bytes()
    with pytest.raises(UserError, match="'b' is not registered"):
        revoke(kits, ["b"])
    with pytest.raises(UserError, match="move the old kit of b away"):
        add_sites(kits, ["b"])


@pytest.mark.parametrize("name", ["", "Ward 3", "../up", "coordinator", "a/b", "-a", "x" * 65, "é"])
def test_names_that_could_be_a_path_or_be_mistaken_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be called"):
        provision(tmp_path / "kit", "localhost:9092", ["a", name])
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize("address", ["localhost", "localhost:x", ":9092", "::1:9092", "h:70000", "h:0"])
def test_addresses_without_host_or_port_are_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match=r"HOST:PORT"):
        provision(tmp_path / "kit", address, ["a"])


def test_what_is_there_is_not_overwritten(kits: Path) -> None:
    with pytest.raises(UserError, match="not an empty folder"):
        provision(kits, "localhost:9092", ["a"])
    with pytest.raises(UserError, match="already"):
        add_sites(kits, ["a"])


def test_a_folder_that_is_no_kit_is_told_apart(kits: Path) -> None:
    with pytest.raises(UserError, match=r"server\.pem is missing"):
        CoordinatorKit.read(kits / "a")
    registry = kits / "coordinator" / "sites.toml"
    registry.write_text("[sites]\na = 'nonsense'\n")
    with pytest.raises(UserError, match="not a coordinator's kit as"):
        CoordinatorKit.read(kits / "coordinator")
    (kits / "ca.key").unlink()
    with pytest.raises(UserError):
        renew(kits)


def test_addresses_may_be_of_either_kind() -> None:
    assert split_address("[::1]:9092") == ("::1", 9092)
    assert split_address("coord.example.org:1") == ("coord.example.org", 1)


def test_a_run_needs_every_registered_site_unless_it_says_otherwise(kits: Path) -> None:
    kit = CoordinatorKit.read(kits / "coordinator")
    assert kit.completed(RunConfig()).min_sites == 2
    assert kit.completed(RunConfig(min_sites=1)).min_sites == 1
    assert revoke(kits, ["b"]).completed(RunConfig()).min_sites == 1
