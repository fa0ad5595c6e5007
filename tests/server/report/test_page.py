import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from typer.testing import CliRunner

from fedhead.cli import app
from fedhead.config import RunConfig
from fedhead.data import load_samples, samples_from_arrays
from fedhead.errors import FedheadError, UserError
from fedhead.evaluation.metrics import reliability, report, roc_points
from fedhead.server.report import RunRecord, render, write_report
from fedhead.server.runs.history import Round
from fedhead.server.runs.summary import RunSummary
from fedhead.simulations import simulate
from fedhead.sums.evaluation import EvaluationSums, sums_by_site

QUESTIONS = [
    "How good is the model?",
    "Was it worth joining?",
    "What did it cost?",
    "Which sites should join?",
    "What left the sites?",
    "What ran?",
]
MOST_BYTES = 1_000_000


def charts(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def check(page: str) -> None:
    """Check what holds for every report: its order, its size, and that it needs nothing else."""
    assert re.findall(r"<h2>(.*?)</h2>", page) == QUESTIONS
    assert len(page.encode()) < MOST_BYTES
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', page)) == {"data:,"}
    assert "url(" not in page and "@import" not in page
    assert page.count("<details") >= page.count("<figure")
    for chart in charts(page):
        assert len(list(chart.iter())) > 3
        for number in re.findall(r"[-\d.]+", " ".join(chart.itertext())):
            assert number not in ("nan", "inf")
        assert "nan" not in ElementTree.tostring(chart, encoding="unicode")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    simulate(RunConfig(rounds=3), sites=4, out=path, baseline="bundled:pixels")
    return path


def test_every_run_writes_its_report(run: Path) -> None:
    page = (run / "report.html").read_text()
    check(page)
    assert page.count("<figure") == 13
    evaluation = json.loads((run / "evaluation.json").read_text())
    result = json.loads((run / "result.json").read_text())
    value, low, high = evaluation["pooled"]["accuracy"]
    assert f"{100 * value:.1f} % ({100 * low:.1f}\N{EN DASH}{100 * high:.1f})" in page
    name, worst = min(evaluation["sites"].items(), key=lambda pair: pair[1]["accuracy"][0])
    assert f"Worst site: {name}, {100 * worst['accuracy'][0]:.1f} %" in page
    assert "on bundled:pixels, the head of one exchange has" in page
    for when in ("before", "after"):
        assert f"{100 * evaluation['calibration'][when]['reliability']['error']:.1f} %" in page
    assert f"temperature of {evaluation['calibration']['temperature']:.2g}" in page
    assert 'data-status="finished"' in page
    traffic = evaluation["traffic"]["sites"]
    assert sorted(traffic) == sorted(evaluation["sites"])
    assert sum(up for _, up in traffic.values()) == pytest.approx(result["bytes_up"], abs=40)
    assert sum(down for down, _ in traffic.values()) == result["bytes_down"]
    journal = json.loads((run / "journal.json").read_text())
    assert journal["status"] == "finished"
    assert {"describe", "statistics", "train", "finish"} <= journal["seconds"].keys()
    assert journal["backbone"]["weights_digest"] in page


def test_traffic_by_action_covers_all_sites(run: Path) -> None:
    traffic = json.loads((run / "evaluation.json").read_text())["traffic"]
    actions, sites = traffic["actions"], traffic["sites"]
    assert sum(down for _, down, _ in actions.values()) == sum(down for down, _ in sites.values())
    assert actions["train"][0] == 3 * 4
    assert {name.rpartition(".")[2] for name in actions} == {
        "describe", "statistics", "standardise", "train", "evaluate", "report", "compare", "calibrate", "rivals"
    }  # fmt: skip


def test_command_rewrites_the_report(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.html"
    told = CliRunner().invoke(app, ["report", str(run), "--out", str(out)])
    assert told.exit_code == 0, told.output
    assert told.stdout.strip() == str(out)
    assert out.read_text() == (run / "report.html").read_text()


def test_error_for_folder_without_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder: it holds no run\.toml"):
        write_report(tmp_path)
    assert CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")]).exit_code == 2
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "evaluation.json").write_text('{"pooled": ')
    with pytest.raises(FedheadError, match=r"evaluation\.json is damaged"):
        write_report(broken)


def test_hostile_names_are_harmless(tmp_path: Path) -> None:
    digits = load_samples("digits")
    rows = np.flatnonzero(digits.labels < 3)[:240]
    hostile = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7*7 }}</title>")
    data = samples_from_arrays([digits.read(row) for row in rows], digits.labels[rows], classes=hostile)
    simulate(RunConfig(rounds=1), data, 2, out=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    check(page)
    assert "<img" not in page
    assert "{{ 7*7 }}&lt;/title&gt;" in page
    assert "&lt;script&gt;alert(1)" in page


def copied(run: Path, out: Path) -> Path:
    """Return a copy of a run folder as it is while the run goes on, or after its process was killed."""
    shutil.copytree(run, out)
    for name in ("evaluation.json", "result.json", "model.safetensors", "report.html"):
        (out / name).unlink()
    journal = json.loads((out / "journal.json").read_text())
    (out / "journal.json").write_text(json.dumps({**journal, "status": "running", "step": "train", "ended": ""}))
    return out


def test_report_of_a_run_in_progress(run: Path, tmp_path: Path) -> None:
    half = copied(run, tmp_path / "half")
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    # The last line was being written.
    (half / "metrics.jsonl").write_text("".join(lines[:2]) + '{"number": 2, "si')
    page = write_report(half).read_text()
    check(page)
    assert 'data-status="running"' in page
    assert "<progress" in page and 'value="2"' in page
    assert "The run has not finished" in page
    assert page.count('<td class="word">ready</td>') == 4
    (half / "metrics.jsonl").write_text("")
    check(write_report(half).read_text())


def test_report_of_a_failed_run(tmp_path: Path) -> None:
    class Fails(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            if server_round == 2:
                raise FedheadError("The <b>strategy</b> gave up.")
            return super().aggregate_train(server_round, replies)

    with pytest.raises(FedheadError, match="gave up"):
        simulate(RunConfig(rounds=3), sites=2, strategy=Fails(), out=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    check(page)
    assert 'data-status="failed"' in page
    assert "The &lt;b&gt;strategy&lt;/b&gt; gave up." in page


@pytest.mark.parametrize(
    ("config", "sites", "words"),
    [
        (RunConfig(rounds=0), 1, "1 site"),
        (RunConfig(rounds=1, holdout=0.0), 3, "no rows are held out"),
        (RunConfig(rounds=2, init="zeros"), 3, "Sites were not diagnosed"),
        (RunConfig(rounds=2, init="zeros"), 3, "its folder keeps none"),
        (RunConfig(rounds=1, keep_sums="none"), 3, "no single site"),
        (RunConfig(rounds=1, keep_sums="total"), 3, "the run folder keeps no sums"),
    ],
)
def test_runs_of_every_kind_have_a_report(config: RunConfig, sites: int, words: str, tmp_path: Path) -> None:
    simulate(config, sites=sites, out=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    check(page)
    assert words in page


def test_multi_label_runs_have_a_report(tmp_path: Path) -> None:
    digits = load_samples("digits")
    marks = np.stack([digits.labels % 2 == 0, digits.labels > 4, digits.labels == 7], 1).astype(np.int64)
    data = samples_from_arrays(
        [digits.read(row) for row in range(400)], marks[:400], classes=("even", "large", "seven")
    )
    config = RunConfig(rounds=1, multi_label=True, simulation={"partition": "iid"})
    simulate(config, data, 3, out=tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    check(page)
    assert "Labels found, missed and wrongly predicted" in page
    assert "The share of rows with all labels correct is" in page


def large_record(num_sites: int, num_classes: int, rows: int = 20_000) -> RunRecord:
    """Return the record of a large run, its figures made by the same functions from random logits."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, rows)
    logits = rng.normal(size=(rows, num_classes)) + 4 * np.eye(num_classes)[labels]
    names = [f"class number {number} with a long name" for number in range(num_classes)]
    different = min(num_sites, 25)
    parts = list(sums_by_site(logits, labels, rng.integers(0, different, rows), different))
    pooled = sum(parts, EvaluationSums.zeros(num_classes))
    reports = [report(sums, names).to_dict() for sums in parts]
    sites = [f"hospital-{number:04d}" for number in range(num_sites)]
    values = {
        "pooled": report(pooled, names).to_dict(),
        "curves": {
            "confusion": pooled.confusion.tolist(),
            "reliability": reliability(pooled).to_dict(),
            "roc": [points.round(5).tolist() for points in roc_points(pooled) if points is not None],
        },
        "sites": {name: reports[number % different] for number, name in enumerate(sites)},
        "diagnosis": [
            {
                "site": name,
                "recommendation": "join" if number % 3 else "stay local",
                "finding": "alike" if number % 3 else "labels look wrong",
                "reason": "Its rows look like the others'. " * 8,
                "sentence": f"{name}: " + "Its rows look like the others'. " * 8,
                "rows": 20,
                "classes": 7,
                "shift": {"distance": number / num_sites},
                "comparison": {
                    "rows": 20,
                    "right": {"own": number % 20, "pooled": 15, "others": 14},
                    "p_value": 0.5,
                    "gain": [-0.1, 0.1],
                },
            }
            for number, name in enumerate(sites)
        ],
        "coverage": [
            {"name": name, "rows": 5 * number, "sites": 3, "largest_site": sites[0], "share": 0.95,
             "rests_on_one_site": True, "sentence": f"Class {name!r} rests on one site."}
            for number, name in enumerate(names)
        ],
        "traffic": {"sites": {name: [1000, 2000] for name in sites}, "actions": {"train": [num_sites, 1000, 2000]}},
    }  # fmt: skip
    line = {"sites": num_sites, "seconds": 1.0, "bytes_down": 10**9, "bytes_up": 10**9, "loss": 0.5, "score": 0.8}
    dropped = dict.fromkeys(sites[:50], "it holds values that are not finite")
    return RunRecord(
        name="large",
        config={"classes": names, "rounds": 500, "backbone": "torchvision:resnet18", "strategy": {"name": "FedAvg"}},
        toml="",
        journal={
            "status": "finished",
            "standing": {"ready": len(sites)},
            "sites": {name: {"standing": "ready", "rows": 20} for name in sites},
        },
        rounds=[Round(number=number, dropped=dropped, **line) for number in range(501)],
        evaluation=values,
        result=RunSummary(sites=num_sites, kept_round=500, score=0.8),
    )


@pytest.mark.parametrize(("sites", "classes"), [(1, 2), (1000, 2), (3, 200), (1000, 200)])
def test_large_runs_stay_small(sites: int, classes: int) -> None:
    page = render(large_record(sites, classes, rows=8_000))
    check(page)
    if sites > 36:
        assert "sites with the lowest accuracy" in page
    if classes > 36:
        assert "more rows are in the run folder" in page or "with the lowest sensitivity" in page


def looks(browser: Any, width: int) -> dict[str, Any]:
    """Measure, in the browser: how wide the page is, and each chart's box and number of shapes in sight."""
    found: dict[str, Any] = browser.evaluate(
        """(() => ({
            width: document.documentElement.scrollWidth,
            charts: [...document.querySelectorAll('svg')].map(svg => ({
                box: svg.getBoundingClientRect().toJSON(),
                shapes: [...svg.querySelectorAll('rect,circle,line,polyline,polygon')].filter(shape => {
                    const box = shape.getBoundingClientRect();
                    return box.width + box.height > 0;
                }).length,
                letters: Math.min(...[...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect().height)),
            })),
        }))()"""
    )
    return found


@pytest.mark.parametrize("make", [lambda run: run, lambda run: None], ids=["digits", "large"])
@pytest.mark.parametrize("width", [1200, 390])
def test_report_in_a_browser(
    run: Path, browser: Any, width: int, make: Callable[[Path], Path | None], tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    source = make(run)
    path.write_text((source / "report.html").read_text() if source else render(large_record(100, 60)))
    browser.resize(width, 900)
    browser.open(path.as_uri())
    seen = looks(browser, width)
    assert browser.complaints == []
    assert browser.requests == [path.as_uri()]
    assert seen["width"] <= width
    assert len(seen["charts"]) >= 9
    for chart in seen["charts"]:
        assert chart["box"]["width"] > 0.6 * min(width, 500)
        assert chart["box"]["height"] > 20
        assert chart["shapes"] >= 2
    pictures = {}
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        pictures[scheme] = browser.picture()
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)"
        )
    browser.scheme("light")
    assert pictures["light"] != pictures["dark"]
    assert browser.printed().startswith(b"%PDF")
    assert browser.complaints == []


CONTRAST = """(() => {
    const luminance = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = element => {
        for (let one = element; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if (!colour.startsWith('rgba(0, 0, 0, 0')) return colour;
        }
    };
    const worst = [];
    for (const element of document.querySelectorAll('p,dt,dd,h1,h2,h3,a,summary,figcaption,svg text:not(.count)')) {
        const style = getComputedStyle(element);
        const ink = element instanceof SVGElement ? style.fill : style.color;
        const [a, b] = [luminance(ink), luminance(paper(element))].sort((x, y) => y - x);
        worst.push([(a + 0.05) / (b + 0.05), element.textContent.slice(0, 30)]);
    }
    return worst.sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast(run: Path, browser: Any, scheme: str) -> None:
    browser.open((run / "report.html").as_uri())
    browser.scheme(scheme)
    worst, where = browser.evaluate(CONTRAST)
    browser.scheme("light")
    assert worst >= 4.5, where
