import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer
import yaml

from fedhead.cli import app
from fedhead.errors import UserError
from fedhead.server.deployment import compose_file, coordinator_service, queue_service, site_service, systemd_unit
from fedhead.server.provision import provision


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    """Kits in a folder whose name systemd, a shell and Compose would each read as something else."""
    folder = tmp_path / "50% of $HOME's kits"
    provision(folder, "coord.example.org:9092", ["hospital-a"])
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text("rounds = 2\n")
    return path


def parsed(arguments: list[str]) -> dict[str, str]:
    """Return the options that the command line takes these arguments for; unknown ones are an error."""
    program, name, *rest = arguments
    assert Path(program).name == "fedhead"
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    return {key: str(value) for key, value in group.commands[name].make_context(name, rest).params.items()}


def started(unit: str) -> list[str]:
    """Return the words that systemd starts."""
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    words = shlex.split(line.removeprefix("ExecStart="))
    return [word.replace("%%", "%").replace("$$", "$") for word in words]


def branches(line: str) -> tuple[list[str], list[str], list[str]]:
    """Return what a coordinator's shell line tests for, and what it runs then and else."""
    condition, _, rest = line.removeprefix("if ").partition("; then exec ")
    later, _, first = rest.removesuffix("; fi").partition("; else exec ")
    return shlex.split(condition), shlex.split(later), shlex.split(first)


def test_a_site_is_started_with_its_kit_and_data(kits: Path, tmp_path: Path) -> None:
    data = tmp_path / "x rays"
    data.mkdir()
    service = site_service(kits / "hospital-a", f"folder:{data}", "127.0.0.1:9093")
    options = parsed(started(systemd_unit(service)))
    assert (options["kit"], options["data"], options["health"]) == (
        str(kits / "hospital-a"),
        f"folder:{data}",
        "127.0.0.1:9093",
    )


def test_a_coordinator_starts_its_run_once_and_goes_on_with_it(kits: Path, run: Path) -> None:
    unit = systemd_unit(coordinator_service(kits / "coordinator", run, "xray"))
    shell, dash, line = started(unit)
    assert (shell, dash) == ("/bin/sh", "-c")
    condition, later, first = branches(line)
    assert condition == ["test", "-e", "/var/lib/fedhead/runs/xray/run.toml"]
    assert parsed(first)["config"] == str(run)
    assert parsed(first)["out"] == "/var/lib/fedhead/runs/xray"
    assert parsed(first)["min_sites"] == "1"
    assert parsed(later)["resume"] == "/var/lib/fedhead/runs/xray"
    assert parsed(first)["kit"] == parsed(later)["kit"] == str(kits / "coordinator")
    assert "ConditionPathExists=!/var/lib/fedhead/runs/xray/result.json\n" in unit


def test_a_coordinator_of_a_queue_has_no_end(kits: Path) -> None:
    service = queue_service(kits / "coordinator", 9092, "127.0.0.1:9093")
    unit = systemd_unit(service)
    options = parsed(started(unit))
    assert (options["queue"], options["out"]) == ("/var/lib/fedhead/queue", "/var/lib/fedhead/runs")
    assert (options["kit"], options["health"]) == (str(kits / "coordinator"), "127.0.0.1:9093")
    assert "ConditionPathExists" not in unit
    assert "restart: unless-stopped" in compose_file(service, kits)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong(kits: Path, run: Path, tmp_path: Path) -> None:
    program = shutil.which("true") or "/bin/true"
    services = [
        site_service(kits / "hospital-a", "digits", program=program),
        coordinator_service(kits / "coordinator", run, "xray", program=program),
    ]
    for service in services:
        path = tmp_path / f"{service.name}.service"
        path.write_text(systemd_unit(service, user="root"))
        ended = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_a_container_has_what_its_command_needs_and_can_change_nothing_of_it(kits: Path, tmp_path: Path) -> None:
    data = tmp_path / "x $rays"
    data.mkdir()
    service = site_service(kits / "hospital-a", f"folder:{data}", "127.0.0.1:9093")
    text = compose_file(service, tmp_path)
    (described,) = yaml.safe_load(text.replace("$$", "$"))["services"].values()
    options = parsed(described["command"])
    assert (options["kit"], options["data"]) == (str(kits / "hospital-a"), f"folder:{data}")
    bound = {volume["target"]: volume for volume in described["volumes"] if volume["type"] == "bind"}
    assert set(bound) == {str(kits / "hospital-a"), str(data)}
    assert all(volume["read_only"] for volume in bound.values())
    assert described["restart"] == "unless-stopped"
    assert parsed(described["healthcheck"]["test"][1:])["health"] == "127.0.0.1:9093"
    assert "$HOME" not in text.replace("$$HOME", "")


def test_data_is_found_from_elsewhere_with_the_files_that_it_names(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kit, data = kits / "hospital-a", tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "all.csv").touch()
    (data / "all.npz").touch()
    Path("MNIST").mkdir()
    for spec, named, reads in (
        ("csv:data/all.csv?label=finding", f"csv:{data}/all.csv?label=finding", [data]),
        ("csv:data/all.csv?root=data", f"csv:{data}/all.csv?root={data}", [data / "all.csv", data]),
        ("npz:data/all.npz", f"npz:{data}/all.npz", [data / "all.npz"]),
        ("torchvision:MNIST?root=data", f"torchvision:MNIST?root={data}", [data]),
        ("digits", "digits", []),
        ("python:wards:rows", "python:wards:rows", []),
    ):
        service = site_service(kit, spec)
        assert (parsed(service.command)["data"], service.reads) == (named, [kit, *reads])
    settings = kit / "site.toml"
    settings.write_text(settings.read_text().replace('data = ""', f'data = "folder:{data}/images"'))
    assert "--data" not in site_service(kit, "").command
    assert site_service(kit, "").reads == [kit, data / "images"]
    settings.write_text(settings.read_text().replace(f"folder:{data}", "folder:data"))
    assert parsed(site_service(kit, "").command)["data"] == f"folder:{data}/images"


def test_a_coordinators_container_listens_and_ends_with_its_run(kits: Path, run: Path, tmp_path: Path) -> None:
    text = compose_file(coordinator_service(kits / "coordinator", run, "xray", 9092), tmp_path)
    (described,) = yaml.safe_load(text.replace("$$", "$"))["services"].values()
    assert described["ports"] == ["9092:9092"]
    assert described["restart"] == "on-failure"
    *_, line = described["command"]
    done, _, rest = line.partition("; then exit 0; fi; ")
    assert done == "if test -e /var/lib/fedhead/runs/xray/result.json"
    assert parsed(branches(rest)[2])["config"] == str(run)


def test_what_a_run_names_is_there_or_told_of(
    kits: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    before = run.read_text()
    run.write_text(f'weights = "{weights}"\n{before}')
    assert coordinator_service(kits / "coordinator", run, "xray").reads == [kits / "coordinator", run, weights]
    run.write_text(f'weights = "weights.safetensors"\n{before}')
    with pytest.raises(UserError, match=f"a service would not find.*write '{weights}'"):
        coordinator_service(kits / "coordinator", run, "xray")


def test_the_kit_has_to_be_of_the_right_kind(kits: Path, run: Path) -> None:
    with pytest.raises(UserError, match="not a site's kit"):
        site_service(kits / "coordinator", "digits")
    with pytest.raises(UserError, match="not a coordinator's kit"):
        coordinator_service(kits / "hospital-a", run, "xray")
    with pytest.raises(UserError, match="no configuration"):
        coordinator_service(kits / "coordinator", run.with_name("none.toml"), "xray")


def test_the_image_is_built_on_a_pinned_base() -> None:
    lines = (Path(__file__).parents[2] / "Containerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    base = next(line for line in lines if line.startswith("ARG BASE="))
    assert bases == ["${BASE}"]
    assert re.fullmatch(r"ARG BASE=docker\.io/library/python:3\.12-slim@sha256:[0-9a-f]{64}", base)
