"""`network`: rounds over real sites on this machine, with TLS and registered keys, and the cost of waiting sites.

Three sites are the command's own processes; with a backbone of 100 MB, the coordinator is one too. The many are light:
one process holds them all, each with its own key, connection and rows, so that what is measured is the coordinator.
"""

import contextlib
import http.client
import json
import os
import secrets
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, RecordDict

from fedhead.backbones import load_backbone
from fedhead.backbones.weights import export_weights
from fedhead.client.app import make_app
from fedhead.client.release.guard import Guard
from fedhead.errors import FedheadError
from fedhead.features.store import FeatureStore
from fedhead.flower.fleet_api import MEDIA_TYPE, PULL_MESSAGES
from fedhead.flower.fleet_client import PROCESS_HEADER, WAIT_HEADER, FleetClient
from fedhead.flower.inline import INLINE_HEADER, MOST_INLINE_BYTES
from fedhead.flower.messages import assemble, disassemble
from fedhead.flower.signing import signed_headers
from fedhead.server.flower_app import write_flower_app
from fedhead.server.network.serve import serve
from fedhead.server.network.superlink import SuperLink
from fedhead.server.observer import Observer, Step
from fedhead.server.provision import provision
from fedhead.server.runs.history import Outcome
from fedhead.simulations.benchmarks.measurement import Json, Measurement, app
from fedhead.simulations.benchmarks.problem import CLASSES, Problem, own_home
from fedhead.simulations.benchmarks.processes import (
    CLIENT,
    DATA,
    PROBLEM,
    answers,
    free_ports,
    processor_seconds,
    started,
    wait_for,
    watchable,
)
from fedhead.simulations.benchmarks.shipping import shipping
from fedhead.simulations.sites import SharedData, SimulatedSite
from fedhead.tasks import make_task

HEARTBEAT_SECONDS, RECONNECT_SECONDS = 60.0, 1.0


@app.command()
def network(
    sites: Annotated[int, typer.Option(help="Processes of fedhead client.", min=1)] = 3,
    light: Annotated[int, typer.Option(help="Light sites in one process; 0 leaves them out.", min=0)] = 200,
    rows: Annotated[int, typer.Option(help="At each site.", min=10)] = 50,
    features: Annotated[int, typer.Option(help="Of each row.")] = 512,
    rounds: Annotated[int, typer.Option(help="Over the processes.", min=3)] = 20,
    light_rounds: Annotated[int, typer.Option(help="Over the light sites.", min=3)] = 8,
    stock_rounds: Annotated[int, typer.Option(help="With Flower's own processes; 0 leaves them out.", min=0)] = 3,
    waiting: Annotated[float, typer.Option(help="Seconds to watch coordinator and client while they wait.")] = 20.0,
    ship: Annotated[bool, typer.Option(help="Weights of 100 MB too.")] = True,
    as_json: Json = False,
) -> None:
    """Time rounds over TLS with registered keys, and the coordinator while sites wait."""
    seconds: dict[str, float] = {}
    figures: dict[str, float] = {}
    with own_home() as home:
        problem = Problem(sites=sites, rows=rows, features=features, rounds=rounds)
        round_seconds, idle = with_processes(problem, home / "processes", waiting)
        seconds[f"a round, {sites} processes of fedhead client"] = round_seconds
        if watchable():
            figures["a client that waits, % of a core"] = 100 * idle
        if light:
            problem = Problem(sites=light, rows=rows, features=features, rounds=light_rounds)
            busy, seconds[f"a round, {light} light sites"] = with_light_sites(problem, home / "light", waiting)
            figures[f"the coordinator while {light} sites wait, % of a core"] = 100 * busy
        if stock_rounds:
            problem = Problem(sites=sites, rows=rows, features=features, rounds=stock_rounds)
            seconds[f"a round, {sites} stock SuperNodes"] = with_stock_flower(problem, home / "stock")
        if ship and watchable():
            figures |= shipping(Problem(sites=sites, rows=rows), home / "shipping")
    setting = {"rows": rows, "features": features, "classes": CLASSES, "rounds": rounds, "light_rounds": light_rounds}
    left_out = {} if watchable() else {"what processes take": "it is read from /proc, which only Linux has."}
    title = "Over loopback TLS: median round, and memory of the processes"
    Measurement(title, seconds, setting, figures, units="figure", left_out=left_out).show(as_json=as_json)


def with_processes(problem: Problem, home: Path, waiting: float) -> tuple[float, float]:
    """Return the median round's seconds over processes of `fedhead client`, and a waiting one's share of a core."""
    names = [f"site-{number}" for number in range(problem.sites)]
    link, kits = door(names, home)
    for name in names:
        # Features as wide as here single out rows where these are few.
        settings = kits / name / "site.toml"
        settings.write_text(
            settings.read_text(encoding="utf-8").replace("[backbones]\n", "[backbones]\ncheck_features = false\n"),
            encoding="utf-8",
        )
    allowed = ["--allow-backbone", problem.config().backbone]
    start = [*CLIENT, *allowed, "--coordinator", f"127.0.0.1:{link.port}", "--kit"]
    outcome, watch = run(problem, link, kits, [[*start, str(kits / name)] for name in names], home, waiting)
    return median_round(outcome), watch.busy_sites / problem.sites


def with_stock_flower(problem: Problem, home: Path) -> float:
    """Return the median seconds of a round of the same app under Flower's own SuperLink, SuperNodes and `flwr run`.

    Without TLS, and on the bundled backbone: its processes know nothing of this module's.
    """
    port, *others = free_ports(problem.sites + 1)
    (home / "flwr").mkdir(parents=True)
    (home / "flwr" / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
    )
    config = problem.config(backbone="bundled:pixels", classes=[str(number) for number in range(CLASSES)])
    write_flower_app(home / "app", config.changed({"min_sites": problem.sites}), str(home / "run"))
    with contextlib.ExitStack() as stack:

        def start(number: int, name: str, *arguments: str) -> subprocess.Popen[bytes]:
            commands = Path(sys.executable).parent
            more = {
                # Flower's commands start others by name.
                "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
                "FLWR_HOME": str(home / "flwr"),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
            }
            command = [str(commands / name), *arguments]
            return stack.enter_context(started(command, problem, home, number, more))

        address = ("--insecure", "--host", "127.0.0.1", "--port")
        start(90, "flower-superlink", *address, str(port), "--disable-runtime-dependency-installation")
        log = home / "site-90.log"
        wait_for(lambda: answers(port), log)
        for number, own in enumerate(others):
            data = f'data="{DATA}" device="cpu" min-class-count=0 min-rows=0'
            node = ("--superlink", f"127.0.0.1:{port}", "--node-config", f'site="site-{number}" {data}')
            start(number, "flower-supernode", *address, str(own), *node)
        wait_for(lambda: log.read_text(encoding="utf-8").count("Activated node_id") == problem.sites, log)
        start(91, "flwr", "run", str(home / "app"), "here", "--stream")
        wait_for((home / "run" / "result.json").exists, home / "site-91.log")
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median(float(line["seconds"]) for line in lines[1:])


def with_light_sites(problem: Problem, home: Path, waiting: float) -> tuple[float, float]:
    """Return the share of a core that the coordinator takes while light sites wait, and the median round's seconds."""
    link, kits = door([f"site-{number}" for number in range(problem.sites)], home)
    command = [sys.executable, "-m", __name__, str(link.port), str(kits)]
    outcome, watch = run(problem, link, kits, [command], home, waiting)
    return watch.busy, median_round(outcome)


class Watch(Observer):
    """Holds a run back before its first round, and measures the processor time meanwhile.

    Attributes:
        busy: this process's share of a core.
        busy_sites: that of `processes` together, where it can be seen.
    """

    def __init__(self, seconds: float, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._seconds = seconds
        self._processes = processes
        self.busy = 0.0
        self.busy_sites = 0.0

    def on_step(self, step: Step, server_round: int) -> None:
        if (step, server_round) != ("train", 1):
            return
        began, before, sites_before = time.perf_counter(), time.process_time(), self._of_sites()
        time.sleep(self._seconds)
        took = time.perf_counter() - began
        self.busy = (time.process_time() - before) / took
        self.busy_sites = (self._of_sites() - sites_before) / took

    def _of_sites(self) -> float:
        return sum(processor_seconds(each.pid) for each in self._processes) if watchable() else 0.0


def door(names: Sequence[str], home: Path) -> tuple[SuperLink, Path]:
    """Make kits, and a SuperLink on a free port."""
    kits = home / "kit"
    kit = provision(kits, "localhost:9092", names)
    return SuperLink("127.0.0.1", 0, kit), kits


def run(
    problem: Problem,
    link: SuperLink,
    kits: Path,
    commands: Sequence[Sequence[str]],
    home: Path,
    waiting: float,
    *,
    changes: Mapping[str, object] | None = None,
    observers: Sequence[Observer] = (),
) -> tuple[Outcome, Watch]:
    """Run over the sites that `commands` start, which wait for some seconds before the first round."""
    config = problem.config(min_sites=problem.sites, classes=[str(number) for number in range(CLASSES)])
    config = config.changed(changes or {})
    try:
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(started(command, problem, home, number)) for number, command in enumerate(commands)
            ]
            watch = Watch(waiting, processes)
            outcome = serve(config, link, out=home / "run", observers=[watch, *observers]).outcome
    except FedheadError as error:
        said = "".join(path.read_text(encoding="utf-8")[-500:] for path in sorted(home.glob("site-*.log"))[:3])
        raise FedheadError(f"{error} The sites said: {said}") from None
    lost = {name: reason for line in outcome.history for name, reason in line.dropped.items()}
    if lost or len(outcome.participants) < problem.sites:
        raise FedheadError(f"Not every site took part in every round: {lost or outcome.refused}.")
    return outcome, watch


def median_round(outcome: Outcome) -> float:
    """Return the median seconds of a round."""
    return statistics.median(line.seconds for line in outcome.history[1:])


class LightSite(threading.Thread):
    """A site with a connection, a key and rows of its own, and neither process nor HTTP library of its own."""

    def __init__(self, site: SimulatedSite, kit: Path, port: int, context: ssl.SSLContext) -> None:
        super().__init__(name=site.name, daemon=True)
        key = serialization.load_pem_private_key((kit / "key.pem").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._process = secrets.token_hex(16)
        self._app = make_app(lambda _: site)
        self._line = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=120)
        self._fleet = FleetClient(f"127.0.0.1:{port}", key, (kit / "ca.pem").read_bytes(), 0, site.name)
        setattr(self._fleet._client, "_unary_unary", self._request)  # noqa: B010

    def _request(self, *, path: str, request: Any, response_type: Any, **_: Any) -> Any:
        body = request.SerializeToString()
        headers = {"content-type": MEDIA_TYPE.decode(), PROCESS_HEADER: self._process}
        if path.endswith(PULL_MESSAGES):
            headers |= {WAIT_HEADER: "25", INLINE_HEADER: str(MOST_INLINE_BYTES)}
        self._line.request("POST", path, body, headers | signed_headers(self._key, path, body, headers))
        response = self._line.getresponse()
        body = response.read()
        if response.status != 200:
            raise FedheadError(f"{path} is answered with {response.status}: {body.decode()[:200]}")
        return response_type.FromString(body)

    def run(self) -> None:
        """Answer until the coordinator is gone; reconnect where it is only slow."""
        context = Context(1, 0, {}, RecordDict(), {})
        while True:
            try:
                self._serve(context)
            except ConnectionRefusedError:
                return
            except (OSError, http.client.HTTPException):
                self._line.close()
                time.sleep(RECONNECT_SECONDS)

    def _serve(self, context: Context) -> None:
        node = self._fleet.activate(HEARTBEAT_SECONDS)
        while True:
            # Each pull counts as a heartbeat.
            self._answer(node, context)

    def _answer(self, node: int, context: Context) -> None:
        delivery = self._fleet.pull(node)
        if delivery is None:
            return
        parts = dict(delivery.contents)
        apart = [each for each in delivery.objects if each not in parts]
        for each in apart:
            parts[each] = self._fleet.pull_object(delivery.message, each) or b""
        message = assemble(delivery, parts)
        if apart:
            self._fleet.confirm(message)
        reply = self._app(message, context)
        tree, objects = disassemble(reply)
        session, wanted = self._fleet.push(reply, tree, 0.0, objects)
        for object_id in wanted:
            self._fleet.push_object(reply, session, object_id, objects[object_id])


def light_sites(port: int, kits: Path) -> None:
    """Be all the light sites, until the coordinator is gone."""
    problem = Problem(**json.loads(os.environ[PROBLEM]))
    samples = problem.samples()
    backbone = load_backbone(f"benchmark:{problem.features}")
    # A simulated site takes the weights that it was sent from where the coordinator wrote them: here, another home.
    export_weights(backbone)
    task = make_task("classification", samples.classes)
    shared = SharedData(backbone, FeatureStore.open(backbone, samples), samples.labels, Guard(0, 0), task)
    context = ssl.create_default_context(cafile=str(kits / "ca.pem"))
    rows = np.arange(problem.sites * problem.rows).reshape(problem.sites, problem.rows)
    sites = []
    for number in range(problem.sites):
        name = f"site-{number}"
        sites.append(LightSite(SimulatedSite(name, rows[number], shared), kits / name, port, context))
        sites[-1].start()
    for site in sites:
        site.join()


if __name__ == "__main__":
    light_sites(int(sys.argv[1]), Path(sys.argv[2]))
