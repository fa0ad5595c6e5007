"""A tag of many words in one sentence."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedhead.backbones import load_backbone
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.local_site import LocalSite
from fedhead.client.release.guard import Guard
from fedhead.config import RunConfig
from fedhead.flower import in_process_identity
from fedhead.protocol.messages import Manifest

from .test_backbones import chunks

SENTENCES = 60
WORDS = ("the", "ward", "saw", "him", "today", "and", "gave", "oxygen")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    with in_process_identity(run_id=1):
        yield


def written(folder: Path, alone: int) -> str:
    """Write sentences with a drug each; in the first few, every other word is a name instead."""
    lines = []
    for number in range(SENTENCES):
        for place, word in enumerate(WORDS):
            tag = "B-NAME" if number < alone and place != 7 else "B-DRUG" if place == 7 else "O"
            lines.append(f"{word}{number if place == 3 else ''} {tag}")
        lines.append("")
    (folder / "notes.txt").write_text("\n".join(lines))
    return f"conll:{folder / 'notes.txt'}"


@pytest.mark.parametrize(("alone", "kept"), [(1, False), (4, False), (12, True)])
def test_a_tag_of_few_sentences_is_withheld_however_many_words_have_it(alone: int, kept: bool, tmp_path: Path) -> None:
    vectors = tmp_path / "vectors.txt"
    rng = np.random.default_rng(0)
    vectors.write_text("\n".join(" ".join([word, *(f"{one:.3f}" for one in rng.normal(size=8))]) for word in WORDS))
    spec = f"vectors:{vectors}"
    backbone = load_backbone(spec)
    accepted = AcceptedBackbones(frozenset({spec}))
    site = LocalSite("notes", written(tmp_path, alone), "cpu", guard=Guard(5, 20), backbones=accepted)
    manifest = Manifest.of("run", RunConfig(task="tagging", rounds=0), backbone, ("DRUG", "NAME"))
    for chunk in chunks(backbone.to_bytes(), 10**6):
        site.install(manifest, chunk)
    holding = site.open(manifest)
    tags = holding.data.labels[np.concatenate([holding.train.rows, holding.held_out.rows])][:, 0]
    assert (3 in tags.tolist()) == kept
