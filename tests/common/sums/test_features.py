import base64
import json
import zlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedhead.errors import UserError
from fedhead.sums.features import FeatureStatistics
from fedhead.sums.targets import CLASSES, LABELS, VALUES, TargetKind


def random_rows(seed: int, n: int, d: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    means = torch.randn(classes, d, generator=generator)
    return torch.randn(n, d, generator=generator) + means[labels], labels


def random_targets(seed: int, n: int, classes: int) -> Tensor:
    return torch.rand(n, classes, generator=torch.Generator().manual_seed(seed)) < 0.4


def random_values(seed: int, n: int, targets: int) -> Tensor:
    return 3 + torch.randn(n, targets, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int, n: int = 40, d: int = 5, classes: int = 3) -> FeatureStatistics:
    return FeatureStatistics.from_features(*random_rows(seed, n, d, classes), classes)


def same_bits(first: FeatureStatistics, second: FeatureStatistics) -> bool:
    one, other = first.to_tensors(), second.to_tensors()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_sums_equal_direct_computation() -> None:
    features, labels = random_rows(0, 50, 6, 4)
    origin = torch.linspace(-1, 1, 6, dtype=torch.float64)
    stats = FeatureStatistics.from_features(features, labels, 5, origin)
    rows = features.double() - origin
    assert stats.rows == 50
    assert stats.counts.tolist() == torch.bincount(labels, minlength=5).tolist()
    for number in range(5):
        torch.testing.assert_close(stats.sums[number], rows[labels == number].sum(0))
    torch.testing.assert_close(stats.total, rows.sum(0))
    torch.testing.assert_close(stats.gram(), rows.T @ rows)
    assert torch.equal(stats.gram(), stats.gram().T)
    torch.testing.assert_close(stats.scatter(), (rows - rows.mean(0)).T @ (rows - rows.mean(0)))
    centred = rows.clone()
    for number in range(5):
        centred[labels == number] -= rows[labels == number].mean(0)
    torch.testing.assert_close(stats.within_scatter(), centred.T @ centred)
    torch.testing.assert_close(stats.mean(), features.double().mean(0))
    torch.testing.assert_close(stats.scale(), features.double().std(0, correction=0))


def test_multi_label_sums_equal_direct_computation() -> None:
    features, _ = random_rows(1, 30, 4, 2)
    targets = random_targets(1, 30, 3)
    for labels in (targets, targets.float(), targets.long()):
        stats = FeatureStatistics.from_features(features, labels, 3, kind=LABELS)
        assert stats.rows == 30
        assert stats.counts.tolist() == targets.sum(0).tolist()
        torch.testing.assert_close(stats.sums, targets.double().T @ features.double())
        torch.testing.assert_close(stats.total, features.double().sum(0))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_streaming_equals_one_update(size: int) -> None:
    features, labels = random_rows(2, 150, 300, 3)  # more features than a panel is wide
    whole = FeatureStatistics.from_features(features, labels, 3)
    stats = FeatureStatistics.empty(300, 3)
    for rows, numbers in zip(features.split(size), labels.split(size), strict=True):
        stats.update(rows, numbers)
    assert stats.is_close(whole, 1e-13)
    torch.testing.assert_close(whole.gram(), features.double().T @ features.double())


def test_blocks_cover_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = random_rows(3, 100, 4, 3)
    whole = FeatureStatistics.from_features(features, labels, 3)
    monkeypatch.setattr("fedhead.sums.features._BLOCK_ROWS", 33)
    assert FeatureStatistics.from_features(features, labels, 3).is_close(whole, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_features_of_any_type(dtype: torch.dtype) -> None:
    features = (random_rows(4, 20, 3, 2)[0] * 10).abs().to(dtype)
    stats = FeatureStatistics.from_features(features, torch.zeros(20, dtype=torch.uint8), 1)
    torch.testing.assert_close(stats.gram(), features.double().T @ features.double())


def test_origin_at_the_mean_preserves_small_deviations() -> None:
    generator = torch.Generator().manual_seed(5)
    features = 100 + 0.01 * torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    labels = torch.zeros(2000, dtype=torch.long)
    near = FeatureStatistics.from_features(features, labels, 1, torch.full((3,), 100.0))
    far = FeatureStatistics.from_features(features, labels, 1)
    exact = (features - 100).std(0, correction=0)
    torch.testing.assert_close(near.scale(), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(far.scale(), exact, rtol=1e-5, atol=0)


def test_rebasing_equals_accumulating_about_the_other_origin() -> None:
    features, labels = random_rows(6, 60, 5, 3)
    first, second = torch.full((5,), 2.0), torch.linspace(-3, 3, 5)
    stats = FeatureStatistics.from_features(features, labels, 3, first)
    moved = stats.about(second)
    assert moved.is_close(FeatureStatistics.from_features(features, labels, 3, second), 1e-12)
    assert moved.about(first).is_close(stats, 1e-12)
    with pytest.raises(ValueError, match="different origins"):
        _ = stats + moved


@pytest.mark.parametrize("rows", [10, 1000, 100_000])
@pytest.mark.parametrize("value", [0.0, 1 / 3, 100.1, -7e20])
def test_constant_features_have_scale_one(rows: int, value: float) -> None:
    features = torch.full((rows, 2), value)
    features[:, 1] = torch.arange(rows) % 2
    stats = FeatureStatistics.from_features(features, torch.zeros(rows, dtype=torch.long), 1)
    assert stats.scale().tolist() == [1.0, 0.5]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    kind=st.sampled_from([CLASSES, LABELS, VALUES]),
)
def test_any_partition_in_any_order_sums_to_the_whole(seed: int, n: int, cuts: list[int], kind: TargetKind) -> None:
    features, labels = random_rows(seed, n, 4, 3)
    if kind is LABELS:
        labels = random_targets(seed, n, 3)
    elif kind is VALUES:
        labels = random_values(seed, n, 3)
    whole = FeatureStatistics.from_features(features, labels, 3, kind=kind)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    sites = [order[start:stop] for start, stop in pairwise(edges)]
    parts = [FeatureStatistics.from_features(features[site], labels[site], 3, kind=kind) for site in sites]
    pooled = sum(parts, FeatureStatistics.empty(4, 3, kind=kind))
    assert pooled.is_close(whole, 1e-12)
    assert sum(parts).is_close(whole, 1e-12)
    remaining = pooled - parts[0]
    assert remaining.is_close(sum(parts[1:], FeatureStatistics.empty(4, 3, kind=kind)), 1e-8)
    unpacked = FeatureStatistics.from_tensors(pooled.to_tensors())
    assert same_bits(unpacked, pooled)
    assert torch.equal(unpacked.gram(), pooled.gram())
    FeatureStatistics.from_tensors(remaining.to_tensors())


def test_sum_shares_nothing_with_its_parts() -> None:
    part = problem(7)
    before = part.copy()
    pooled = sum([part])
    pooled += part
    assert same_bits(part, before)
    assert pooled.rows == 2 * part.rows
    pooled -= part
    assert pooled.is_close(part, 1e-13)


def test_subtracting_everything_leaves_exact_zeros() -> None:
    part, other = problem(8), problem(9)
    assert same_bits(part + other - part - other, FeatureStatistics.empty(5, 3))


def test_subtracting_unknown_rows_is_rejected() -> None:
    with pytest.raises(ValueError, match="never added"):
        _ = problem(1, n=10) - problem(1, n=11)
    one = FeatureStatistics.from_features(torch.ones(2, 1), torch.tensor([0, 0]), 2)
    other = FeatureStatistics.from_features(torch.ones(1, 1), torch.tensor([1]), 2)
    with pytest.raises(ValueError, match="never added"):
        _ = one - other


def test_a_class_can_be_added_and_merged() -> None:
    features, labels = random_rows(10, 40, 4, 3)
    old = labels < 2
    stats = FeatureStatistics.from_features(features[old], labels[old], 2)
    new = FeatureStatistics.from_features(features[~old], labels[~old], 3)
    with pytest.raises(ValueError, match="Cannot combine"):
        _ = stats + new
    merged = stats.add_class() + new
    assert merged.is_close(FeatureStatistics.from_features(features, labels, 3), 1e-13)


def test_different_kinds_cannot_be_combined() -> None:
    single = FeatureStatistics.empty(2, 3)
    for other in (
        FeatureStatistics.empty(3, 3),
        FeatureStatistics.empty(2, 2),
        FeatureStatistics.empty(2, 3, kind=LABELS),
    ):
        with pytest.raises(ValueError, match="Cannot combine"):
            single += other
        assert not single.is_close(other)
    with pytest.raises(TypeError):
        _ = 1 + single  # type: ignore[operator]


def test_statistics_of_other_rows_are_not_close() -> None:
    stats = problem(11)
    changed = stats.copy()
    changed.upper[0, 1] *= 1 + 1e-6
    assert not stats.is_close(changed)
    assert stats.is_close(changed, 1e-5)
    assert not stats.is_close(problem(12))
    assert not stats.is_close(stats.about(torch.ones(5)))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.tensor([0, 3]), "from 0 to 2, not from 0 to 3"),
        (torch.tensor([-1, 0]), "not from -1 to 0"),
        (torch.tensor([0.0, 1.0]), "class numbers"),
        (torch.tensor([0]), "class numbers"),
        (torch.zeros(2, 3), "class numbers"),
    ],
)
def test_invalid_labels_are_rejected(labels: Tensor, reason: str) -> None:
    stats = FeatureStatistics.empty(2, 3)
    with pytest.raises(ValueError, match=reason):
        stats.update(torch.ones(2, 2), labels)
    assert same_bits(stats, FeatureStatistics.empty(2, 3))


def test_invalid_multi_label_targets_are_rejected() -> None:
    stats = FeatureStatistics.empty(2, 3, kind=LABELS)
    for labels, reason in (
        (torch.tensor([0, 1]), "Labels must be"),
        (torch.full((2, 3), 0.5), "must be 0 or 1"),
        (torch.full((2, 3), torch.nan), "must be 0 or 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            stats.update(torch.ones(2, 2), labels)


def test_invalid_features_are_rejected() -> None:
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        FeatureStatistics.from_features(torch.ones(3), labels, 1)
    with pytest.raises(ValueError, match=r"\[n, 2\]"):
        FeatureStatistics.empty(2, 1).update(torch.ones(3, 4), labels)
    for value in (torch.nan, torch.inf):
        features = torch.ones(3, 2)
        features[1, 0] = value
        with pytest.raises(ValueError, match="Row 1 has a feature that is not finite"):
            FeatureStatistics.from_features(features, labels, 1)
    with pytest.raises(ValueError, match="origin must be 2"):
        FeatureStatistics.empty(2, 1, torch.zeros(3))
    with pytest.raises(ValueError, match="0 features"):
        FeatureStatistics.empty(0, 1)


def test_no_rows() -> None:
    stats = FeatureStatistics.from_features(torch.ones(0, 2), torch.zeros(0, dtype=torch.long), 3)
    assert same_bits(stats, FeatureStatistics.empty(2, 3))
    for ask in (stats.mean, stats.scale, stats.scatter):
        with pytest.raises(UserError, match="no rows"):
            ask()
    assert same_bits(FeatureStatistics.from_tensors(stats.to_tensors()), stats)


def test_gram_matrix_is_packed() -> None:
    tensors = problem(13).to_tensors()
    assert tensors["gram"].shape == (15,)
    assert sum(tensor.nbytes for tensor in tensors.values()) == 8 * (15 + 15 + 5 + 5 + 3 + 1) + 1


def tampered(name: str, index: tuple[int, ...], value: float) -> dict[str, Tensor]:
    tensors = {key: tensor.clone() for key, tensor in problem(14).add_class().to_tensors().items()}
    tensors[name][index] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (tampered("gram", (3,), torch.nan), "'gram' has a value that is not finite"),
        (tampered("sums", (0, 0), torch.inf), "'sums' has a value that is not finite"),
        (tampered("origin", (0,), torch.inf), "'origin' has a value that is not finite"),
        (tampered("gram", (3,), 1e200), r"not finite or beyond 1e\+100"),
        (tampered("rows", (0,), 2**60), "No site has 1152921504606846976 rows"),
        (tampered("counts", (0,), -1), "negative number of rows"),
        (tampered("rows", (0,), -40), "negative number of rows"),
        (tampered("rows", (0,), 41), "have 40 rows, but there are 41"),
        (tampered("counts", (0,), 50), "more rows than the total of 40"),
        (tampered("gram", (0,), -1.0), "sum of squares is negative"),
        (tampered("gram", (1,), 1e6), "exceeds the bound from its diagonal"),
        (tampered("gram", (0,), 0.0), "larger than their sum of squares allows"),
        (tampered("sums", (3, 0), 1e-3), "without rows has a nonzero sum"),
        (tampered("sums", (0, 0), 1e4), "larger than their sum of squares allows"),
        (tampered("total", (0,), 1e4), "larger than their sum of squares allows"),
        (tampered("total", (0,), 0.0), "do not add up"),
        ({**tampered("rows", (0,), 40), "more": torch.ones(1)}, "Statistics consist of"),
        ({**tampered("rows", (0,), 40), "gram": torch.ones(14).double()}, r"'gram' as \[15\], not \[14\]"),
        ({**tampered("rows", (0,), 40), "gram": torch.ones(15)}, "of torch.float64"),
        ({**tampered("rows", (0,), 40), "sums": torch.ones(4, 4).double()}, r"'sums' as \[4, 5\]"),
        ({**tampered("rows", (0,), 40), "counts": torch.ones(4, dtype=torch.float64)}, "of torch.int64"),
        ({**tampered("rows", (0,), 40), "origin": torch.ones(0).double()}, "at least one feature"),
    ],
)
def test_impossible_statistics_are_rejected(tensors: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FeatureStatistics.from_tensors(tensors)


@pytest.mark.parametrize("name", ["gram", "target_squares"])
def test_squares_without_rows_are_rejected(name: str) -> None:
    tensors = FeatureStatistics.empty(3, 2, kind=VALUES).to_tensors()
    FeatureStatistics.from_tensors(tensors)
    tensors[name][0] = 1.0
    with pytest.raises(ValueError, match="no rows"):
        FeatureStatistics.from_tensors(tensors)


def test_received_statistics_can_be_added_to() -> None:
    tensors = problem(15).to_tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    stats = FeatureStatistics.from_tensors(tensors)
    stats += problem(16)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", [CLASSES, LABELS, VALUES], ids=["classes", "labels", "values"])
def test_save_and_load_keep_every_bit(tmp_path, kind: TargetKind) -> None:
    features, labels = random_rows(17, 20, 4, 3)
    targets = {CLASSES: labels, LABELS: random_targets(17, 20, 3), VALUES: random_values(17, 20, 3)}[kind]
    stats = FeatureStatistics.from_features(features, targets, 3, torch.full((4,), 0.1), kind=kind)
    path = tmp_path / "pooled.safetensors"
    stats.save(path)
    assert same_bits(FeatureStatistics.load(path), stats)
    (stats + stats).save(str(path))
    assert FeatureStatistics.load(str(path)).rows == 40
    assert [entry.name for entry in tmp_path.iterdir()] == ["pooled.safetensors"]


EARLIER_FILE = zlib.decompress(
    base64.b85decode(
        b"c-obcO=`n15QWwD5?yo=wCX|>{oBf>p^HMHkOKr`6iH4Dc3do(QiAW?Bh<39NNAdpw-Gba_nrpk@fM8Q!#uBD&{hYX=WxD<"
        b"Mbp+gz&R|O-8yZbe9)ovp)`I*AcB6YsgT3H(~47@NS3NKHUb+ZtmBDdiW8R-Oh}q4!IFd%riHOaq)IYQ6vGL(NdbEVP1EgykF"
        b"hp<eYnB(P4X!uRx6qzIDV}u3h&~}6-Gp61KKv97eMkGBoa{`$xW;4WAgPsl5)goB%8L}l)I}~MiIx6^<C}%CMi0@a*V_{YiNS"
        b"5u8I{B$#K}at3sJqdhJdOUY5)E%MOwwDYCwwjk=lE1sv7}+<{|>#YqXipQrQw(0^EfABnfB{r"
    )
)
"""Statistics of the rows 1, 2 and 4 of classes 0, 1 and 1, as the first version of the format has them."""


def test_a_file_of_an_earlier_version_is_read(tmp_path) -> None:
    path = tmp_path / "earlier.safetensors"
    path.write_bytes(EARLIER_FILE)
    rows, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 1])
    expected = FeatureStatistics.from_features(rows, labels, 2)
    assert same_bits(FeatureStatistics.load(path), expected)
    expected.save(path)
    assert tensors_and_metadata(path.read_bytes()) == tensors_and_metadata(EARLIER_FILE)


def tensors_and_metadata(file: bytes) -> tuple[dict[str, object], bytes]:
    """The header and the tensors of a safetensors file, which writes its metadata in an order of its own."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def test_files_of_other_formats_are_rejected(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "file"
    with pytest.raises(UserError, match="There are no feature statistics at"):
        FeatureStatistics.load(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        FeatureStatistics.load(path)
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match="does not contain feature statistics"):
        FeatureStatistics.load(path)
    with pytest.raises(UserError, match=r"cannot be read|no feature statistics"):
        FeatureStatistics.load(tmp_path)


def test_damage_anywhere_in_a_file_is_detected(tmp_path) -> None:
    path = tmp_path / "file"
    stats = problem(18, d=2)
    stats.save(path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            assert same_bits(FeatureStatistics.load(path), stats)  # a space of the header's padding
        except UserError as error:
            assert str(path) in str(error)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=str(path)):
            FeatureStatistics.load(path)


def test_contradictory_file_is_rejected(tmp_path) -> None:
    stats = problem(19)
    stats.total *= 0
    stats.save(tmp_path / "file")
    with pytest.raises(UserError, match="do not add up"):
        FeatureStatistics.load(tmp_path / "file")


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    problem(20).save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("fedhead.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        problem(21).save(path)
    assert same_bits(FeatureStatistics.load(path), problem(20))
    assert len(list(tmp_path.iterdir())) == 1
