"""Sites that send finite numbers of absurd size: the run goes on without them, names them, and keeps a good head."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.serverapp.strategy import FedAvg

from fedhead.client.app import Handler, Mod, make_app
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.config import RunConfig
from fedhead.data import Samples, load_samples, samples_from_arrays, sources
from fedhead.errors import FedheadError
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import DESCRIBE, EVALUATE, STATISTICS, TRAIN
from fedhead.protocol.messages import Payload
from fedhead.server.app import coordinate
from fedhead.simulations.grid import InProcessGrid
from fedhead.sums.heads import METRICS

SITES = [f"site-{number}" for number in range(10)]
LIAR = "site-4"
CONFIG = RunConfig(
    backbone="bundled:glyphnet",
    classes=[str(digit) for digit in range(10)],
    rounds=3,
    init="nearest-mean",
    diagnose=False,
    min_sites=1,
    round_deadline=60,
)
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def in_process(one_thread: None) -> Iterator[None]:
    with in_process_identity(run_id=1):
        yield


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@sources.register("every-tenth-digit")
def every_tenth_digit(argument: str) -> Samples:
    whole = load_samples("digits")
    rows = range(int(argument), 600, 10)
    images = [whole.read(row) for row in rows]
    return samples_from_arrays(images, whole.labels[list(rows)], classes=whole.classes, spec=f"tenth {argument}")


def lie(action: str, change: Callable[[Arrays], None]) -> Mod:
    """Return a Flower mod that changes the arrays of the answers to an action."""

    def mod(message: Message, context: Context, call_next: Handler) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type != action or reply.has_error():
            return reply
        payload = Payload.from_content(reply.content)
        arrays = {name: np.array(array) for name, array in payload.arrays.items()}
        change(arrays)
        return Message(Payload(payload.values, arrays).to_content(), reply_to=message)

    return mod


class Elsewhere(InProcessGrid):
    """Real sites' apps behind a Grid that is not known to be in this process; one of them lies."""

    in_process = False

    def __init__(
        self, liar: Callable[[Message, Context, Handler], Message] | None, names: Iterable[str] = SITES
    ) -> None:
        sites = {
            name: LocalSite(name, f"every-tenth-digit:{number}", "cpu", guard=Guard.off())
            for number, name in enumerate(names)
        }
        apps = {
            name: make_app(partial(_same, site), [liar] if liar and name == LIAR else [])
            for name, site in sites.items()
        }
        super().__init__(list(sites.values()), apps)

    def together(self, node_ids: Sequence[int]) -> tuple[Mapping[int, Sequence[int]], Sequence[int]]:
        return {}, list(node_ids)


def _same(site: LocalSite, context: Context) -> LocalSite:
    return site


def result(folder: str) -> dict[str, Any]:
    return dict(json.loads((Path(folder) / "result.json").read_text()))


def test_scaled_statistics_of_one_site_in_ten_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    def scale(arrays: Arrays) -> None:
        for name in ("sums", "total"):
            arrays[name] *= 1e6
        arrays["gram"] *= 1e12

    coordinate(CONFIG, Elsewhere(None), "honest")
    coordinate(CONFIG, Elsewhere(lie(STATISTICS, scale)), "attacked")
    honest, attacked = result("honest"), result("attacked")
    assert honest["sites_refused"] == {}
    assert attacked["sites_refused"].keys() == {LIAR}
    assert "check their units" in attacked["sites_refused"][LIAR]
    assert attacked["score"] > honest["score"] - 0.03
    assert f"A reply of {LIAR} is dropped" in caplog.text
    page = Path("attacked/report.html").read_text()
    assert LIAR in page
    assert "check their units" in page


@pytest.mark.parametrize("init", ["lda", pytest.param("cosine", marks=pytest.mark.slow)])
def test_sums_within_the_bars_that_ruin_the_head_are_left_out_by_robust_pooling(init: str) -> None:
    """The liar's features are 30 times as large: the bar is 10,000 times."""

    def scale(arrays: Arrays) -> None:
        for name in ("sums", "total"):
            arrays[name] *= 30
        arrays["gram"] *= 900

    changes = {"init": "nearest-mean", "head": "cosine"} if init == "cosine" else {"init": init}
    config = CONFIG.changed({**changes, "rounds": 0})
    coordinate(config, Elsewhere(None), "honest")
    coordinate(config, Elsewhere(lie(STATISTICS, scale)), "summed")
    coordinate(config.changed({"pooling": "robust"}), Elsewhere(lie(STATISTICS, scale)), "robust")
    coordinate(config.changed({"pooling": "robust"}), Elsewhere(None), "undisturbed")
    honest, summed, robust = result("honest"), result("summed"), result("robust")
    assert summed["sites_refused"] == {}
    assert summed["score"] < honest["score"] - 0.03
    assert robust["sites_refused"].keys() == {LIAR}
    # Measured on the rows of nine sites, and not of ten.
    assert robust["score"] > honest["score"] - 0.03
    assert robust["sites"] == 9
    assert not list(Path("robust/sums").glob(f"{LIAR}*"))
    assert "its sums make the head worse" in Path("robust/report.html").read_text()
    assert result("undisturbed")["sites_refused"] == {}
    heads = [Path(run, "model.safetensors").read_bytes() for run in ("honest", "undisturbed")]
    assert heads[0] == heads[1]


@pytest.mark.parametrize("size", [3e38, 5e8, 1e5])
@pytest.mark.parametrize("names", [SITES, [SITES[0], LIAR]])
def test_a_huge_head_of_one_site_ends_no_run_and_ruins_no_saved_head(size: float, names: list[str]) -> None:
    """Of two sites neither is the median: there a head below the absolute bar passes, and a better one is kept."""

    def blow_up(arrays: Arrays) -> None:
        arrays["weight"][:] = size

    coordinate(CONFIG, Elsewhere(lie(TRAIN, blow_up), names), "attacked")
    lines = [json.loads(line) for line in Path("attacked/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert result("attacked")["score"] > 0.8
    if len(names) > 2 or size > 1e9:
        assert all(line["dropped"].keys() == {LIAR} for line in lines[1:])
        assert LIAR in Path("attacked/report.html").read_text()


def test_absurd_losses_of_one_site_choose_no_head() -> None:
    def lie_about_loss(arrays: Arrays) -> None:
        arrays["metrics"][:, METRICS.index("loss_sum")] = 1e200

    coordinate(CONFIG, Elsewhere(lie(EVALUATE, lie_about_loss)), "attacked")
    coordinate(CONFIG, Elsewhere(None), "honest")
    assert result("attacked")["score"] == pytest.approx(result("honest")["score"], abs=0.05)


class Amplifying(FedAvg):
    """Averages, and moves far in that direction."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.rounds = 0

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        self.rounds += 1
        made, metrics = super().aggregate_train(server_round, replies)
        assert made is not None
        for array in made.values():
            values = array.numpy()
            array.data = type(array)(np.where(np.abs(values) > 1e4, values * np.float32(self.factor), values)).data
        return made, metrics


def test_an_aggregate_that_overflows_is_made_again_without_the_heaviest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The liar stays below the absolute bar, and two sites have no median."""
    strategy = Amplifying(1e30)
    monkeypatch.setattr("fedhead.server.app.build_strategy", lambda config: strategy)

    def blow_up(arrays: Arrays) -> None:
        arrays["weight"][:] = 1e6

    coordinate(CONFIG, Elsewhere(lie(TRAIN, blow_up), [SITES[0], LIAR]), "attacked")
    lines = [json.loads(line) for line in Path("attacked/metrics.jsonl").read_text().splitlines()]
    assert [line["dropped"] for line in lines[1:]] == [{LIAR: "its head makes the aggregate overflow"}] * 3
    assert strategy.rounds == 3
    assert result("attacked")["score"] > 0.8


def claim_rows(message: Message, context: Context, call_next: Handler) -> Message:
    """Claim so many rows that an average, and every accuracy, would be the liar's."""
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    payload = Payload.from_content(reply.content)
    arrays = {name: np.array(array) for name, array in payload.arrays.items()}
    values = dict(payload.values)
    if message.metadata.message_type == DESCRIBE:
        values["rows"] = 2**48
    if message.metadata.message_type == TRAIN:
        arrays["weight"][:] = 0
        arrays["metrics"][:, METRICS.index("examples")] = 2**47
    if message.metadata.message_type == EVALUATE:
        arrays["metrics"][:, [METRICS.index("held_out"), METRICS.index("score")]] = 2**47
        arrays["metrics"][:, METRICS.index("loss_sum")] = 0
    return Message(Payload(values, arrays).to_content(), reply_to=message)


def test_absurd_numbers_of_rows_decide_no_round() -> None:
    coordinate(CONFIG, Elsewhere(claim_rows), "attacked")
    lines = [json.loads(line) for line in Path("attacked/metrics.jsonl").read_text().splitlines()]
    assert all(line["dropped"].keys() == {LIAR} for line in lines[1:])
    assert 0.8 < result("attacked")["score"] < 1
    assert LIAR in Path("attacked/report.html").read_text()


def test_a_reply_that_is_never_usable_does_not_use_up_other_sites_releases() -> None:
    asked: Counter[str] = Counter()

    class Counting(Elsewhere):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            pushed = list(messages)
            asked.update(message.metadata.message_type for message in pushed)
            return super().push_messages(pushed)

    def cut(arrays: Arrays) -> None:
        arrays["weight"] = arrays["weight"][:1]

    names = [*SITES[:2], LIAR]
    config = CONFIG.model_copy(update={"min_sites": len(names), "round_deadline": 2.0})
    with pytest.raises(FedheadError, match="2 of 3 sites answered"):
        coordinate(config, Counting(lie(TRAIN, cut), names), "attacked")
    assert asked[TRAIN] <= 7 * len(names)
