from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedhead.client import averaging
from fedhead.client.averaging import average_heads
from fedhead.client.labelled_features import LabelledFeatures, SiteRows
from fedhead.client.training import evaluate_head, train_heads, train_in_chunks
from fedhead.config import LocalConfig
from fedhead.heads import Head, make_head
from fedhead.tasks.losses import BinaryCrossEntropy, CrossEntropy

CLASSES = 3
SETTINGS = [
    LocalConfig(epochs=epochs, batch_size=4, momentum=momentum, weight_decay=decay, proximal_mu=mu)
    for epochs, momentum, decay, mu in product((1, 3), (0.0, 0.9), (0.0, 0.05), (0.0, 0.5))
]


pytestmark = pytest.mark.usefixtures("one_thread")


def make_problem(
    sizes: tuple[int, ...], width: int, *, spread: int = 1, dtype: torch.dtype = torch.float64, labels: str = "single"
) -> tuple[LabelledFeatures, list[SiteRows], list[SiteRows]]:
    """Sites of the given sizes with three held-out rows each, scattered over `spread` times as many rows."""
    generator = torch.Generator().manual_seed(1)
    total = spread * (sum(sizes) + 3 * len(sizes)) + 5
    features = torch.randn(total, width, generator=generator, dtype=dtype) * 2 + 1
    classes = torch.randint(0, CLASSES, (total,), generator=generator)
    if labels == "multi":
        classes = torch.randint(0, 2, (total, CLASSES), generator=generator)
    standardisation = (features.mean(0), features.std(0))
    scattered = torch.randperm(total, generator=generator).numpy()
    sites, held_out, at = [], [], 0
    for number, size in enumerate(sizes):
        sites.append(SiteRows(f"site-{number}", scattered[at : at + size]))
        held_out.append(SiteRows(f"site-{number}", scattered[at + size : at + size + 3]))
        at += size + 3
    loss = BinaryCrossEntropy() if labels == "multi" else CrossEntropy()
    return LabelledFeatures(features, classes, standardisation, loss), sites, held_out


def make_incoming(spec: str, width: int, dtype: torch.dtype = torch.float64) -> tuple[Head, dict[str, Tensor]]:
    head = make_head(spec, width, CLASSES).to(dtype)
    head.randomise(torch.Generator().manual_seed(2))
    return head, head.trainable()


def assert_averages(
    head: Head,
    incoming: dict[str, Tensor],
    data: LabelledFeatures,
    sites: list[SiteRows],
    held_out: list[SiteRows],
    local: LocalConfig,
    tolerance: float = 1e-9,
    repeated: bool = True,
) -> None:
    """Check two rounds, as the second finds what the first kept, against each site's own head."""
    for number in (1, 2):
        trained = train_heads(head, incoming, data, sites, local, seed=5, round_number=number)
        averaged, evaluation = average_heads(
            head, incoming, data, sites, local, held_out, seed=5, round_number=number, repeated=repeated
        )
        weights = torch.from_numpy(trained.rows / max(1, trained.rows.sum())).to(data.features.dtype)
        for name, value in averaged.parameters.items():
            torch.testing.assert_close(
                value, torch.tensordot(weights, trained.parameters[name], 1), rtol=tolerance, atol=tolerance
            )
        np.testing.assert_allclose(averaged.losses, trained.losses, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(averaged.rows, trained.rows)
        assert averaged.usable.all()
        expected = evaluate_head(head, incoming, data, held_out)
        np.testing.assert_allclose(evaluation.losses, expected.losses, rtol=tolerance)
        np.testing.assert_array_equal(evaluation.scores, expected.scores)
        np.testing.assert_array_equal(evaluation.rows, expected.rows)


def sites_at_once(monkeypatch: pytest.MonkeyPatch, function: str, argument: int) -> list[int]:
    """Return a list that grows, with each call of a function, by how many sites that argument of it holds."""
    made: list[int] = []
    train = getattr(averaging, function)

    def count(*arguments: Any) -> Any:
        made.append(len(arguments[argument]))
        return train(*arguments)

    monkeypatch.setattr(averaging, function, count)
    return made


@pytest.fixture
def coefficients(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sites each call trained in coefficient form."""
    return sites_at_once(monkeypatch, "train_coefficients", 4)


@pytest.mark.parametrize("spread", [1, 10])
@pytest.mark.parametrize("local", SETTINGS, ids=str)
def test_mean_equals_mean_of_single_heads(local: LocalConfig, spread: int, coefficients: list[int]) -> None:
    data, sites, held_out = make_problem((5, 23, 0, 1, 8, 7, 16), 200, spread=spread)
    head, incoming = make_incoming("linear", 200)
    assert_averages(head, incoming, data, sites, held_out, local)
    # All but the site without rows, in both rounds.
    assert sum(coefficients) == 12


@pytest.mark.parametrize("spec", ["linear", "mlp:4", "cosine"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_head_and_optimizer_averages(spec: str, optimizer: str) -> None:
    data, sites, held_out = make_problem((5, 23, 0, 9), 8)
    head, incoming = make_incoming(spec, 8)
    local = LocalConfig.model_validate({"optimizer": optimizer, "batch_size": 4, "epochs": 2, "lr": 0.05})
    assert_averages(head, incoming, data, sites, held_out, local)


def test_multi_label_rows_average(coefficients: list[int]) -> None:
    data, sites, held_out = make_problem((5, 23, 0, 9), 40, labels="multi")
    head, incoming = make_incoming("linear", 40)
    assert_averages(head, incoming, data, sites, held_out, LocalConfig(batch_size=4, epochs=2, momentum=0.5))
    assert coefficients


def test_the_form_is_chosen_by_shape(coefficients: list[int]) -> None:
    local = LocalConfig(batch_size=4)
    for rows, repeated, expected in ((60, True, 0), (4, True, 4), (28, False, 0)):
        data, sites, held_out = make_problem((rows, rows), 32)
        head, incoming = make_incoming("linear", 32)
        coefficients.clear()
        assert_averages(head, incoming, data, sites, held_out, local, repeated=repeated)
        assert sum(coefficients) == expected


def test_form_is_chosen_per_site(coefficients: list[int]) -> None:
    data, sites, held_out = make_problem((300, 4, 5, 6), 64)
    head, incoming = make_incoming("linear", 64)
    assert_averages(head, incoming, data, sites, held_out, LocalConfig(batch_size=8))
    assert max(coefficients) < 4


def test_sites_too_large_for_coefficients_are_trained_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "COEFFICIENT_BYTES", 1000)
    at_once = sites_at_once(monkeypatch, "train_chunk", 3)
    data, sites, held_out = make_problem((90, 80, 75, 70, 70), 16)
    head, incoming = make_incoming("linear", 16)
    average_heads(head, incoming, data, sites, LocalConfig(), held_out, seed=5, round_number=1, repeated=True)
    assert at_once == [5]


def test_precision_with_features_far_from_zero() -> None:
    data, sites, held_out = make_problem((6, 9, 12), 40, dtype=torch.float32)
    far = LabelledFeatures(
        data.features + 1000.0, data.labels, ((data.features + 1000.0).mean(0), (data.features + 1000.0).std(0))
    )
    head, incoming = make_incoming("linear", 40, torch.float32)
    assert_averages(head, incoming, far, sites, held_out, LocalConfig(batch_size=4, epochs=2), tolerance=2e-4)


def test_single_precision_agrees_to_rounding() -> None:
    data, sites, held_out = make_problem((6, 30, 30, 12), 64, dtype=torch.float32)
    head, incoming = make_incoming("linear", 64, torch.float32)
    assert_averages(head, incoming, data, sites, held_out, LocalConfig(batch_size=4), tolerance=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["own", "held out", "nobody's"])
def test_broken_row_excludes_only_its_own_site(bad: float, which: str) -> None:
    data, sites, held_out = make_problem((5, 9, 7), 40, dtype=torch.float32)
    head, incoming = make_incoming("linear", 40, torch.float32)
    taken = np.concatenate([site.rows for site in [*sites, *held_out]])
    strange = int(np.setdiff1d(np.arange(len(data.labels)), taken)[2])
    row = {"own": int(sites[1].rows[2]), "held out": int(held_out[1].rows[0]), "nobody's": strange}[which]
    broken = LabelledFeatures(data.features.clone(), data.labels, data.standardisation)
    broken.features[row] = bad
    local = LocalConfig(batch_size=4, lr=1.0)
    good = [0, 1, 2] if which == "nobody's" else [0, 2]
    for number in (1, 2):
        averaged, _ = average_heads(
            head, incoming, broken, sites, local, held_out, seed=5, round_number=number, repeated=True
        )
        assert np.flatnonzero(averaged.usable).tolist() == good
        alone, _ = average_heads(head, incoming, data, [sites[i] for i in good], local, seed=5, round_number=number)
        for name, value in averaged.parameters.items():
            torch.testing.assert_close(value, alone.parameters[name], rtol=1e-4, atol=1e-5)


def test_without_rows_the_incoming_head_is_returned() -> None:
    data, sites, _ = make_problem((0, 0), 8)
    head, incoming = make_incoming("linear", 8)
    for some in (sites, []):
        averaged, evaluation = average_heads(head, incoming, data, some, LocalConfig(), seed=0, round_number=1)
        assert all(torch.equal(value, incoming[name]) for name, value in averaged.parameters.items())
        assert averaged.rows.tolist() == [0] * len(some)
        assert len(evaluation.rows) == 0


def test_cached_products_depend_on_standardisation() -> None:
    data, sites, held_out = make_problem((6, 9), 40)
    head, incoming = make_incoming("linear", 40)
    local = LocalConfig(batch_size=4, epochs=3)
    assert_averages(head, incoming, data, sites, held_out, local)
    other = LabelledFeatures(
        data.features, data.labels, (torch.zeros(40).double(), torch.full((40,), 3.0).double()), grams=data.grams
    )
    assert_averages(head, incoming, other, sites, held_out, local)


def test_cache_between_rounds_is_bounded() -> None:
    data, sites, held_out = make_problem((6, 9), 40)
    data.grams.max_bytes = 9 * 9 * 8
    head, incoming = make_incoming("linear", 40)
    assert_averages(head, incoming, data, sites, held_out, LocalConfig(batch_size=4, epochs=3))
    assert sum(gram.nbytes for _, gram in data.grams._kept.values()) <= data.grams.max_bytes


@pytest.mark.parametrize("width", [4, 200])
def test_short_last_minibatches_are_merged_in_both_forms(width: int) -> None:
    data, sites, held_out = make_problem((33, 34, 68, 3, 40), width)
    head, incoming = make_incoming("linear", width)
    local = LocalConfig(batch_size=32, epochs=2)
    averaged, _ = average_heads(
        head, incoming, data, sites, local, held_out, seed=5, round_number=1, repeated=True, min_batch=5
    )
    total = {name: torch.zeros_like(value) for name, value in incoming.items()}
    for positions, trained in train_in_chunks(head, incoming, data, sites, local, seed=5, round_number=1, min_batch=5):
        for name in total:
            rows = torch.from_numpy(trained.rows).double()
            total[name] += torch.tensordot(rows, trained.parameters[name], 1) / 178
        assert len(positions)
    unmerged, _ = average_heads(head, incoming, data, sites, local, seed=5, round_number=1, repeated=True)
    for name, value in averaged.parameters.items():
        torch.testing.assert_close(value, total[name], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(value, unmerged.parameters[name], rtol=1e-6)
