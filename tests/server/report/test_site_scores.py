import pytest

from fedhead.config import RunConfig
from fedhead.server.report.fit import fit
from fedhead.server.report.site_scores import site_scores
from fedhead.server.runs.record import RunRecord


def segmented(scores: dict[str, float], width: float = 0.04, shares: dict[str, float] | None = None) -> RunRecord:
    config = RunConfig(task="segmentation", backbone="torchvision:mobilenet_v2", classes=("background", "cell"))
    sites = {}
    for name, score in scores.items():
        share = (shares or {}).get(name, 0.1)
        areas = [{"name": "background", "share": 1 - share}, {"name": "cell", "share": share}]
        sites[name] = {"rows": 20, "miou": [score, score - width, score + width], "areas": areas}
    return RunRecord(name="run", config=config.model_dump(), toml="", evaluation={"sites": sites})


def test_a_site_far_below_the_others_is_named_with_advice() -> None:
    record = segmented({"north": 0.85, "south": 0.86, "west": 0.4}, shares={"west": 0.5})
    section = fit(record)
    assert "worse at 1 site of 3" in section.answer
    (sentence,) = [one for one in section.sentences if one.startswith("west")]
    assert "Mean IoU 0.400 on 20 held-out images, 0.855 at the other sites" in sentence
    assert "share of pixels of cell 0.5, 0.1 at the others" in sentence
    assert "compare its masks" in sentence
    assert [row[0] for row in section.tables[0][1].rows] == ["west", "north", "south"]


def test_sites_within_chance_are_alike() -> None:
    section = fit(segmented({"north": 0.85, "south": 0.84, "west": 0.81}))
    assert "within chance" in section.answer
    assert not section.sentences


def test_a_difference_is_in_standard_errors_of_both() -> None:
    sites = {one.name: one for one in site_scores(segmented({"north": 0.8, "south": 0.7, "west": 0.7}))}
    error = 0.04 / 1.959963984540054
    assert sites["north"].errors == pytest.approx(0.1 / (error * 1.5**0.5))
    assert not sites["north"].is_worse(3)


def test_a_site_of_few_images_is_not_called_worse() -> None:
    record = segmented({"north": 0.85, "south": 0.86, "west": 0.4})
    record.evaluation["sites"]["west"]["rows"] = 3
    assert "within chance" in fit(record).answer


def test_without_scores_of_two_sites_nothing_is_compared() -> None:
    assert fit(segmented({"north": 0.8})).answer == "Sites are not compared with the pool for this task."


def test_sites_of_a_language_model_are_worse_where_perplexity_is_higher() -> None:
    config = RunConfig(task="generation", backbone="hf:x/y", tune="lora:4", rounds=1).settled()
    sites = {
        name: {"rows": 40, "perplexity": [value, value - 1, value + 1]}
        for name, value in {"north": 8.0, "south": 8.5, "west": 30.0}.items()
    }
    record = RunRecord(name="run", config=config.model_dump(), toml="", evaluation={"sites": sites})
    section = fit(record)
    assert "worse at 1 site of 3" in section.answer
    (sentence,) = section.sentences
    assert sentence.startswith("west: Perplexity 30.000")
    assert "fedhead leave" not in sentence
    assert [row[0] for row in section.tables[0][1].rows] == ["west", "south", "north"]
