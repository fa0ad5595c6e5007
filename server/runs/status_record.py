"""The record of a network run's state: the file `status.json`, typed and checked when it is read."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedhead.server.runs.history import Round


class SiteStatus(BaseModel):
    """The state of a site and of its connection; see `fedhead.server.observer.SiteState`."""

    model_config = ConfigDict(extra="allow")

    standing: str = ""
    rows: int | None = None
    weights: float = 0.0
    reason: str = ""
    connected: bool = False
    seen: float = 0.0
    address: str = ""


class StatusRecord(BaseModel):
    """The state of a run over a network; keys that other versions write are kept.

    Attributes:
        state: as the coordinator wrote it.
        message: why the run waits, or failed.
        run: the name of the run folder.
        rounds: the number of rounds asked for.
        step: the coordinator's current step.
        round: the current round.
        phase: the exchange of the current secure sum; empty without one.
        address: the coordinator's `host:port`.
        host: the coordinator's machine.
        pid: its process.
        process_started: distinguishes the process from a later one with the same id; empty if unknown.
        started: `time.time()` at the start.
        updated: the same when the file was written.
        sites: by name.
        history: the finished rounds.
    """

    model_config = ConfigDict(extra="allow")

    state: Literal["waiting", "running", "finished", "failed", "interrupted"]
    message: str
    run: str = ""
    rounds: int = 0
    step: str = ""
    round: int = 0
    phase: str = ""
    address: str = ""
    host: str
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    process_started: str
    started: float
    updated: float
    sites: dict[str, SiteStatus] = {}
    history: list[Round] = []
