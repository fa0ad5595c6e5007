"""A coordinator that moves the edges of a survival run's time bins past single rows."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedhead.backbones import load_backbone
from fedhead.client.settings import SiteSettings
from fedhead.errors import FedheadError
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import STATISTICS
from fedhead.protocol.messages import Payload
from fedhead.tasks.survival import Survival

from .test_rows import FEATURES, Attack

ROWS = 120
EDGES = (150.0, 300.0)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with in_process_identity(run_id=1):
        yield


class TimesAttack(Attack):
    """An attack on a site with times and events."""

    def __init__(self, folder: Path) -> None:
        generator = np.random.default_rng(1)
        columns = [f"x{number}" for number in range(FEATURES)]
        self.folder, self.keys, self.runs = folder, None, 0
        self.features = generator.normal(size=(ROWS, FEATURES)).round(4)
        self.times = generator.uniform(10, 400, ROWS).round(1)
        events = (generator.random(ROWS) < 0.7).astype(int)
        lines = [",".join(map(str, [*x, t, e])) for x, t, e in zip(self.features, self.times, events, strict=True)]
        self.table = folder / "rows.csv"
        self.table.write_text("\n".join([",".join([*columns, "days", "died"]), *lines, ""]))
        self.backbone = load_backbone("identity:" + ",".join(columns))
        data = f"csv:{self.table}?time=days&event=died&features={','.join(columns)}"
        self.settings = SiteSettings(name="ward", coordinator="127.0.0.1:9092", data=data, device="cpu")
        self.restart()

    def counts(self, *edges: float) -> np.ndarray:
        """Return the counts of a new run with these time bins."""
        self.describe(classes=Survival(tuple(map(repr, edges))).columns, task="survival")
        return np.array(self.ask(STATISTICS, Payload({"rows": "train"})).arrays["counts"])


def test_edges_of_time_bins_stay_those_of_the_first_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attack = TimesAttack(tmp_path)
    first = attack.counts(*EDGES)
    np.testing.assert_array_equal(attack.counts(*EDGES), first)
    for edges in ((152.0, 300.0), (150.0, 300.0000001), (150.0,), (75.0, *EDGES)):
        with pytest.raises(AssertionError, match="earlier releases have other time bins, those until 150, 300"):
            attack.counts(*edges)
    attack.restart()
    with pytest.raises(AssertionError, match="Begin a run with these bins as its classes"):
        attack.counts(152.0, 300.0)
    kept = attack.process._site.atoms.grid_path
    assert f"move {kept} away" in caplog.text
    np.testing.assert_array_equal(attack.counts(*EDGES), first)
    kept.unlink()
    attack.describe(classes=Survival(("200", "300")).columns, task="survival")


def test_rows_are_not_admitted_under_other_edges(tmp_path: Path) -> None:
    attack = TimesAttack(tmp_path)
    attack.counts(*EDGES)
    site = attack.process._site
    with pytest.raises(FedheadError, match="other time bins"):
        site.open(attack.manifest.model_copy(update={"classes": Survival(("152", "300")).columns}))
    site.atoms.grid_path.write_text("7")
    with pytest.raises(FedheadError, match="cannot be read"):
        site.atoms.check_grid(Survival(("150", "300")))
