from pathlib import Path

import pytest
import torch

from fedhead.errors import UserError
from fedhead.server.site_sums import PARTS, Keep, Part, Parts, SiteSums, digest_of
from fedhead.sums.features import FeatureStatistics

FEATURES, CLASSES = 5, 3
KEEPS: tuple[Keep, ...] = ("folder", "none")


def parts_of(seed: int, classes: int = CLASSES) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    found: dict[Part, FeatureStatistics] = {}
    for part, rows in zip(PARTS, (20, 6), strict=True):
        # Of all magnitudes, so that the order of floating-point additions shows.
        scale = 10.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)
        features = scale * torch.randn(rows, FEATURES, generator=generator)
        labels = torch.randint(classes, (rows,), generator=generator)
        found[part] = FeatureStatistics.from_features(features, labels, classes)
    return found


SITES = {name: parts_of(seed) for seed, name in enumerate(("north", "south", "east"))}


def saved(folder: Path, keep: Keep, names: tuple[str, ...]) -> SiteSums:
    sums = SiteSums(folder / "-".join((keep, *names)), keep)
    for name in names:
        for part, stats in SITES[name].items():
            sums.save(name, part, stats)
    sums.finish()
    return sums


def same_bits(one: Parts, other: Parts) -> bool:
    return one.keys() == other.keys() and all(digest_of(one[part]) == digest_of(other[part]) for part in one)


@pytest.mark.parametrize("keep", KEEPS)
def test_the_total_does_not_depend_on_the_order_of_arrival(keep: Keep, tmp_path: Path) -> None:
    first = saved(tmp_path, keep, ("north", "south", "east"))
    second = saved(tmp_path, keep, ("east", "north", "south"))
    assert first.sites() == second.sites() == ["east", "north", "south"]
    assert first.records() == second.records()
    assert same_bits(first.pools(CLASSES), second.pools(CLASSES))


@pytest.mark.parametrize("keep", KEEPS)
def test_a_site_that_joins_and_leaves_leaves_nothing(keep: Keep, tmp_path: Path) -> None:
    sums = saved(tmp_path, keep, ("north", "south"))
    before, files = sums.pools(CLASSES), {path.name for path in sums.path.iterdir()}
    joined = sums.joined("east", SITES["east"], CLASSES)
    assert same_bits(sums.pools(CLASSES), before)
    sums.commit(joined, {"site": "east"})
    whole = saved(tmp_path, keep, ("north", "south", "east"))
    assert same_bits(sums.pools(CLASSES), whole.pools(CLASSES))
    assert sums.pending == {"site": "east"}
    sums.settle()
    assert sums.pending is None
    sums.commit(sums.left("east", {} if keep == "folder" else SITES["east"], CLASSES), {})
    assert same_bits(sums.pools(CLASSES), before)
    if keep == "folder":
        assert {path.name for path in sums.path.iterdir()} == files


@pytest.mark.parametrize("keep", KEEPS)
def test_a_new_class_extends_the_total(keep: Keep, tmp_path: Path) -> None:
    sums = saved(tmp_path, keep, ("north", "south"))
    draft = sums.joined("west", parts_of(9, CLASSES + 1), CLASSES + 1)
    assert draft.rows == sum(stats.rows for stats in sums.pools(CLASSES).values()) + 26
    for part, before in sums.pools(CLASSES).items():
        added = parts_of(9, CLASSES + 1)[part].counts
        assert draft.pools[part].counts.tolist() == (torch.cat([before.counts, torch.zeros(1)]) + added).tolist()


def test_single_sums_are_kept_only_where_asked_for(tmp_path: Path) -> None:
    kept, pooled = (saved(tmp_path, keep, ("north", "south")) for keep in KEEPS)
    loaded = kept.load("north", "train")
    assert loaded is not None
    assert digest_of(loaded) == kept.records()["north"]["train"].digest == digest_of(SITES["north"]["train"])
    assert pooled.load("north", "train") is None
    assert pooled.records() == kept.records()


def test_an_incomplete_last_line_does_not_count_and_damage_is_a_sentence(tmp_path: Path) -> None:
    sums = saved(tmp_path, "folder", ("north", "south"))
    (index,) = sums.path.glob("*.jsonl")
    text = index.read_text()
    index.write_text(text + '{"site": "ea')
    assert SiteSums(sums.path).sites() == ["north", "south"]
    index.write_text(text + "{}\n")
    with pytest.raises(UserError, match="is damaged"):
        SiteSums(sums.path).sites()
