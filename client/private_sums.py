"""Exact sums of private runs, before the release steps add noise: of rows with norm 1, each row or group weighing 1."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor
from torch.nn import functional

from fedhead.client.agreement import Agreement, agreement
from fedhead.client.answers import Answer, of_several, shared
from fedhead.client.site_data import Holding, Site
from fedhead.data import IntArray
from fedhead.privacy.sensitivity import group_weights, svec, unit_rows
from fedhead.privacy.stages import BIAS_FEATURE, BINS, CLIP, LOSS_LIMIT, TEMPERATURES
from fedhead.protocol.messages import MessageError, Payload
from fedhead.protocol.private import PrivateRequest
from fedhead.sums.sums import Arrays

BLOCK_ROWS = 2048
"""Rows whose features are in float64 at a time."""

Block = tuple[Tensor, Tensor, Tensor]
"""Rows of norm 1 `[n, d]`, their classes `[n]`, and their weights `[n]`, float64."""


def private(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Compute the sums that a private run requests; the release steps add the noise."""
    agreed = agreement(context)
    manifest = agreed.manifest
    if manifest.privacy is None:
        raise MessageError("it asks for noisy sums, but its run is not differentially private")
    request = PrivateRequest.from_payload(payload, len(manifest.classes), manifest.num_features)
    if "confusion" in request.mechanism(len(manifest.classes), manifest.num_features).arrays:
        agreed.check_cells()
    for positions in shared(sites, merged):
        sums = private_sums([sites[position].open(manifest) for position in positions], agreed, request)
        answered = of_several(sums, len(positions))
        yield Answer(positions, answered, manifest, (request.account,), request)


def private_sums(holdings: Sequence[Holding], agreed: Agreement, request: PrivateRequest) -> Arrays:
    """Return the sums of a request over the rows of some sites, as `fedhead.privacy.stages` defines them."""
    classes, features = len(agreed.manifest.classes), agreed.manifest.num_features
    forms = request.mechanism(classes, features).arrays
    total = {name: torch.zeros(form.shape, dtype=torch.float64) for name, form in forms.items()}
    if request.stage in ("lda", "nearest-mean"):
        gram = torch.zeros(features, features, dtype=torch.float64)
        for rows, labels, weights in blocks(holdings, agreed, request):
            weighted = rows * weights[:, None]
            total["counts"].index_add_(0, labels, weights)
            total["sums"].index_add_(0, labels, weighted)
            if "gram" in total:
                gram.addmm_(weighted.T, rows)
        if "gram" in total:
            total["gram"] += svec(gram)
    else:
        adders = {"centre": _add_centre, "gradient": _add_gradient, "calibration": _add_excess}
        add = adders.get(request.stage, _add_evaluation)
        head = {name: torch.from_numpy(np.array(array)).double() for name, array in request.arrays.items()}
        for block in blocks(holdings, agreed, request):
            add(total, block, head)
    return {name: value.numpy() for name, value in total.items()}


def blocks(holdings: Sequence[Holding], agreed: Agreement, request: PrivateRequest) -> Iterator[Block]:
    """Yield the rows of some sites, as the head sees them, block by block."""
    assert agreed.manifest.privacy is not None
    origin = agreed.probe.double().mean(0)
    shift = torch.from_numpy(np.array(request.arrays["shift"])).double() if "shift" in request.arrays else None
    for holding in holdings:
        chosen = (holding.held_out if request.account == "held_out" else holding.train).rows
        weights = _weights(chosen, holding, agreed.manifest.privacy.unit)
        for start in range(0, len(chosen), BLOCK_ROWS):
            part = torch.from_numpy(chosen[start : start + BLOCK_ROWS])
            rows = unit_rows(holding.data.features[part].cpu().double() - origin)
            if shift is not None:
                rows = unit_rows(rows - shift)
            labels = holding.data.labels[part].cpu().long()
            yield rows, labels, weights[start : start + BLOCK_ROWS]


def _weights(rows: IntArray, holding: Holding, unit: str) -> Tensor:
    if unit == "row":
        return torch.ones(len(rows), dtype=torch.float64)
    return group_weights(torch.from_numpy(holding.keys[rows].astype(np.int64)))


def _add_centre(total: dict[str, Tensor], block: Block, head: dict[str, Tensor]) -> None:
    rows, _, weights = block
    total["count"] += weights.sum()
    total["total"] += weights @ rows


def _add_gradient(total: dict[str, Tensor], block: Block, head: dict[str, Tensor]) -> None:
    rows, labels, weights = block
    residuals = clipped_residuals(rows, labels, head) * weights[:, None]
    total["gradient"] += torch.cat([residuals.T @ rows, BIAS_FEATURE * residuals.sum(0)[:, None]], dim=1)


def clipped_residuals(rows: Tensor, labels: Tensor, head: dict[str, Tensor]) -> Tensor:
    """Return `[n, C]`, the gradient of each row's cross entropy by the logits, scaled by its limit.

    The gradient by weight and bias is its outer product with the row and `BIAS_FEATURE`: their norms multiply. It is
    scaled so that this norm is at most `CLIP` (Abadi et al., 2016), without a gradient for each row in memory.

    Args:
        rows: `[n, d]`.
        labels: `[n]`.
        head: `weight` `[C, d]` and `bias` `[C]`.
    """
    residuals = torch.softmax(_logits(rows, head), dim=1)
    residuals[torch.arange(len(labels)), labels] -= 1
    lengths = residuals.norm(dim=1) * (rows.square().sum(1) + BIAS_FEATURE**2).sqrt()
    limited: Tensor = residuals * (CLIP / lengths.clamp_min(CLIP))[:, None]
    return limited


def _add_excess(total: dict[str, Tensor], block: Block, head: dict[str, Tensor]) -> None:
    rows, labels, weights = block
    logits = _logits(rows, head)
    right = (logits.argmax(1) == labels).double()
    confidence = torch.stack([torch.softmax(logits / one, 1).amax(1) for one in TEMPERATURES])
    total["excess"] += (confidence - right) @ weights


def _add_evaluation(total: dict[str, Tensor], block: Block, head: dict[str, Tensor]) -> None:
    rows, labels, weights = block
    log_probabilities = functional.log_softmax(_logits(rows, head), dim=1)
    confidence, predicted = log_probabilities.exp().max(dim=1)
    right = (predicted == labels).long()
    losses = -log_probabilities[torch.arange(len(labels)), labels]
    total["outcomes"].index_add_(0, right, weights)
    total["loss"] += weights @ losses.clamp(0, LOSS_LIMIT)
    classes = len(total["confusion"])
    total["confusion"].view(-1).index_add_(0, labels * classes + predicted, weights)
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    total["reliability"].view(-1).index_add_(0, right * BINS + place, weights)


def _logits(rows: Tensor, head: dict[str, Tensor]) -> Tensor:
    return rows @ head["weight"].T + head["bias"]
