import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.secure import SecureSumError, masks
from fedhead.secure.fixed_point import add
from fedhead.secure.sealing import SEALED_BYTES, seal, unseal

DIGEST = bytes(range(32))


def secret(number: int) -> bytes:
    return number.to_bytes(32, "big")


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 6), st.integers(1, 2), st.integers(0, 3 * masks.BLOCK), st.integers(0, 2**32), st.data())
def test_masks_of_survivors_and_dropouts_are_removed(
    count: int, limbs: int, length: int, seed: int, data: st.DataObject
) -> None:
    names = [f"site-{number}" for number in range(count)]
    lost = set(data.draw(st.lists(st.sampled_from(names), max_size=count - 1)))
    random = np.random.default_rng(seed)
    keys = {name: secret(seed + number + 1) for number, name in enumerate(names)}
    seeds = {name: secret(seed + 100 + number) for number, name in enumerate(names)}
    publics = {name: masks.public_key(key) for name, key in keys.items()}
    vectors = {name: random.integers(0, 2**64, (limbs, length), np.uint64) for name in names}
    total, plain = np.zeros((2, limbs, length), np.uint64)
    for name in names:
        before = vectors[name].copy()
        masked = masks.mask(vectors[name], seeds[name], keys[name], publics, DIGEST, name)
        assert (vectors[name] == before).all()
        if name not in lost:
            add(total, masked)
            add(plain, vectors[name])
    survivors = {name: publics[name] for name in names if name not in lost}
    for name in survivors:
        masks.remove_own_mask(total, seeds[name], DIGEST, name)
    for name in lost:
        masks.remove_pair_masks(total, name, keys[name], survivors, DIGEST)
    assert (total == plain).all()


def test_mask_is_key_stream_of_chacha20() -> None:
    length = masks.BLOCK + 3
    vector = np.zeros((2, length), np.uint64)
    masks.add_mask(vector, DIGEST)
    for limb in range(2):
        nonce = bytes(4) + limb.to_bytes(12, "little")
        stream = Cipher(ChaCha20(DIGEST, nonce), None).encryptor().update(bytes(8 * length))
        assert vector[limb].astype("<u8").tobytes() == stream
    masks.add_mask(vector, DIGEST, negative=True)
    assert not vector.any()


def test_keys_differ_by_purpose_session_and_site() -> None:
    keys = {
        masks.derive(secret(1), digest, purpose, *names)
        for digest in (DIGEST, bytes(32))
        for purpose in ("own mask", "pair mask", "share")
        for names in (("a", "b"), ("b", "a"), ("a",), ("ab",))
    }
    assert len(keys) == 24


def test_keys_that_give_everybody_the_same_secret_are_rejected() -> None:
    for public in (bytes(32), secret(1)[::-1]):
        with pytest.raises(SecureSumError, match="no valid X25519 key"):
            masks.pair_mask_key(secret(5), public, DIGEST, "a", "b")


def test_sealed_shares_open_only_for_their_receiver_and_session() -> None:
    shares = (bytes([1] * 33), bytes([2] * 33))
    ephemeral, roster = secret(11), secret(12)
    sealed = seal(shares, ephemeral, masks.public_key(roster), DIGEST, ("a", "b"))
    assert len(sealed) == SEALED_BYTES
    sender = masks.public_key(ephemeral)
    assert unseal(sealed, roster, sender, DIGEST, ("a", "b")) == shares
    changed = bytes([sealed[0] ^ 1]) + sealed[1:]
    for content, private, digest, names in (
        (changed, roster, DIGEST, ("a", "b")),
        (sealed[:-1], roster, DIGEST, ("a", "b")),
        (b"", roster, DIGEST, ("a", "b")),
        (sealed, secret(13), DIGEST, ("a", "b")),
        (sealed, roster, bytes(32), ("a", "b")),
        (sealed, roster, DIGEST, ("b", "a")),
    ):
        with pytest.raises(SecureSumError, match="changed on the way"):
            unseal(content, private, sender, digest, names)
