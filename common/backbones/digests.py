"""Digests of weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_weights(tensors: Mapping[str, Tensor], files: Mapping[str, str]) -> str:
    """Return `digest_tensors`, or with files the SHA-256 of it and of the files, in the order of the names."""
    digest = digest_tensors(tensors)
    if not files:
        return digest
    parts = [digest, *(f"{name}\0{hashlib.sha256(files[name].encode()).hexdigest()}" for name in sorted(files))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
