"""Processes of the benchmarks: started with a home and a log of their own, watched, and ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fedhead.data import Samples, samples_from_arrays
from fedhead.errors import FedheadError
from fedhead.simulations.benchmarks.problem import Problem

FEDHEAD = [sys.executable, "-c", "from fedhead.cli import main; main()"]
SITE = "FEDHEAD_BENCHMARK_SITE"
PROBLEM = "FEDHEAD_BENCHMARK_PROBLEM"


def rows_of_site() -> Samples:
    """Return one site's rows, for the benchmark's own processes, which name it in their environment."""
    problem = Problem(**json.loads(os.environ[PROBLEM]))
    everything, first = problem.samples(), int(os.environ[SITE]) * problem.rows
    chosen = range(first, first + problem.rows)
    images = np.stack([np.asarray(everything.read(row)) for row in chosen])
    return samples_from_arrays(images, everything.labels[chosen], classes=everything.classes, spec="benchmark")


DATA = f"python:{__name__}:{rows_of_site.__name__}"
AS_CLIENT = ["client", "--data", DATA, "--min-class-count", "0", "--min-rows", "0", "--device", "cpu"]
CLIENT = [*FEDHEAD, *AS_CLIENT]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in held]


def answers(port: int) -> bool:
    """Return whether a process listens."""
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], log: Path, seconds: float = 180.0) -> None:
    """Wait until something has come about.

    Raises:
        FedheadError: if it does not.
    """
    stop = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > stop:
            said = log.read_text(encoding="utf-8")[-1000:]
            raise FedheadError(f"Flower's processes did not get there within {seconds:.0f} s. {log.name}: {said}")
        time.sleep(0.1)


def environment(problem: Problem, home: Path, number: int) -> dict[str, str]:
    """Return the environment of a process with a home of its own."""
    own = {"FEDHEAD_HOME": str(home / f"home-{number}"), SITE: str(number), PROBLEM: json.dumps(asdict(problem))}
    waits = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **waits, **own}


@contextlib.contextmanager
def started(
    command: Sequence[str], problem: Problem, home: Path, number: int, more: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, and all that it starts, with a home and a log of its own."""
    with (home / f"site-{number}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            env={**environment(problem, home, number), **(more or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def watchable() -> bool:
    """Return whether this system shows the memory of its processes, as Linux does."""
    return Path("/proc/self/stat").is_file()


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has taken so far, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process has had so far (its resident set); 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
