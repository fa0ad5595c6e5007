import hashlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedhead.client.app import app, make_app
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.local_site import LocalSite
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import FedheadError
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import DESCRIBE, EVALUATE, INSTALL, TRAIN
from fedhead.protocol.messages import PROTOCOL, Description, Payload, WeightsChunk
from fedhead.simulations import RunResult, simulate
from fedhead.sums.heads import METRICS, SCORE, HeadSums

ROWS = 120
SITE = "site-0"
CONFIG = RunConfig(backbone="bundled:glyphnet", weights="random", seed=11, init="zeros", rounds=2)
"""Weights that no package carries, so that they must be installed."""
OWN = {"device": "cpu", "backbones": CONFIG.backbone}
"""What sites decide by themselves: where they compute, and that they accept any weights of the backbone."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with in_process_identity(run_id=1):
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's folder: a sub-folder of images per class."""
    root = tmp_path_factory.mktemp("data") / "scans"
    digits = load_samples("digits")
    for row in range(ROWS):
        folder = root / f"digit-{digits.labels[row]}"
        folder.mkdir(parents=True, exist_ok=True)
        digits.read(row).save(folder / f"{row:03}.png")
    return root


class Tap(ClientApp):
    """A site's own app, with a record of what the coordinator sends and what it answers."""

    def __init__(self, images: Path, name: str = SITE) -> None:
        super().__init__()
        self.config = {"site": name, "data": f"folder:{images}", **OWN}
        self.asked: list[tuple[str, RecordDict]] = []
        self.answered: list[RecordDict] = []
        self.context: Context | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        self.context = self.context or fresh_context(self.config)
        self.asked.append((message.metadata.message_type, message.content))
        reply = app(message, self.context)
        self.answered.append(reply.content)
        return reply

    @property
    def actions(self) -> list[str]:
        return [action for action, _ in self.asked]

    def content(self, action: str) -> RecordDict:
        return next(content for asked, content in self.asked if asked == action)

    def answer(self, action: str) -> RecordDict:
        return self.answered[self.actions.index(action)]


def fresh_context(config: Mapping[str, Any]) -> Context:
    return Context(1, 7, dict(config), RecordDict(), {})


def ask(action: str, content: RecordDict, context: Context, answering: ClientApp = app) -> RecordDict:
    return answering(Message(content, 7, action), context).content


@pytest.fixture(scope="module")
def told(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tap, RunResult]:
    """What a coordinator tells a site in a run, from a machine that holds nothing yet."""
    tap = Tap(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDHEAD_HOME", str(tmp_path_factory.mktemp("new-machine")))
        result = simulate(
            CONFIG, f"folder:{images}", [range(ROWS)], apps={SITE: tap}, out=tmp_path_factory.mktemp("run") / "out"
        )
        again = Tap(images)
        simulate(
            CONFIG, f"folder:{images}", [range(ROWS)], apps={SITE: again}, out=tmp_path_factory.mktemp("2") / "out"
        )
    assert INSTALL in tap.actions
    assert INSTALL not in again.actions
    return tap, result


def changed(content: RecordDict, arrays: Mapping[str, npt.NDArray[Any]] | None = None, **values: Any) -> RecordDict:
    payload = Payload.from_content(content)
    return Payload({**payload.values, **values}, {**payload.arrays, **(arrays or {})}).to_content()


def results(content: RecordDict) -> HeadSums:
    arrays = Payload.from_content(content).arrays
    return HeadSums.from_arrays(arrays, HeadSums({name: head for name, head in arrays.items() if name != "metrics"}))


@pytest.fixture
def described(told: tuple[Tap, RunResult], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """The context of a site that was told of the run, and holds the weights."""
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    tap, _ = told
    context = fresh_context({"site": "here", "data": f"folder:{images}", **OWN})
    ask(DESCRIBE, tap.content(DESCRIBE), context)
    ask(INSTALL, tap.content(INSTALL), context)
    return context


# A run.


def test_a_site_is_described_installed_trained_and_evaluated(told: tuple[Tap, RunResult]) -> None:
    tap, result = told
    assert tap.actions[:2] == [DESCRIBE, INSTALL]
    assert tap.actions.count(TRAIN) == 2
    assert tap.actions.count(EVALUATE) == 1
    assert tap.actions.index(EVALUATE) > max(np.flatnonzero([action == TRAIN for action in tap.actions]))
    first = Description.from_content(tap.answer(DESCRIBE))
    assert (first.site, first.rows, first.has_weights, first.refusal) == (SITE, ROWS, False, "")
    second = Description.from_content(tap.answer(INSTALL))
    assert (second.has_weights, second.refusal) == (True, "")
    assert result.outcome.refused == {}


def test_a_real_site_makes_the_head_that_a_simulated_one_makes(told: tuple[Tap, RunResult], images: Path) -> None:
    _, real = told
    simulated = simulate(CONFIG, f"folder:{images}", [range(ROWS)], out="out")
    for name, value in simulated.model.head.state_dict().items():
        torch.testing.assert_close(real.model.head.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert [(line.score, line.bytes_down) for line in real.history] == [
        (line.score, line.bytes_down) for line in simulated.history
    ]
    # A real site describes its release steps before the first round.
    assert real.history[0].bytes_up > simulated.history[0].bytes_up
    assert [line.bytes_up for line in real.history[1:]] == [line.bytes_up for line in simulated.history[1:]]
    assert real.sites[SITE].correct == simulated.sites[SITE].correct
    assert real.sites[SITE].loss_sum == pytest.approx(simulated.sites[SITE].loss_sum)


def test_another_process_answers_alike(told: tuple[Tap, RunResult], images: Path, described: Context) -> None:
    tap, _ = told
    accepted = AcceptedBackbones(frozenset({CONFIG.backbone}))
    site = LocalSite(SITE, f"folder:{images}", device="cpu", backbones=accepted)
    own = make_app(lambda context: site)
    context = fresh_context({})
    for (action, content), answer in zip(tap.asked, tap.answered, strict=True):
        if action in (DESCRIBE, INSTALL):
            ask(action, content, context, own)
            continue
        expected, found = Payload.from_content(answer), Payload.from_content(ask(action, content, context, own))
        assert expected.arrays.keys() == found.arrays.keys()
        for name, array in expected.arrays.items():
            np.testing.assert_allclose(found.arrays[name], array, rtol=1e-5, atol=1e-6)


def test_training_reports_how_many_rows_it_was_and_how_the_head_did(told: tuple[Tap, RunResult]) -> None:
    tap, _ = told
    metrics = dict(zip(METRICS, results(tap.answer(TRAIN)).metrics.tolist(), strict=True))
    assert metrics["examples"] + metrics["held_out"] == ROWS
    assert metrics["loss_sum"] == pytest.approx(metrics["held_out"] * np.log(10), rel=1e-4)
    assert results(tap.answer(EVALUATE)).metrics[SCORE] > metrics["held_out"] / 3


def test_the_state_that_a_site_keeps_is_small(told: tuple[Tap, RunResult]) -> None:
    tap, _ = told
    assert tap.context is not None
    size = sum(
        len(value) if isinstance(value, bytes | str) else 8
        for record in tap.context.state.config_records.values()
        for value in record.values()
    )
    assert 0 < size < 50_000
    assert not tap.context.state.array_records


# What a site refuses, and in what words.


def refusal_of(content: RecordDict, context: Context) -> str:
    description = Description.from_content(ask(DESCRIBE, content, context))
    assert description.site == "here"
    return description.refusal


def test_a_site_that_holds_the_weights_has_nothing_to_refuse(told: tuple[Tap, RunResult], described: Context) -> None:
    tap, _ = told
    assert refusal_of(tap.content(DESCRIBE), described) == ""


def test_another_protocol_is_refused_in_words(told: tuple[Tap, RunResult], described: Context) -> None:
    tap, _ = told
    refusal = refusal_of(changed(tap.content(DESCRIBE), protocol=PROTOCOL + 1), described)
    assert f"protocol {PROTOCOL} and the coordinator {PROTOCOL + 1}" in refusal
    assert "install" in refusal
    # A later coordinator may also say things of which this site has never heard.
    assert refusal_of(changed(tap.content(DESCRIBE), protocol=PROTOCOL + 1, colour="blue"), described) == refusal


def test_a_class_that_the_run_does_not_know_is_refused_and_logged_by_file(
    told: tuple[Tap, RunResult], described: Context, caplog: pytest.LogCaptureFixture
) -> None:
    tap, _ = told
    classes = [f"digit-{label}" for label in range(10) if label != 4]
    refusal = refusal_of(changed(tap.content(DESCRIBE), classes=classes), described)
    assert "class that this run does not know" in refusal
    assert "scans/digit-4/004.png is of class 'digit-4'" in caplog.text
    assert "digit-3, digit-5" in caplog.text
    # What leaves the site names no file of it.
    assert "004" not in refusal


def test_a_backbone_of_texts_is_refused_by_a_site_of_images_before_weights_are_sent(
    told: tuple[Tap, RunResult], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    context = fresh_context({"site": "here", "data": f"folder:{images}", **OWN})
    content = changed(told[0].content(DESCRIBE), kind="text", backbone="hf:a/name")
    assert "hf:a/name takes texts, but the data contains images" in refusal_of(content, context)


def test_other_features_of_the_probe_are_refused(told: tuple[Tap, RunResult], described: Context) -> None:
    tap, _ = told
    probe = Payload.from_content(tap.content(DESCRIBE)).arrays["probe"]
    assert refusal_of(changed(tap.content(DESCRIBE), {"probe": probe * np.float32(1.0005)}), described) == ""
    for other in (probe * np.float32(1.01), probe + np.float32(1)):
        assert "gives other features here" in refusal_of(changed(tap.content(DESCRIBE), {"probe": other}), described)
    nothing = np.full_like(probe, np.nan)
    assert "not finite" in refusal_of(changed(tap.content(DESCRIBE), {"probe": nothing}), described)


def test_a_backbone_built_or_fed_otherwise_is_refused(told: tuple[Tap, RunResult], described: Context) -> None:
    tap, _ = told
    refusal = refusal_of(changed(tap.content(DESCRIBE), backbone_digest="0" * 64), described)
    assert "fed or built differently here" in refusal


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"backbone": "bundled:glyfnet"}, "Did you mean 'glyphnet'"),
        ({"layer": "third"}, "penultimate"),
    ],
)
def test_a_backbone_that_does_not_exist_here_is_refused(
    told: tuple[Tap, RunResult], described: Context, values: dict[str, str], words: str
) -> None:
    tap, _ = told
    unknown: dict[str, Any] = {"weights_digest": "1" * 64, "backbone_digest": "2" * 64, **values}
    assert words in refusal_of(changed(tap.content(DESCRIBE), **unknown), described)


def test_weights_that_are_not_what_was_promised_are_not_kept(
    told: tuple[Tap, RunResult], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap, _ = told
    home = tmp_path / "home"
    monkeypatch.setenv("FEDHEAD_HOME", str(home))
    context = fresh_context({"site": "careful", "data": f"folder:{images}", **OWN})
    ask(DESCRIBE, tap.content(DESCRIBE), context)
    good = WeightsChunk.from_payload(Payload.from_content(tap.content(INSTALL)))
    flipped = good.data.copy()
    flipped[-1] ^= 1
    for bad in (flipped, good.data[:50], np.zeros(3, np.uint8)):
        file = hashlib.sha256(bad).hexdigest()
        for claimed in {good.file, file}:
            sent = WeightsChunk(claimed, len(bad), 0, bad).to_content()
            with pytest.raises(FedheadError, match="The weights that arrived"):
                ask(INSTALL, sent, context)
            assert not list(home.glob("weights/*"))
    for impossible in ({"offset": -1}, {"offset": 1}, {"file": "../../etc"}, {"size": "many"}):
        with pytest.raises(FedheadError, match=r"weights file|do not fit"):
            ask(INSTALL, changed(tap.content(INSTALL), **impossible), context)
    half = len(good.data) // 2
    for start, received in ((0, half), (0, half), (half + 1, half)):
        sent = WeightsChunk(good.file, good.size, start, good.data[start : start + half]).to_content()
        answer = Description.from_content(ask(INSTALL, sent, context))
        assert (answer.received, answer.has_weights) == (received, False)
    rest = WeightsChunk(good.file, good.size, half, good.data[half:]).to_content()
    assert Description.from_content(ask(INSTALL, rest, context)).has_weights
    assert [path.suffix for path in home.glob("weights/*")] == [".safetensors"]


@pytest.mark.parametrize("action", [INSTALL, TRAIN, EVALUATE])
def test_a_site_that_was_told_nothing_says_so(told: tuple[Tap, RunResult], images: Path, action: str) -> None:
    tap, _ = told
    context = fresh_context({"site": "new", "data": f"folder:{images}", **OWN})
    with pytest.raises(FedheadError, match="no manifest of the run"):
        ask(action, tap.content(action), context)


@pytest.mark.parametrize("action", [TRAIN, EVALUATE])
def test_a_head_of_another_form_is_refused(told: tuple[Tap, RunResult], described: Context, action: str) -> None:
    tap, _ = told
    weight = Payload.from_content(tap.content(action)).arrays["weight"]
    for other in (weight[:, :-1], weight.astype(np.float64), np.full_like(weight, np.nan)):
        with pytest.raises(FedheadError, match="'weight'"):
            ask(action, changed(tap.content(action), {"weight": other}), described)
    with pytest.raises(FedheadError):
        ask(action, RecordDict(), described)


@pytest.mark.parametrize("missing", ["site", "data"])
def test_a_node_config_must_name_site_and_data(told: tuple[Tap, RunResult], images: Path, missing: str) -> None:
    tap, _ = told
    config = {"site": "here", "data": f"folder:{images}"}
    del config[missing]
    with pytest.raises(FedheadError, match=f"lacks '{missing}'.*--node-config"):
        ask(DESCRIBE, tap.content(DESCRIBE), fresh_context(config))


def test_data_that_is_not_there_is_told_in_the_sites_own_log(
    told: tuple[Tap, RunResult], caplog: pytest.LogCaptureFixture
) -> None:
    tap, _ = told
    with pytest.raises(FedheadError, match="The site cannot do it; its own log says why") as refused:
        ask(DESCRIBE, tap.content(DESCRIBE), fresh_context({"site": "here", "data": "folder:nowhere"}))
    assert "nowhere" not in str(refused.value)
    assert "There is no folder nowhere" in caplog.text


def test_a_site_decides_whether_unreadable_files_stop_it(
    told: tuple[Tap, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    digits = load_samples("digits")
    chosen = np.flatnonzero(digits.labels[:150] < 3).tolist()
    for row in chosen:
        folder = tmp_path / "scans" / f"digit-{digits.labels[row]}"
        folder.mkdir(parents=True, exist_ok=True)
        digits.read(row).save(folder / f"{row}.png")
    (tmp_path / "scans" / "digit-2" / "0.png").write_bytes(b"no image")
    tap, _ = told
    config = {"site": "here", "data": f"folder:{tmp_path / 'scans'}", **OWN}
    lenient = fresh_context(config)
    strict = fresh_context({**config, "strict-data": True})
    for context in (strict, lenient):
        ask(DESCRIBE, tap.content(DESCRIBE), context)
        ask(INSTALL, tap.content(INSTALL), context)
    with pytest.raises(FedheadError, match="The site cannot do it; its own log says why"):
        ask(TRAIN, tap.content(TRAIN), strict)
    assert results(ask(TRAIN, tap.content(TRAIN), lenient)).rows == len(chosen)


def test_a_run_goes_on_without_a_site_that_refuses(images: Path) -> None:
    rows = np.array_split(np.arange(ROWS), 3)
    config = RunConfig(init="zeros", rounds=1)
    outcome = simulate(config, f"folder:{images}", rows, apps={"site-1": Refusing()}).outcome
    assert list(outcome.participants) == ["site-0", "site-2"]
    assert outcome.refused == {"site-1": "This site is closed on Sundays."}


class Refusing(ClientApp):
    def __call__(self, message: Message, context: Context) -> Message:
        refusal = Description(site="site-1", refusal="This site is closed on Sundays.")
        return Message(Payload(refusal.model_dump()).to_content(), reply_to=message)


def test_importing_the_app_does_not_import_torch() -> None:
    program = "import sys, fedhead.client.app; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"
