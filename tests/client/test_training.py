from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor, nn
from torch.nn import functional

from fedhead.client.labelled_features import LabelledFeatures, SiteRows
from fedhead.client.minibatches import shuffled
from fedhead.client.training import IntArray, TrainedHeads, evaluate_head, train_heads, train_in_chunks
from fedhead.config import LocalConfig
from fedhead.heads import Head, make_head
from fedhead.tasks.losses import BinaryCrossEntropy

FEATURES, CLASSES, SEED, ROUND = 6, 3, 5, 2
HEADS = ("linear", "mlp:4", "cosine")
SIZES = (5, 23, 0, 1, 8, 7, 16)

SGD = [
    LocalConfig(epochs=3, batch_size=4, momentum=momentum, weight_decay=decay, proximal_mu=mu)
    for momentum, decay, mu in product((0.0, 0.9), (0.0, 0.05), (0.0, 0.5))
]
ADAMW = [
    LocalConfig(epochs=3, batch_size=4, optimizer="adamw", lr=0.01, weight_decay=decay, proximal_mu=mu)
    for decay, mu in product((0.0, 0.05), (0.0, 0.5))
]


pytestmark = pytest.mark.usefixtures("one_thread")


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(CLASSES, FEATURES))
        self.sharpness = nn.Parameter(torch.empty(1))

    def forward(self, rows: Tensor) -> Tensor:
        return self.sharpness * functional.cosine_similarity(rows.unsqueeze(1), self.weight, dim=-1)


def reference_module(spec: str) -> nn.Module:
    if spec == "linear":
        return nn.Linear(FEATURES, CLASSES)
    if spec == "cosine":
        return Cosine()
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, CLASSES))


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 2:
        return nn.BCEWithLogitsLoss(reduction="mean")(logits, labels.to(logits))  # type: ignore[no-any-return]
    return functional.cross_entropy(logits, labels)


def train_alone(
    spec: str, incoming: dict[str, Tensor], data: LabelledFeatures, site: SiteRows, local: LocalConfig
) -> tuple[list[Tensor], float]:
    """Train as one would without fedhead; return the parameters and the mean loss of the last epoch's rows."""
    module = reference_module(spec).to(data.features.dtype)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), incoming.values(), strict=True):
            parameter.copy_(value)
    optimizer: torch.optim.Optimizer
    if local.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            module.parameters(), lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(module.parameters(), lr=local.lr, weight_decay=local.weight_decay)
    losses = [0.0]
    for epoch in range(local.epochs):
        losses = [0.0]
        rows = torch.from_numpy(site.rows[shuffled(SEED, site.name, ROUND, epoch, len(site.rows))])
        for start in range(0, len(rows), local.batch_size):
            batch = rows[start : start + local.batch_size]
            loss = mean_loss(module(data.features[batch]), data.labels[batch])
            losses.append(loss.item() * len(batch))
            for parameter, value in zip(module.parameters(), incoming.values(), strict=True):
                loss = loss + local.proximal_mu / 2 * (parameter - value).square().sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return [parameter.detach() for parameter in module.parameters()], sum(losses) / max(1, len(site.rows))


def make_problem(
    sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float64
) -> tuple[LabelledFeatures, list[SiteRows]]:
    """Sites of the given sizes, their rows scattered over more rows than they hold."""
    generator = torch.Generator().manual_seed(1)
    total = sum(sizes) + 9
    features = torch.randn(total, FEATURES, generator=generator, dtype=dtype)
    labels = torch.randint(0, CLASSES, (total,), generator=generator)
    scattered = torch.randperm(total, generator=generator).numpy()
    ends = np.cumsum(sizes)
    sites = [SiteRows(f"site-{end}", scattered[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    return LabelledFeatures(features, labels), sites


def make_incoming(spec: str, dtype: torch.dtype = torch.float64) -> tuple[Head, dict[str, Tensor]]:
    head = make_head(spec, FEATURES, CLASSES).to(dtype)
    head.randomise(torch.Generator().manual_seed(2))
    return head, head.trainable()


def train(
    head: Head, incoming: dict[str, Tensor], data: LabelledFeatures, sites: Sequence[SiteRows], local: LocalConfig
) -> TrainedHeads:
    return train_heads(head, incoming, data, sites, local, seed=SEED, round_number=ROUND)


def assert_equal(trained: TrainedHeads, other: TrainedHeads, tolerance: float = 1e-12) -> None:
    for name, value in trained.parameters.items():
        torch.testing.assert_close(value, other.parameters[name], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(trained.losses, other.losses, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(trained.rows, other.rows)


@pytest.mark.parametrize("local", SGD + ADAMW, ids=str)
@pytest.mark.parametrize("spec", HEADS)
def test_each_of_many_sites_equals_torch(spec: str, local: LocalConfig) -> None:
    data, sites = make_problem()
    head, incoming = make_incoming(spec)
    trained = train(head, incoming, data, sites, local)
    for i, site in enumerate(sites):
        expected, loss = train_alone(spec, incoming, data, site, local)
        for value, reference in zip(trained.parameters.values(), expected, strict=True):
            torch.testing.assert_close(value[i], reference, rtol=1e-9, atol=1e-9)
        assert trained.losses[i] == pytest.approx(loss, rel=1e-9)
    assert trained.rows.tolist() == list(SIZES)


def make_multi_label(data: LabelledFeatures) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 2, (len(data.labels), CLASSES), generator=generator)
    return LabelledFeatures(data.features, labels, loss=BinaryCrossEntropy())


@pytest.mark.parametrize("local", [SGD[0], SGD[-1], ADAMW[0], ADAMW[-1]], ids=str)
@pytest.mark.parametrize("spec", ["linear", "mlp:4"])
def test_multi_label_training_equals_torch(spec: str, local: LocalConfig) -> None:
    data, sites = make_problem()
    data = make_multi_label(data)
    head, incoming = make_incoming(spec)
    trained = train(head, incoming, data, sites, local)
    for i, site in enumerate(sites):
        expected, loss = train_alone(spec, incoming, data, site, local)
        for value, reference in zip(trained.parameters.values(), expected, strict=True):
            torch.testing.assert_close(value[i], reference, rtol=1e-9, atol=1e-9)
        assert trained.losses[i] == pytest.approx(loss, rel=1e-9)


def test_multi_label_evaluation_counts_exact_matches() -> None:
    data, sites = make_problem()
    data = make_multi_label(data)
    head, parameters = make_incoming("linear")
    evaluation = evaluate_head(head, parameters, data, sites)
    for i, site in enumerate(sites):
        logits, labels = head(data.features[site.rows]), data.labels[site.rows]
        if len(site.rows):
            assert evaluation.losses[i] == pytest.approx(len(site.rows) * mean_loss(logits, labels).item())
        assert evaluation.scores[i] == int(((logits > 0) == labels.bool()).all(1).sum())


@pytest.mark.parametrize("local", [SGD[0], SGD[-1], ADAMW[-1]], ids=str)
@pytest.mark.parametrize("spec", HEADS)
def test_one_site_equals_torch_to_float32_rounding(spec: str, local: LocalConfig) -> None:
    data, (site,) = make_problem([30], torch.float32)
    head, incoming = make_incoming(spec, torch.float32)
    trained = train(head, incoming, data, [site], local)
    expected, loss = train_alone(spec, incoming, data, site, local)
    for value, reference in zip(trained.parameters.values(), expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value[0], reference, rtol=1e-4, atol=1e-5)
    assert trained.losses[0] == pytest.approx(loss, rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    chosen=strategies.lists(strategies.sampled_from(range(len(SIZES))), unique=True),
    chunk_bytes=strategies.sampled_from([1, 20_000, 2**28]),
    batch_size=strategies.sampled_from([1, 4, 100]),
    spec=strategies.sampled_from(HEADS),
)
def test_site_is_independent_of_other_sites_and_chunks(
    chosen: list[int], chunk_bytes: int, batch_size: int, spec: str
) -> None:
    local = LocalConfig(epochs=2, batch_size=batch_size, momentum=0.5)
    data, sites = make_problem()
    head, incoming = make_incoming(spec)
    together = train(head, incoming, data, sites, local)
    some = train_heads(
        head,
        incoming,
        data,
        [sites[i] for i in chosen],
        local,
        seed=SEED,
        round_number=ROUND,
        chunk_bytes=chunk_bytes,
    )
    expected = {name: value[chosen] for name, value in together.parameters.items()}
    assert_equal(some, TrainedHeads(expected, together.losses[chosen], together.rows[chosen]))


def test_chunks_cover_every_site_once_and_can_be_small() -> None:
    data, sites = make_problem()
    head, incoming = make_incoming("linear")
    chunks = list(train_in_chunks(head, incoming, data, sites, LocalConfig(), seed=0, round_number=1, chunk_bytes=1))
    assert [len(positions) for positions, _ in chunks] == [1] * len(sites)
    assert sorted(np.concatenate([positions for positions, _ in chunks])) == list(range(len(sites)))
    assert [trained.rows[0] for _, trained in chunks] == sorted(SIZES, reverse=True)


def test_site_without_rows_returns_the_incoming_head() -> None:
    data, sites = make_problem([0, 4, 0])
    head, incoming = make_incoming("mlp:4")
    for chosen in (sites, sites[:1]):
        trained = train(head, incoming, data, chosen, LocalConfig(weight_decay=0.1))
        assert (trained.losses[0], trained.rows[0]) == (0.0, 0)
        for name, value in incoming.items():
            assert torch.equal(trained.parameters[name][0], value)


def test_no_sites_give_empty_stacks() -> None:
    data, _ = make_problem()
    head, incoming = make_incoming("linear")
    trained = train(head, incoming, data, [], LocalConfig())
    assert trained.parameters["weight"].shape == (0, CLASSES, FEATURES)
    assert trained.losses.shape == trained.rows.shape == (0,)
    assert evaluate_head(head, incoming, data, []).rows.shape == (0,)


def test_inputs_are_not_modified() -> None:
    data, sites = make_problem()
    mean, scale = torch.ones(FEATURES), torch.full((FEATURES,), 2.0)
    data = LabelledFeatures(data.features, data.labels, (mean, scale))
    head, incoming = make_incoming("linear")
    before = {name: value.clone() for name, value in incoming.items()}, data.features.clone()
    train(head, incoming, data, sites, LocalConfig(momentum=0.9))
    assert all(torch.equal(value, incoming[name]) for name, value in before[0].items())
    assert torch.equal(data.features, before[1])


@pytest.mark.parametrize("spec", HEADS)
def test_standardisation_equals_training_on_standardised_features(spec: str) -> None:
    data, sites = make_problem()
    mean = torch.linspace(-1, 1, FEATURES, dtype=torch.float64)
    scale = torch.linspace(0.5, 2, FEATURES, dtype=torch.float64)
    head, incoming = make_incoming(spec)
    local = LocalConfig(batch_size=4)
    lazily = LabelledFeatures(data.features, data.labels, (mean, scale))
    eagerly = LabelledFeatures((data.features - mean) / scale, data.labels)
    assert_equal(train(head, incoming, lazily, sites, local), train(head, incoming, eagerly, sites, local))
    np.testing.assert_allclose(
        evaluate_head(head, incoming, lazily, sites).losses, evaluate_head(head, incoming, eagerly, sites).losses
    )


def test_features_in_a_half_precision_memory_map(tmp_path: Path) -> None:
    data, sites = make_problem(dtype=torch.float32)
    stored = np.memmap(tmp_path / "features", np.float16, "w+", shape=tuple(data.features.shape))
    stored[:] = data.features.numpy()
    head, incoming = make_incoming("linear", torch.float32)
    mapped = LabelledFeatures(torch.from_numpy(stored), data.labels)
    whole = LabelledFeatures(torch.from_numpy(stored).float(), data.labels)
    assert_equal(
        train(head, incoming, mapped, sites, LocalConfig()), train(head, incoming, whole, sites, LocalConfig())
    )


@pytest.mark.parametrize("batch_size", [32, 10_000])
def test_padding_is_bounded_for_sites_of_different_sizes(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [5000, 5, 3, 700, 40, 31, 64, 1]
    data, sites = make_problem(sizes, torch.float32)
    head, incoming = make_incoming("linear", torch.float32)
    gathered = 0
    gather = LabelledFeatures.gather

    def count(self: LabelledFeatures, rows: IntArray, like: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal gathered
        gathered += rows.size
        return gather(self, rows, like)

    monkeypatch.setattr(LabelledFeatures, "gather", count)
    train(head, incoming, data, sites, LocalConfig(batch_size=batch_size))
    assert gathered < 1.05 * sum(sizes)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("spec", HEADS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_broken_row_affects_only_its_own_site(spec: str, optimizer: str, bad: float) -> None:
    data, sites = make_problem(dtype=torch.float32)
    head, incoming = make_incoming(spec, torch.float32)
    local = LocalConfig.model_validate({"batch_size": 4, "optimizer": optimizer, "epochs": 2})
    whole = train(head, incoming, data, sites, local)
    broken = data.features.clone()
    broken[sites[1].rows[3]] = bad
    trained = train(head, incoming, LabelledFeatures(broken, data.labels), sites, local)
    others = [i for i in range(len(sites)) if i != 1]
    for name, value in trained.parameters.items():
        torch.testing.assert_close(value[others], whole.parameters[name][others])
    evaluate_head(head, incoming, LabelledFeatures(broken, data.labels), sites)


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**28])
@pytest.mark.parametrize("spec", HEADS)
def test_evaluation_sums_over_each_sites_rows(spec: str, chunk_bytes: int) -> None:
    data, sites = make_problem()
    head, parameters = make_incoming(spec)
    evaluation = evaluate_head(head, parameters, data, sites, chunk_bytes=chunk_bytes)
    for i, site in enumerate(sites):
        logits, labels = head(data.features[site.rows]), data.labels[site.rows]
        assert evaluation.losses[i] == pytest.approx(functional.cross_entropy(logits, labels, reduction="sum").item())
        assert evaluation.scores[i] == int((logits.argmax(-1) == labels).sum())
        assert evaluation.rows[i] == len(site.rows)
    assert evaluation.losses.dtype == np.float64
