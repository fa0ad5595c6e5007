import json

import torch

from fedhead.evaluation.coverage import coverage


def test_classes_that_depend_on_one_site() -> None:
    counts = {"b": torch.tensor([91, 10, 0, 0]), "a": torch.tensor([9, 0, 5, 0]), "c": torch.tensor([0, 2, 0, 0])}
    cat, dog, emu, fox = coverage(counts, ("cat", "dog", "emu", "fox"))
    assert (cat.rows, cat.sites, cat.largest_site, cat.share) == (100, 2, "b", 0.91)
    assert cat.rests_on_one_site
    assert cat.sentence == "Class 'cat' has 100 rows at 2 sites, 91 % of them at b: the class depends on that site."
    assert not dog.rests_on_one_site
    assert dog.sentence == "Class 'dog' has 12 rows at 2 sites."
    assert emu.sentence == "Class 'emu' has 5 rows at 1 site, all of them at a: the class depends on that site."
    assert fox.sentence == "No site has rows of class 'fox': no head can learn it."
    assert not fox.rests_on_one_site
    assert json.loads(json.dumps([one.to_dict() for one in (cat, fox)]))[0]["rests_on_one_site"]


def test_coverage_of_no_sites() -> None:
    assert [one.rows for one in coverage({}, ("cat", "dog"))] == [0, 0]
