import re

from fedhead.server.report.charts import Interval, forest, progress


def places(drawing: str, axis: str) -> list[float]:
    return [float(place) for place in re.findall(rf'<circle[^>]*\bc{axis}="([-0-9.]+)"', drawing)]


def test_scores_above_one_have_places_of_their_own() -> None:
    curve = progress([(1e5, 257.2, "0"), (2e5, 253.4, "1"), (3e5, 248.7, "2")], -1, shares=False)
    first, second, third = places(str(curve), "y")
    assert 0 < first < second < third < 262
    sites = [Interval("a", 248.6, 244.8, 252.5, 7), Interval("b", 250.1, 245.4, 252.2, 9)]
    left, right = places(str(forest(sites, "perplexity", wording=str)), "x")
    assert left < right
