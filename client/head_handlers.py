"""Handlers of the actions about a head: sites train it, evaluate it, calibrate it, or compare it with others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Context
from torch import Tensor

from fedhead.client.agreement import (
    Agreement,
    agreement,
    empty_head,
    head_of,
)
from fedhead.client.answers import Answer, of_several, shared
from fedhead.client.averaging import average_heads
from fedhead.client.gradients import sum_gradient
from fedhead.client.head_answers import answered_alone, evaluated, merged_reply
from fedhead.client.labelled_features import LabelledFeatures
from fedhead.client.place_training import outputs_at_places, train_on_places
from fedhead.client.site_data import Holding, Site
from fedhead.client.tails import activations_of, lone_head, tuned_head
from fedhead.client.training import evaluate_head, train_in_chunks
from fedhead.config import LocalConfig
from fedhead.data import IntArray, calibration_half
from fedhead.evaluation.comparison import HEADS
from fedhead.heads import Head, LinearHead
from fedhead.heads.tail import HEAD, TAIL, part_of
from fedhead.protocol.heads import CalibrateRequest, HeadRequest, ReportRequest, SubgroupsRequest
from fedhead.protocol.messages import (
    MessageError,
    Payload,
    check_arrays,
)
from fedhead.protocol.steps import Part
from fedhead.sums.heads import (
    EXAMPLES,
    HELD_OUT,
    LOSS_SUM,
    METRICS,
    SCORE,
    TRAIN_LOSS,
    FloatArray,
    HeadSums,
)
from fedhead.sums.score_bins import ScoreBins
from fedhead.sums.subgroups import SubgroupSums
from fedhead.sums.sums import Arrays, Sums

SCORED_ROWS = 8192
"""Rows whose features are in memory at a time while a head is evaluated in detail."""


def compare(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Compare the `HEADS` that arrived on held-out rows."""
    agreed = agreement(context)
    shape = (len(HEADS), len(agreed.manifest.classes))
    expected: dict[str, npt.NDArray[Any]] = {
        "weight": np.zeros((*shape, agreed.num_features), np.float32),
        "bias": np.zeros(shape, np.float32),
    }
    if agreed.task.compares_losses:
        expected["scale"] = np.zeros(shape[1])
    check_arrays(payload.arrays, expected)
    received = {name: torch.from_numpy(np.array(array)) for name, array in payload.arrays.items()}
    scale = received.get("scale")
    if scale is not None and not bool((scale > 0).all()):
        raise MessageError("its scale is not positive")
    number = torch.float32 if scale is None else torch.float64
    heads = [
        LinearHead.from_weights(weight, bias).to(number)
        for weight, bias in zip(received["weight"], received["bias"], strict=True)
    ]
    for positions in shared(sites, merged):
        sums: Sums | None = None
        for position in positions:
            holding = sites[position].open(agreed.manifest)
            data = replace(holding.data, mapping=agreed.mapping)
            rows = torch.from_numpy(holding.held_out.rows)
            for some in torch.split(rows, SCORED_ROWS):
                features = data.exact(some).to(number)
                with torch.inference_mode():
                    outputs = [head(features) for head in heads]
                own = agreed.task.compare_heads(outputs, data.labels[some].cpu(), scale)
                sums = own if sums is None else sums + own
        assert sums is not None
        yield Answer(positions, of_several(sums.to_arrays(), len(positions)), agreed.manifest, ("held_out",))


def train(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Train the head at all sites at once, and evaluate the incoming one on their held-out rows."""
    agreed = agreement(context)
    manifest = agreed.manifest
    request = HeadRequest.from_payload(payload, form_of(sites, agreed, payload.arrays, part=True))
    asked, limits = asked_settings(agreed, request), sites[0].training
    limits.check(asked)
    ready = prepare(sites, agreed, request)
    local = agreed.task.local(asked, ready.head)
    parts: tuple[Part, ...] = ("train", "held_out")
    rows = [holding.train for holding in ready.holdings]
    min_batch = min(limits.min_batch, local.batch_size)
    if ready.data.places is not None:
        yield from _train_on_places(sites, agreed, ready, local, request.server_round, min_batch, merged)
        return
    if merged:
        averaged, evaluation = average_heads(
            ready.head,
            ready.parameters,
            ready.data,
            rows,
            local,
            [holding.held_out for holding in ready.holdings],
            seed=manifest.seed,
            round_number=request.server_round,
            repeated=request.everyone,
            min_batch=min_batch,
        )
        metrics = np.column_stack(
            [averaged.rows, averaged.losses, evaluation.rows, evaluation.losses, evaluation.scores, evaluation.curves]
        ).astype(np.float64)
        arrays = {name: value.cpu().numpy() for name, value in averaged.parameters.items()}
        yield Answer(range(len(sites)), merged_reply(sites, metrics, averaged.usable, arrays), manifest, parts)
        return
    metrics = evaluate_sites(ready)
    for positions, trained in train_in_chunks(
        ready.head,
        ready.parameters,
        ready.data,
        rows,
        local,
        seed=manifest.seed,
        round_number=request.server_round,
        min_batch=min_batch,
    ):
        table = metrics[positions]
        table[:, EXAMPLES] = trained.rows
        table[:, TRAIN_LOSS] = trained.losses
        heads = {name: value.cpu().numpy() for name, value in trained.parameters.items()}
        for row, position in enumerate(positions.tolist()):
            sums = HeadSums({name: value[row] for name, value in heads.items()}, table[row])
            yield Answer([position], Payload({}, sums.to_arrays()), manifest, parts)


def _train_on_places(
    sites: Sequence[Site],
    agreed: Agreement,
    ready: "Prepared",
    local: LocalConfig,
    round_number: int,
    min_batch: int,
    merged: bool,
) -> Iterator[Answer]:
    """Train the head on places of items at each site, and evaluate the incoming one on their held-out items."""
    base = {name: value.cpu().numpy() for name, value in ready.parameters.items()}
    made = train_on_places(
        ready.head,
        ready.parameters,
        ready.data,
        [holding.train for holding in ready.holdings],
        local,
        seed=agreed.manifest.seed,
        round_number=round_number,
        min_batch=min_batch,
    )
    trained = (
        (at, {name: value[0].cpu().numpy() for name, value in one.parameters.items()}, one.rows[0], one.losses[0])
        for at, one in made
    )
    yield from answered_alone(sites, agreed.manifest, base, evaluate_sites(ready), trained, merged)


def asked_settings(agreed: Agreement, request: HeadRequest) -> LocalConfig:
    """Return how sites are asked to train in a round."""
    local = agreed.manifest.local
    return local if request.proximal_mu is None else local.model_copy(update={"proximal_mu": request.proximal_mu})


def gradient(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Sum the gradient of the head's loss over the training rows, and evaluate the head on the held-out ones.

    Raises:
        MessageError: if the head is not linear.
        FedheadError: if a single row makes up too much of the gradient.
    """
    agreed = agreement(context)
    form = empty_head(agreed)
    ready = prepare(sites, agreed, HeadRequest.from_payload(payload, form))
    if not isinstance(ready.head, LinearHead):
        raise MessageError("Full gradients are summed of linear heads only.")
    metrics = evaluate_sites(ready)
    for positions in shared(sites, merged):
        chosen = [ready.holdings[position].train for position in positions]
        summed = sum_gradient(ready.head, ready.parameters, ready.data, chosen)
        sites[positions[0]].training.check_share(summed.largest)
        table, rows = metrics[positions], max(summed.rows, 1)
        table[:, EXAMPLES] = [len(site.rows) for site in chosen]
        table[:, TRAIN_LOSS] = summed.loss / rows
        means = {"weight": (summed.weight / rows).numpy(), "bias": (summed.bias / rows).numpy()}
        if merged:
            usable = np.ones(len(sites), np.bool_)
            yield Answer(positions, merged_reply(sites, table, usable, means), agreed.manifest, ("train", "held_out"))
        else:
            alone = Payload({}, HeadSums(means, table[0]).to_arrays())
            yield Answer(positions, alone, agreed.manifest, ("train", "held_out"))


def evaluate(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Evaluate the head on the held-out rows of all sites at once."""
    agreed = agreement(context)
    request = HeadRequest.from_payload(payload, form_of(sites, agreed, payload.arrays))
    yield from evaluated(sites, agreed.manifest, evaluate_sites(prepare(sites, agreed, request)), merged)


def report(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Count in detail how the head does on each site's held-out rows."""
    agreed = agreement(context)
    request = ReportRequest.from_payload(payload, form_of(sites, agreed, payload.arrays))
    agreed.check_cells()
    ready = prepare(sites, agreed, request.head)
    if ready.data.places is not None:
        for positions in shared(sites, merged):
            sums = places_report(ready, [ready.holdings[position].held_out.rows for position in positions])
            yield Answer(positions, of_several(sums.to_arrays(), len(positions)), agreed.manifest, ("held_out",))
        return
    owners = np.repeat(np.arange(len(sites)), [len(holding.held_out.rows) for holding in ready.holdings])
    outputs, targets = outputs_of(held_out_rows(ready), ready, agreed)
    if merged:
        owners[:] = 0
    counted = agreed.task.count(outputs, targets, owners, 1 if merged else len(sites), request.bins)
    for positions, sums in zip(shared(sites, merged), counted, strict=True):
        count = len(positions)
        yield Answer(positions, of_several(sums.to_arrays(), count), agreed.manifest, ("held_out",))


def calibrate(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Sum the losses that choose a temperature over half of the held-out rows, or that judge it over the other half."""
    agreed = agreement(context)
    request = CalibrateRequest.from_payload(payload, form_of(sites, agreed, payload.arrays))
    for positions in shared(sites, merged):
        sums = calibration_sums(
            prepare([sites[position] for position in positions], agreed, request.head), agreed, request
        )
        yield Answer(positions, of_several(sums.to_arrays(), len(positions)), agreed.manifest, ("held_out",))


def subgroups(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Count how the head does in each of the named subgroups of the sites' held-out rows."""
    agreed = agreement(context)
    request = SubgroupsRequest.from_payload(payload, form_of(sites, agreed, payload.arrays))
    if not agreed.task.kind.exclusive:
        raise MessageError(f"it asks for subgroups, which the task {agreed.manifest.task!r} does not count")
    agreed.check_cells(len(request.names))
    for positions in shared(sites, merged):
        ready = prepare([sites[position] for position in positions], agreed, request.head)
        rows, owners = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for holding in ready.holdings:
            if holding.subgroups is not None:
                place = holding.subgroups.positions(holding.by_subgroup, request.names)
                rows.append(holding.by_subgroup[place >= 0])
                owners.append(place[place >= 0])
        outputs, targets = outputs_of(np.concatenate(rows), ready, agreed)
        if agreed.task.scales_outputs:
            outputs = outputs.double() / request.temperature
        counted = agreed.task.count(
            outputs, targets, np.concatenate(owners), len(request.names), ScoreBins.default(len(agreed.task.columns))
        )
        sums = SubgroupSums(list(counted))
        yield Answer(positions, of_several(sums.to_arrays(), len(positions)), agreed.manifest, ("held_out",))


def calibration_sums(ready: "Prepared", agreed: Agreement, request: CalibrateRequest) -> Sums:
    """Return the sums that choose or judge a temperature, over all sites that are prepared."""
    rows = held_out_rows(ready)
    choosing = calibration_half(ready.holdings[0].keys[rows])
    wanted = rows[~choosing if request.temperature else choosing]
    task = agreed.task
    outputs, targets = outputs_of(wanted, ready, agreed)
    bins = request.bins or task.bins()
    sums: Sums = (
        task.judging(outputs, targets, request.temperature, bins)
        if request.temperature
        else task.choosing(outputs, targets, bins)
    )
    return sums


def form_of(sites: Sequence[Site], agreed: Agreement, arrays: Arrays, *, part: bool = False) -> Arrays:
    """Return the names, shapes and dtype that received parameters must have: the run's head, or its tail with the head.

    Args:
        sites: that were asked.
        agreed: what is known of the run.
        arrays: as received.
        part: whether they are for training. Then a part of the tail's parameters is enough, since a stage of a schedule
            fixes the others, and those of the objective are required.
    """
    if agreed.manifest.head == "none":
        return tail_form(sites, agreed)
    if not _is_tuned(agreed, arrays):
        return empty_head(agreed)
    whole = tail_form(sites, agreed)
    if not part:
        return whole
    trained = {name: value for name, value in whole.items() if name in arrays or name.startswith(HEAD)}
    tunes = any(name.startswith(TAIL) for name in arrays)
    return {**trained, **sites[0].tuning(agreed.manifest).objective_form} if tunes else trained


def _is_tuned(agreed: Agreement, arrays: Arrays) -> bool:
    """Return whether parameters are of a tuned run's head, with or without a tail."""
    return bool(agreed.manifest.tune) and any(name.startswith((HEAD, TAIL)) for name in arrays)


def tail_form(sites: Sequence[Site], agreed: Agreement) -> Arrays:
    """Return the names, shapes and dtype of the parameters of a tail with its head."""
    head = {f"{HEAD}{name}": value for name, value in empty_head(agreed).items()}
    return {**head, **sites[0].tuning(agreed.manifest).form}


@dataclass(frozen=True)
class Prepared:
    """Sites that are ready to train or evaluate a head.

    Attributes:
        holdings: the rows of each.
        data: the features that they share, standardised as the run says.
        head: gives the form.
        parameters: the head's, on the sites' device.
    """

    holdings: Sequence[Holding]
    data: LabelledFeatures
    head: Head
    parameters: Mapping[str, Tensor]


def prepare(sites: Sequence[Site], agreed: Agreement, request: HeadRequest) -> Prepared:
    """Open the sites' data, and move the head that arrived to their device."""
    holdings = [site.open(agreed.manifest) for site in sites]
    data = replace(
        holdings[0].data,
        mapping=agreed.mapping,
        standardisation=agreed.standardisation,
        target_standardisation=agreed.target_standardisation,
    )
    device = data.features.device
    head = head_of(agreed).to(device)
    head.curved = agreed.curved
    if tail := part_of(request.arrays, TAIL):
        tuning = sites[0].tuning(agreed.manifest)
        head, data = tuned_head(agreed, tuning, tail), activations_of(data, agreed, tuning)
    elif _is_tuned(agreed, request.arrays):
        head, data = lone_head(data, agreed)
    parameters = {name: torch.from_numpy(value.copy()).to(device) for name, value in request.arrays.items()}
    return Prepared(holdings, data, head, parameters)


def evaluate_sites(ready: Prepared) -> FloatArray:
    """Evaluate the head on the held-out rows of all sites at once; return metrics `[S, len(METRICS)]`."""
    held = [holding.held_out for holding in ready.holdings]
    if ready.data.places is not None:
        sums = [places_report(ready, [one.rows]) for one in held]
        metrics = np.zeros((len(held), len(METRICS)))
        metrics[:, HELD_OUT] = [one.rows for one in sums]
        metrics[:, LOSS_SUM] = [one.loss_sum for one in sums]
        # Rounds standardise features; of one exchange, the report at the end has the score.
        if ready.data.standardisation is not None:
            scored = partial(outputs_at_places, ready.head, ready.parameters, ready.data)
            places, features = ready.data.places, ready.data.features
            metrics[:, SCORE] = [places.summed_scores(scored, features, one.rows) for one in held]
        return metrics
    evaluation = evaluate_head(ready.head, ready.parameters, ready.data, held)
    metrics = np.zeros((len(held), len(METRICS) + evaluation.curves.shape[1]))
    metrics[:, HELD_OUT] = evaluation.rows
    metrics[:, LOSS_SUM] = evaluation.losses
    metrics[:, SCORE] = evaluation.scores
    metrics[:, len(METRICS) :] = evaluation.curves
    return metrics


def places_report(ready: Prepared, rows: Sequence[IntArray]) -> Any:
    """Return the evaluation sums of the head over the places of items, given their rows by site."""
    places = ready.data.places
    assert places is not None
    together = np.concatenate([np.empty(0, np.int64), *rows])

    def outputs(features: Tensor) -> Tensor:
        return outputs_at_places(ready.head, ready.parameters, ready.data, features).cpu()

    return places.evaluate(outputs, ready.data.features, together)


def held_out_rows(ready: Prepared) -> IntArray:
    """Return the held-out rows of all sites."""
    return np.concatenate([holding.held_out.rows for holding in ready.holdings])


def outputs_of(rows: IntArray, ready: Prepared, agreed: Agreement) -> tuple[Tensor, Tensor]:
    """Return outputs `[n, C]` and targets of some rows, as they are without standardisation, on the CPU."""
    data = replace(ready.data, target_standardisation=None)
    parts, targets = [torch.empty(0, len(agreed.manifest.classes))], [data.labels[:0].cpu()]
    like = next(iter(ready.parameters.values()))
    step = min(SCORED_ROWS, ready.head.most_rows or SCORED_ROWS)
    with torch.inference_mode():
        for start in range(0, len(rows), step):
            features, truth = data.gather(rows[start : start + step], like)
            parts.append(ready.head.outputs(ready.parameters, features).cpu())
            targets.append(truth.cpu())
    outputs = torch.cat(parts)
    if agreed.target_standardisation is not None:
        mean, scale = (part.double() for part in agreed.target_standardisation)
        outputs = outputs.double() * scale + mean
    return outputs, torch.cat(targets)
