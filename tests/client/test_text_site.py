"""A site of texts that holds neither the words nor the vectors of the backbone it is sent."""

from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedhead.client.app import make_app
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.config import RunConfig
from fedhead.flower import in_process_identity
from fedhead.protocol.actions import DESCRIBE, INSTALL
from fedhead.simulations import simulate

SITE = "site-0"
ROWS = 60


class Elsewhere(ClientApp):
    """A real site, on a machine with a home of its own where the file of vectors is gone; notes what it was asked."""

    def __init__(self, data: str, home: Path, vectors: Path) -> None:
        super().__init__()
        accepted = AcceptedBackbones(frozenset({f"vectors:{vectors}"}))
        self.site = LocalSite(SITE, data, device="cpu", guard=Guard.off(), backbones=accepted)
        self.app = make_app(lambda context: self.site)
        self.context = Context(1, 7, {}, RecordDict(), {})
        self.home, self.vectors = home, vectors
        self.asked: list[str] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.asked.append(message.metadata.message_type)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDHEAD_HOME", str(self.home))
            self.vectors.unlink(missing_ok=True)
            return self.app(message, self.context)


def test_words_and_vectors_travel_once_and_texts_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("cough 0 1 2\nrash 5 1 0\nfever 1 2 2\nwell 4 0 1\n")
    table = tmp_path / "notes.csv"
    notes = (("cough and fever", "lung"), ("well; a rash", "skin"))
    rows = [f"{notes[row % 2][0]} {row},{notes[row % 2][1]}" for row in range(ROWS)]
    table.write_text("\n".join(["text,label", *rows]))
    config = RunConfig(backbone=f"vectors:{vectors}", init="nearest-mean", rounds=0)
    content = vectors.read_bytes()
    with in_process_identity(run_id=1):
        for actions in ([DESCRIBE, INSTALL], [DESCRIBE]):
            vectors.write_bytes(content)
            app = Elsewhere(f"csv:{table}", tmp_path / "site-home", vectors)
            result = simulate(config, f"csv:{table}", [range(ROWS)], apps={SITE: app})
            assert result.outcome.refused == {}
            assert result.accuracy == 1.0
            assert [action for action in app.asked if action in (DESCRIBE, INSTALL)] == actions
    assert result.model.predict(["a fever"]) == ["lung"]
