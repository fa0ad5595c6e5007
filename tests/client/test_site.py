import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedhead.client.app import make_app
from fedhead.client.connection import Connection
from fedhead.client.local_site import WARM, LocalSite
from fedhead.client.release.guard import Guard
from fedhead.client.release.ledger import Ledger, read_ledger
from fedhead.client.settings import SiteSettings
from fedhead.client.site import SiteProcess
from fedhead.client.site_locks import only_process
from fedhead.config import RunConfig
from fedhead.data import load_samples
from fedhead.errors import UserError
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import DESCRIBE, INSTALL, STATISTICS, TRAIN
from fedhead.protocol.messages import Description, Payload
from fedhead.simulations import simulate
from fedhead.sums.heads import HeadSums
from fedhead.wording import one_line

ROWS = 120
SITE = "site-0"
RUN = 77


@pytest.fixture(autouse=True)
def in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with in_process_identity(run_id=RUN):
        yield


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scans"
    digits = load_samples("digits")
    for row in range(ROWS):
        folder = root / f"digit-{digits.labels[row]}"
        folder.mkdir(parents=True, exist_ok=True)
        digits.read(row).save(folder / f"{row:03}.png")
    return root


@pytest.fixture(scope="module")
def asked(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, RecordDict]:
    """What a coordinator asks a site for in a run, by action; of each the first."""
    contents: dict[str, RecordDict] = {}
    site = LocalSite(SITE, f"folder:{scans}", "cpu", ledger=Ledger(tmp_path_factory.mktemp("ledger") / "site.jsonl"))
    own = make_app(lambda context: site)

    class Recorder(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            contents.setdefault(message.metadata.message_type, message.content)
            return own(message, context)

    out = tmp_path_factory.mktemp("run") / "out"
    simulate(RunConfig(rounds=1), f"folder:{scans}", [range(ROWS)], apps={SITE: Recorder()}, out=out)
    return contents


def process(scans: Path, folder: Path, **settings: Any) -> SiteProcess:
    own = SiteSettings(name=SITE, coordinator="127.0.0.1:9092", data=f"folder:{scans}", **settings)
    guard = Guard(own.limits.min_class_count, own.limits.min_rows)
    site = LocalSite(own.name, own.data, "cpu", guard=guard, ledger=Ledger(folder / "ledger.jsonl"))
    unused = Connection.__new__(Connection)
    return SiteProcess(own, site, unused, folder)


def message(action: str, content: RecordDict) -> Message:
    return Message(content, 5, action)


def changed(content: RecordDict, **values: Any) -> RecordDict:
    payload = Payload.from_content(content)
    return Payload({**payload.values, **values}, payload.arrays).to_content()


def reason(reply: Message) -> str:
    assert reply.has_error()
    return str(reply.error.reason)


def released(folder: Path) -> list[str]:
    path = folder / "ledger.jsonl"
    return [entry.action for entry in read_ledger(path)] if path.exists() else []


def test_a_killed_process_goes_on_where_it_was(scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path) -> None:
    before = process(scans, tmp_path)
    for action in asked:
        if action == TRAIN:
            break
        assert before.answer(message(action, asked[action])).has_content()
    undisturbed = before.answer(message(TRAIN, asked[TRAIN])).content
    after = process(scans, tmp_path).answer(message(TRAIN, asked[TRAIN])).content
    like = Payload.from_content(asked[TRAIN]).arrays
    answers = [Payload.from_content(content).arrays for content in (undisturbed, after)]
    heads = [HeadSums.from_arrays(arrays, HeadSums(like)) for arrays in answers]
    for name in like:
        np.testing.assert_array_equal(heads[0].heads[name], heads[1].heads[name])


def test_what_a_run_told_the_site_is_of_that_run_alone(
    scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path
) -> None:
    one = process(scans, tmp_path)
    assert one.answer(message(DESCRIBE, asked[DESCRIBE])).has_content()
    with in_process_identity(run_id=RUN + 1):
        assert "no manifest" in reason(one.answer(message(STATISTICS, asked[STATISTICS])))


def test_only_the_latest_runs_are_kept(scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path) -> None:
    one = process(scans, tmp_path)
    for run in range(12):
        with in_process_identity(run_id=run):
            assert one.answer(message(DESCRIBE, asked[DESCRIBE])).has_content()
    assert len(list((tmp_path / "runs").glob("*.state"))) == 8


def test_damaged_memory_of_a_run_is_as_none(scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path) -> None:
    process(scans, tmp_path).answer(message(DESCRIBE, asked[DESCRIBE]))
    (state,) = (tmp_path / "runs").glob("*.state")
    state.write_bytes(state.read_bytes()[:-100])
    assert "describe it again" in reason(process(scans, tmp_path).answer(message(STATISTICS, asked[STATISTICS])))


# A coordinator that asks for what the site does not give.


def test_an_action_that_is_not_permitted_is_refused(
    scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = process(scans, tmp_path, permit={"actions": [DESCRIBE, INSTALL, STATISTICS]})
    assert one.answer(message(DESCRIBE, asked[DESCRIBE])).has_content()
    assert one.answer(message(STATISTICS, asked[STATISTICS])).has_content()
    assert reason(one.answer(message(TRAIN, asked[TRAIN]))) == "site-0 does not permit train."
    assert "query.dump" in reason(one.answer(message("query.dump", asked[STATISTICS])))
    assert released(tmp_path) == [DESCRIBE, STATISTICS]
    assert "site.toml does not permit it" in caplog.text


@pytest.mark.parametrize("wish", [{"min_rows": 0}, {"min_class_count": 0}, {"data": "folder:/etc"}, {"device": "cuda"}])
def test_lower_limits_or_other_data_are_refused(
    scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path, wish: dict[str, Any]
) -> None:
    one = process(scans, tmp_path)
    description = Description.from_content(one.answer(message(DESCRIBE, changed(asked[DESCRIBE], **wish))).content)
    assert next(iter(wish)) in description.refusal
    assert "decides by itself" in description.refusal
    assert one.answer(message(DESCRIBE, asked[DESCRIBE])).has_content()
    assert "decides by itself" in reason(one.answer(message(STATISTICS, changed(asked[STATISTICS], **wish))))
    assert released(tmp_path) == [DESCRIBE, DESCRIBE]


def test_the_limits_of_the_site_hold(scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path) -> None:
    one = process(scans, tmp_path, limits={"min_rows": ROWS + 1})
    description = Description.from_content(one.answer(message(DESCRIBE, asked[DESCRIBE])).content)
    assert f"asks for {ROWS + 1} or more" in description.refusal
    assert (description.rows, description.steps) == (0, ())
    assert "no manifest" in reason(one.answer(message(STATISTICS, asked[STATISTICS])))
    assert released(tmp_path) == [DESCRIBE]


def test_what_goes_wrong_inside_names_no_file_outside(
    scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "ward-7"
    shutil.copytree(scans, data)
    one = process(data, tmp_path)
    shutil.rmtree(data)
    told = reason(one.answer(message(DESCRIBE, asked[DESCRIBE])))
    assert told == "The site cannot do it; its own log says why."
    assert "ward-7" in caplog.text
    for path in scans.glob("*/*"):
        damaged = data / path.relative_to(scans)
        damaged.parent.mkdir(parents=True, exist_ok=True)
        damaged.write_bytes(b"no image")
    assert one.answer(message(DESCRIBE, asked[DESCRIBE])).has_content()
    told = reason(one.answer(message(STATISTICS, asked[STATISTICS])))
    assert told == "Its data cannot be turned into features; the site's own log says why."
    assert ".png" in caplog.text


def test_rows_that_differ_by_few_are_told_at_the_site_alone(
    scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "ward-7"
    shutil.copytree(scans, data)
    one = process(data, tmp_path)
    for action in (DESCRIBE, STATISTICS):
        assert one.answer(message(action, asked[action])).has_content()
    for held_out_or_not in sorted(data.glob("digit-0/*"))[:2]:
        held_out_or_not.unlink()
    # Without its atoms, the site relies on the ledger alone.
    one._site.atoms.path.unlink()
    assert one.answer(message(DESCRIBE, asked[DESCRIBE])).has_content()
    told = reason(one.answer(message(STATISTICS, asked[STATISTICS])))
    assert "differ by too few" in told
    assert not any(letter.isdigit() for letter in told)
    assert "of class 'digit-0' differ from those" in caplog.text


def test_a_handler_that_breaks_ends_its_message_alone(
    scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = process(scans, tmp_path)

    def broken(*args: object) -> None:
        raise ZeroDivisionError("patient 7")

    with monkeypatch.context() as patch:
        patch.setattr(LocalSite, "check", broken)
        told = reason(one.answer(message(DESCRIBE, asked[DESCRIBE])))
    assert "ZeroDivisionError" in told
    assert "patient" not in told
    assert one.answer(message(DESCRIBE, asked[DESCRIBE])).has_content()


# Warm, bounded, and one at a time.


def test_a_site_looks_at_its_data_again_with_each_run(
    scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path
) -> None:
    data = tmp_path / "ward-7"
    shutil.copytree(scans, data)
    one = process(data, tmp_path)
    one.answer(message(DESCRIBE, asked[DESCRIBE]))
    for row, path in enumerate(sorted(scans.glob("digit-1/*"))):
        shutil.copy(path, data / "digit-1" / f"more-{row}.png")
    described = Description.from_content(one.answer(message(DESCRIBE, asked[DESCRIBE])).content)
    assert described.rows == ROWS + len(list(scans.glob("digit-1/*")))


def test_features_stay_at_hand_for_the_latest_runs(
    scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path
) -> None:
    one = process(scans, tmp_path)
    classes = Payload.from_content(asked[DESCRIBE]).values["classes"]
    for number in range(WARM + 2):
        with in_process_identity(run_id=number):
            more = [*classes, f"digit-{10 + number}"]
            one.answer(message(DESCRIBE, changed(asked[DESCRIBE], classes=more, run=f"run-{number}")))
            for _ in range(2):
                assert one.answer(message(STATISTICS, asked[STATISTICS])).has_content()
    holdings = one._site._holdings
    assert len(holdings) == WARM
    assert len(one._site._backbones) == 1


def test_a_run_without_a_share_is_evaluated_on_the_rows_that_a_site_holds_out(scans: Path, tmp_path: Path) -> None:
    site = LocalSite(SITE, f"folder:{scans}", "cpu", ledger=Ledger(tmp_path / "ledger" / "site.jsonl"))
    config = RunConfig(rounds=1, holdout=0.0)
    app = make_app(lambda context: site)
    result = simulate(config, f"folder:{scans}", [range(ROWS)], apps={SITE: app}, out=tmp_path / "run")
    assert 0 < result.sites[SITE].rows < ROWS / 2
    assert result.accuracy_held_out is not None


def settings(data: str, name: str = SITE) -> SiteSettings:
    return SiteSettings(name=name, coordinator="127.0.0.1:9092", data=data)


def test_a_second_process_is_refused_for_the_name_and_for_the_data(scans: Path, tmp_path: Path) -> None:
    with only_process(settings(f"folder:{scans}"), "here"):
        with (
            pytest.raises(UserError, match="Another fedhead client is up for the site site-0"),
            only_process(settings("digits"), "here"),
        ):
            pass
        for spelled in (f"folder:{scans}", f"folder:{scans}/../scans/"):
            with (
                pytest.raises(UserError, match="is up for the data"),
                only_process(settings(spelled, "other"), "here"),
            ):
                pass
        with only_process(settings("digits", "other"), "here"):
            pass
    with only_process(settings(f"folder:{scans}", "other"), "here"):
        pass


def test_processes_for_several_coordinators_share_data_under_one_name(scans: Path) -> None:
    data = f"folder:{scans}"
    with ExitStack() as stack:
        for coordinator in ("one", "another"):
            stack.enter_context(only_process(settings(data), coordinator))
        for name, coordinator, words in (
            (SITE, "one", "for the site site-0 and this coordinator"),
            ("other", "a third", f"{SITE}, process {os.getpid()}; data has one name"),
        ):
            with pytest.raises(UserError, match=words), only_process(settings(data, name), coordinator):
                pass
    with only_process(settings(data, "other"), "one"):
        pass


def test_data_is_locked_for_processes_with_another_home(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with only_process(settings(f"folder:{scans}"), "here"):
        monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "another"))
        holder = f": process {os.getpid()}" if Path("/proc/locks").exists() else ""
        with (
            pytest.raises(UserError, match=f"is up for the data .* on this machine{holder};"),
            only_process(settings(f"folder:{scans}"), "here"),
        ):
            pass


def test_a_table_is_shared_by_sites_that_take_other_rows_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("all.csv").write_text("path,label,ward\n")
    with only_process(settings("csv:all.csv?split=ward:a", "a"), "here"):
        with only_process(settings("csv:all.csv?split=ward:b", "b"), "here"):
            pass
        with (
            pytest.raises(UserError, match=f": a, process {os.getpid()};"),
            only_process(settings(f"csv:{tmp_path}/all.csv?split=ward:a", "b"), "here"),
        ):
            pass


def test_the_log_reads_well(
    scans: Path, asked: Mapping[str, RecordDict], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedhead")
    one = process(scans, tmp_path)
    for action in asked:
        one.answer(message(action, asked[action]))
    run = one_line(Payload.from_content(asked[DESCRIBE]).values["run"], 8)
    assert f"Run {run}, train of round 1." in caplog.messages
