import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.secure import SecureSumError
from fedhead.secure.shamir import PRIME, SHARE_BYTES, coefficients, combine, share


@settings(deadline=None, max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = dict(enumerate(share(secret, threshold, count), start=1))
    held = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert combine({position: shares[position] for position in held}, coefficients(held)) == secret


def test_largest_secret() -> None:
    secret = b"\xff" * 32
    shares = dict(enumerate(share(secret, 3, 4), start=1))
    assert combine(shares, coefficients([1, 2, 4])) == secret


def test_one_share_too_few_fits_every_secret() -> None:
    """For each possible secret there is exactly one last share that fits, so the others tell nothing."""
    shares = dict(enumerate(share(bytes(32), 3, 3), start=1))
    at_zero = coefficients([1, 2, 3])
    for secret in (1, 12345, 2**256 - 1):
        known = sum(int.from_bytes(shares[position], "big") * at_zero[position] for position in (1, 2))
        last = (secret - known) * pow(at_zero[3], -1, PRIME) % PRIME
        fitting = {**shares, 3: last.to_bytes(SHARE_BYTES, "big")}
        assert combine(fitting, at_zero) == secret.to_bytes(32, "big")


def test_shares_of_repeated_splits_differ() -> None:
    assert share(bytes(32), 2, 3) != share(bytes(32), 2, 3)


def test_what_is_no_share_is_rejected() -> None:
    shares = dict(enumerate(share(bytes(32), 2, 3), start=1))
    for wrong in (b"", shares[1][:-1], b"\xff" * 33, PRIME.to_bytes(33, "big")):
        with pytest.raises(SecureSumError, match="no element"):
            combine({**shares, 1: wrong}, coefficients([1, 2]))
    for secret, threshold, count in ((b"short", 2, 3), (bytes(32), 4, 3), (bytes(32), 0, 3)):
        with pytest.raises(ValueError, match="cannot be shared"):
            share(secret, threshold, count)
    at_zero = coefficients([1, 2])
    # The secret 2^256, which no 32 bytes hold.
    one, other = 5, (2**256 - 5 * at_zero[1]) * pow(at_zero[2], -1, PRIME) % PRIME
    assert combine({1: one.to_bytes(33, "big"), 2: other.to_bytes(33, "big")}, at_zero) is None


def test_prime_is_the_smallest_above_all_secrets() -> None:
    def is_prime(number: int) -> bool:
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in range(2, 60):
            value = pow(base, odd, number)
            if value not in (1, number - 1) and all(
                (value := value * value % number) != number - 1 for _ in range(twos)
            ):
                return False
        return True

    assert is_prime(PRIME)
    assert not any(is_prime(number) for number in range(2**256, PRIME))
