"""How a coordinator or a site is run for good: a systemd unit, or a Compose file, for one kit."""

import json
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedhead.config import RunConfig
from fedhead.data.specs import local_path
from fedhead.errors import UserError
from fedhead.server.kit import CoordinatorKit
from fedhead.server.network.limits import MOST_FILES

HOME = Path("/var/lib/fedhead")
"""Where features, ledgers and runs are kept, on the machine or in the container's volume."""
TABLES = ("csv", "jsonl", "parquet")
NAMED = ("bundled", "python", "timm", "torchvision")
"""Sources whose argument is a name, even if the folder has a file of that name."""


@dataclass(frozen=True)
class Service:
    """A process that a service manager keeps running.

    Attributes:
        name: of the unit, or of the service.
        description: its purpose.
        command: the command to run; a shell's line where it depends on existing files.
        reads: paths that it only reads: the kit, the configuration, the data.
        finished: a file that exists once the work is done; None for a service.
        port: that it listens on for sites; 0 if it does not.
        health: `HOST:PORT` of its health service; empty for none.
    """

    name: str
    description: str
    command: Sequence[str]
    reads: Sequence[Path]
    finished: Path | None = None
    port: int = 0
    health: str = ""


def site_service(kit: Path, data: str, health: str = "", program: str = "fedhead") -> Service:
    """Return the service of a site's client.

    Args:
        kit: of the site.
        data: a data spec; empty if `site.toml` has it.
        health: `HOST:PORT` of its health service; empty for none.
        program: how `fedhead` is called there.

    Raises:
        UserError: if `kit` is not a site's.
    """
    if not (kit / "site.toml").is_file():
        raise UserError(f"{kit} is not a site's kit: it has no site.toml. fedhead provision makes one.")
    kit = kit.resolve()
    declared = data or _data_of(kit / "site.toml")
    spec, reads = _from_anywhere(declared)
    command = [program, "client", "--kit", str(kit), *(["--data", spec] if data or spec != declared else [])]
    return Service(
        name=f"fedhead-{kit.name}",
        description=f"fedhead, site {kit.name}",
        command=[*command, *(["--health", health] if health else [])],
        reads=[kit, *reads],
        health=health,
    )


def coordinator_service(
    kit: Path, run: Path, out: str, port: int = 0, health: str = "", program: str = "fedhead"
) -> Service:
    """Return the service of a coordinator: it completes one run, and resumes it after a restart.

    Args:
        kit: of the coordinator.
        run: the configuration.
        out: the name of the run folder, below `HOME/runs`.
        port: that sites connect to.
        health: `HOST:PORT` of its health service; empty for none.
        program: how `fedhead` is called there.

    Raises:
        UserError: if `kit` is not a coordinator's, the configuration is missing, or it names files that do not exist.
    """
    if not (kit / "coordinator.toml").is_file():
        raise UserError(f"{kit} is not a coordinator's kit: it has no coordinator.toml. fedhead provision makes one.")
    if not run.is_file():
        raise UserError(f"There is no configuration {run}.")
    reads = _read_by(run)
    needed = CoordinatorKit.read(kit).completed(RunConfig.from_toml(run)).min_sites
    kit, run, folder = kit.resolve(), run.resolve(), HOME / "runs" / out
    same = ["--kit", str(kit), "--stopped-ok", *(["--health", health] if health else [])]
    first = shlex.join([program, "server", str(run), "--min-sites", str(needed), "--out", str(folder), *same])
    later = shlex.join([program, "server", "--resume", str(folder), *same])
    known = shlex.join(["test", "-e", str(folder / "run.toml")])
    return Service(
        name="fedhead-coordinator",
        description=f"fedhead, coordinator of {out}",
        command=["/bin/sh", "-c", f"if {known}; then exec {later}; else exec {first}; fi"],
        reads=[kit, run, *reads],
        finished=folder / "result.json",
        port=port,
        health=health,
    )


def queue_service(kit: Path, port: int = 0, health: str = "", program: str = "fedhead") -> Service:
    """Return the service of a coordinator that runs every TOML file put into `HOME/queue`.

    Args:
        kit: of the coordinator.
        port: that sites connect to.
        health: `HOST:PORT` of its health service; empty for none.
        program: how `fedhead` is called there.

    Raises:
        UserError: if `kit` is not a coordinator's.
    """
    kit = CoordinatorKit.read(kit).folder.resolve()
    command = [program, "server", "--queue", str(HOME / "queue"), "--out", str(HOME / "runs"), "--kit", str(kit)]
    return Service(
        name="fedhead-coordinator",
        description=f"fedhead, coordinator of the runs in {HOME / 'queue'}",
        command=[*command, *(["--health", health] if health else [])],
        reads=[kit],
        port=port,
        health=health,
    )


def systemd_unit(service: Service, user: str = "fedhead") -> str:
    """Return the text of a unit file."""
    finished = f"ConditionPathExists=!{service.finished}\n" if service.finished else ""
    return f"""\
# {service.name}.service, for /etc/systemd/system. Before the first start:
#   useradd --system --home-dir {HOME} {user}
#   chown -R {user}: {service.reads[0]}
# then: systemctl enable --now {service.name}; journalctl -fu {service.name}

[Unit]
Description={service.description}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0
{finished}
[Service]
Type=exec
User={user}
StateDirectory={HOME.name}
StateDirectoryMode=0700
WorkingDirectory={HOME}
Environment=FEDHEAD_HOME={HOME} OMP_WAIT_POLICY=passive
ExecStart={" ".join(_for_systemd(part) for part in service.command)}
Restart=on-failure
RestartSec=15
# A coordinator that systemctl stop ended; fedhead stop ends it with 0.
SuccessExitStatus=143
# A mistake in the command, the kit or the data: another start would fail too.
RestartPreventExitStatus=2
TimeoutStopSec=60
LimitNOFILE={MOST_FILES}
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectControlGroups=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictSUIDSGID=yes

[Install]
WantedBy=multi-user.target
"""


def compose_file(service: Service, source: Path) -> str:
    """Return the text of a Compose file that builds fedhead from its checkout `source`."""
    environment = {"FEDHEAD_HOME": str(HOME), "HOME": str(HOME), "OMP_WAIT_POLICY": "passive"}
    volumes: list[dict[str, object]] = [
        *({"type": "bind", "source": str(path), "target": str(path), "read_only": True} for path in service.reads),
        {"type": "volume", "source": "state", "target": str(HOME)},
    ]
    command = list(service.command)
    if service.finished is not None:
        done = shlex.join(["test", "-e", str(service.finished)])
        command = [*command[:-1], f"if {done}; then exit 0; fi; {command[-1]}"]
    lines = [
        f"# {service.name}: docker compose up --build --detach",
        "# The kit has to belong to the user id below, and stay readable for it alone.",
        "name: fedhead",
        "services:",
        f"  {_for_compose(service.name)}:",
        "    image: fedhead",
        "    build:",
        f"      context: {_for_compose(str(source.resolve()))}",
        "      dockerfile: Containerfile",
        "    user: ${FEDHEAD_UID:-10001}:${FEDHEAD_GID:-10001}",
        f"    command: {_for_compose(command)}",
        f"    environment: {_for_compose(environment)}",
        f"    working_dir: {_for_compose(str(HOME))}",
        *(["    ports:", f'      - "{service.port}:{service.port}"'] if service.port else []),
        "    volumes:",
        *(f"      - {_for_compose(volume)}" for volume in volumes),
        "    restart: on-failure" if service.finished else "    restart: unless-stopped",
        "    stop_grace_period: 60s",
        "    ulimits:",
        f"      nofile: {MOST_FILES}",
        "    read_only: true",
        "    tmpfs:",
        "      - /tmp",
        "    cap_drop:",
        "      - ALL",
        "    security_opt:",
        "      - no-new-privileges:true",
        *_health_check(service.health),
        "volumes:",
        "  state: {}",
    ]
    return "\n".join(lines) + "\n"


def _health_check(health: str) -> list[str]:
    if not health:
        return []
    return [
        "    healthcheck:",
        f"      test: {_for_compose(['CMD', 'fedhead', 'status', '--health', health])}",
        "      interval: 5m",
        "      timeout: 30s",
        "      start_period: 2m",
    ]


def _data_of(settings: Path) -> str:
    """Return the data spec that a `site.toml` has, perhaps empty."""
    try:
        return str(tomllib.loads(settings.read_text(encoding="utf-8")).get("data", ""))
    except (OSError, ValueError) as error:
        raise UserError(f"{settings} cannot be read: {error}.") from None


def _read_by(run: Path) -> list[Path]:
    """Return the files and folders that a configuration names.

    Raises:
        UserError: if it names one by a relative path: a service starts elsewhere.
    """
    config = RunConfig.from_toml(run)
    found = []
    for setting in ("weights", "backbone", "classes_from"):
        value = getattr(config, setting)
        spec = f":{value}" if setting == "weights" else value
        absolute, reads = _from_anywhere(spec)
        if reads and absolute != spec:
            raise UserError(
                f"{run} has {setting} = {value!r}, which a service would not find, since it starts in {HOME}; write "
                f"{absolute.removeprefix(':')!r}."
            )
        found += reads
    return found


def _from_anywhere(spec: str) -> tuple[str, list[Path]]:
    """Return a data spec with absolute paths, and the files it reads."""
    source, _, argument = spec.partition(":")
    path = None if source in NAMED else local_path(spec)
    whole = path is not None and Path(argument).expanduser().exists()
    before, _, query = (argument, "", "") if whole else argument.partition("?")
    options, roots = [], []
    for option in query.split("&") if query else ():
        name, _, value = option.partition("=")
        if name == "root":
            roots.append(Path(value).expanduser().resolve())
            option = f"root={roots[-1]}"
        options.append(option)
    reads = roots if path is None else [path, *roots]
    if path is not None and source in TABLES and not roots:
        # The files that a table names are beside it.
        reads = [path.parent]
    named = f"{source}:{path or before}" if argument else spec
    return named + (f"?{'&'.join(options)}" if options else ""), reads


def _for_systemd(text: str) -> str:
    """Quote a word of a command line, in which systemd would replace % and $."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if text and not set(text) & set(" \t'\";\\") else f'"{escaped}"'


def _for_compose(value: str | Sequence[str] | Mapping[str, object]) -> str:
    """Return a value as JSON, which is valid YAML, with Compose's variables escaped."""
    return json.dumps(value, ensure_ascii=False).replace("$", "$$")
