"""The Flower `ClientApp`: one handler per action. Light to import; torch comes with the first message."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from fedhead.errors import FedheadError, UserError
from fedhead.messages import (
    CALIBRATE,
    COMPARE,
    DESCRIBE,
    EVALUATE,
    INSTALL,
    METRICS,
    PROTOCOL,
    RECORD,
    REPORT,
    STANDARDISE,
    STATISTICS,
    TRAIN,
    UNDESCRIBED,
    Arrays,
    CalibrateRequest,
    Description,
    FloatArray,
    HeadReply,
    HeadRequest,
    Manifest,
    Payload,
    ReportRequest,
    StatisticsRequest,
    WeightsChunk,
    check_arrays,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fedhead.calibration import CalibrationSums, TemperatureSums
    from fedhead.client.site_data import Holding, Site
    from fedhead.client.training import LabelledFeatures, SiteRows
    from fedhead.data import IntArray
    from fedhead.heads import Head
    from fedhead.metrics import EvaluationSums

logger = logging.getLogger(__name__)

SiteOf = Callable[[Context], "Site"]
Handler = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Handler], Message]

STATISTICS_ROWS = 8192
"""Rows whose features are in memory at a time while sums are taken."""


def discreet(message: Message, context: Context, call_next: Handler) -> Message:
    """Let what goes wrong leave the site only in sentences that were written to; a Flower mod.

    Others may name a file of the site's, whose name may be a person's; its own log has them.

    Raises:
        FedheadError: what may leave.
    """
    try:
        return call_next(message, context)
    except UserError as error:
        logger.error("%s", error)
        raise FedheadError("The site cannot do it; its own log says why.") from None
    except FedheadError:
        raise
    except ValidationError as error:
        asked = ", ".join(sorted({".".join(map(str, detail["loc"])) for detail in error.errors()}))
        raise FedheadError(f"The site does not know, or decides by itself: {asked}.") from None
    except Exception as error:
        logger.exception("An unexpected failure.")
        raise FedheadError(f"The site failed ({type(error).__name__}); its own log says why.") from None


def make_app(site_of: SiteOf, mods: Sequence[Mod] = ()) -> ClientApp:
    """Build the app of the site that a context belongs to, with Flower mods around its handlers."""
    app = ClientApp(mods=list(mods))

    @app.query(DESCRIBE.split(".")[1])
    def describe(message: Message, context: Context) -> Message:
        return Message(describe_site(site_of(context), message.content, context), reply_to=message)

    @app.query(INSTALL.split(".")[1])
    def install(message: Message, context: Context) -> Message:
        site = site_of(context)
        return Message(install_chunk(site, message.content, context), reply_to=message)

    @app.query(STATISTICS.split(".")[1])
    def statistics(message: Message, context: Context) -> Message:
        request = StatisticsRequest(**Payload.from_content(message.content).values)
        return Message(site_statistics(site_of(context), kept(context), request), reply_to=message)

    @app.query(STANDARDISE.split(".")[1])
    def standardise(message: Message, context: Context) -> Message:
        keep_standardisation(Payload.from_content(message.content), context)
        # A site that comes late extracts its features now, and not while others wait for it in a round.
        site_of(context).open(kept(context).manifest)
        return Message(Payload().to_content(), reply_to=message)

    @app.query(COMPARE.split(".")[1])
    def compare(message: Message, context: Context) -> Message:
        agreed, site = kept(context), site_of(context)
        content = compare_heads(site, agreed, Payload.from_content(message.content))
        return Message(_released(content, site, agreed, COMPARE), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        agreed, site = kept(context), site_of(context)
        request = HeadRequest.from_content(message.content, empty_head(agreed.manifest))
        (trained,) = train_sites([site], agreed, request)
        (reply,) = trained.replies()
        return Message(_released(reply.to_content(), site, agreed, TRAIN), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        agreed, site = kept(context), site_of(context)
        request = HeadRequest.from_content(message.content, empty_head(agreed.manifest))
        metrics = evaluate_sites([site], agreed, request)
        return Message(_released(HeadReply(metrics).to_content(), site, agreed, EVALUATE), reply_to=message)

    @app.evaluate(REPORT.split(".")[1])
    def report(message: Message, context: Context) -> Message:
        agreed, site = kept(context), site_of(context)
        request = ReportRequest.from_content(message.content, empty_head(agreed.manifest))
        (sums,) = report_sites([site], agreed, request)
        content = Payload({}, sums.to_arrays()).to_content()
        return Message(_released(content, site, agreed, REPORT), reply_to=message)

    @app.evaluate(CALIBRATE.split(".")[1])
    def calibrate(message: Message, context: Context) -> Message:
        agreed, site = kept(context), site_of(context)
        request = CalibrateRequest.from_content(message.content, empty_head(agreed.manifest))
        content = Payload({}, calibrate_sites([site], agreed, request).to_arrays()).to_content()
        return Message(_released(content, site, agreed, CALIBRATE), reply_to=message)

    return app


def _released(
    content: RecordDict, site: "Site", agreed: "Kept", action: str, summed: "tuple[str, SiteRows] | None" = None
) -> RecordDict:
    """Enter what leaves in the site's ledger, if it keeps one, and return it.

    With `summed`, what the rows are and which, the ledger also compares them with what was summed before.
    """
    if site.ledger is None:
        return content
    from fedhead.client.guard import TooCloseError, release, released_sums

    holding, classes = site.open(agreed.manifest), agreed.manifest.classes
    labels = holding.data.labels.cpu().numpy()
    try:
        return release(
            content,
            ledger=site.ledger,
            run=agreed.manifest.run,
            site=site.name,
            action=action,
            rows=holding.guarded.num_rows,
            classes=holding.guarded.counts,
            sums=released_sums(summed[0], summed[1].rows, holding.keys, labels, classes) if summed else None,
        )
    except TooCloseError as error:
        logger.error("%s", error)
        raise FedheadError(
            "Its rows differ by too few from those it summed for this run before; the site's own log says how many."
        ) from None


def describe_site(site: "Site", content: RecordDict, context: Context) -> RecordDict:
    """Keep the manifest that arrived, and answer whether `site` can take part under it."""
    payload = Payload.from_content(content)
    if payload.values.get("protocol") != PROTOCOL:
        refusal = (
            f"This site speaks protocol {PROTOCOL} and the coordinator {payload.values.get('protocol')}; install the "
            "coordinator's version of fedhead."
        )
        return _told(Description(site=site.name, refusal=refusal))
    try:
        manifest = Manifest(**payload.values)
    except ValidationError as error:
        asked = ", ".join(sorted({".".join(map(str, detail["loc"])) for detail in error.errors()}))
        refusal = f"The manifest asks for what this site does not know, or decides by itself: {asked}."
        return _told(Description(site=site.name, refusal=refusal))
    context.state[RECORD] = ConfigRecord(
        {"manifest": manifest.model_dump_json(), "probe": payload.arrays["probe"].astype("<f4").tobytes()}
    )
    return _describe(site, context)


def install_chunk(site: "Site", content: RecordDict, context: Context) -> RecordDict:
    """Take in a part of the weights; answer how much is here, or once all of it is, whether `site` can take part."""
    received = site.install(kept(context).manifest, WeightsChunk.from_content(content))
    if received is None:
        return _describe(site, context)
    return _told(Description(site=site.name, rows=site.num_rows, received=received))


def _describe(site: "Site", context: Context) -> RecordDict:
    return _told(description_of(site, kept(context)))


def _told(description: Description) -> RecordDict:
    """Return what the coordinator is told; if the site takes no part, its own log says so too."""
    if description.refusal:
        logger.error("This site takes no part in the run. %s", description.refusal)
    return Payload(description.model_dump()).to_content()


def description_of(site: "Site", agreed: "Kept") -> Description:
    """Return whether `site` can take part under what it was told, and if not, why."""
    has_weights, refusal = False, ""
    try:
        site.check_data(agreed.manifest)
        has_weights = site.has_weights(agreed.manifest)
        if has_weights:
            site.check(agreed.manifest, agreed.probe)
    except FedheadError as error:
        refusal = str(error)
    return Description(site=site.name, rows=site.num_rows, has_weights=has_weights, refusal=refusal)


@dataclass(frozen=True)
class Kept:
    """What a site was told of the run so far, in its `Context`; it answers nothing without.

    Attributes:
        manifest: what was agreed on.
        probe: the coordinator's features `[PROBES, d]` of the probe; their mean is the origin of all sums.
        standardisation: mean and scale `[d]` that heads are trained under, once they are known.
    """

    manifest: Manifest
    probe: "Tensor"
    standardisation: "tuple[Tensor, Tensor] | None"


def kept(context: Context) -> Kept:
    """Return what this site was told.

    Raises:
        FedheadError: if it was told nothing, in this process or its kept state.
    """
    record = context.state.get(RECORD)
    if not isinstance(record, ConfigRecord):
        raise FedheadError(f"{UNDESCRIBED}; the coordinator must describe it again.")
    manifest = Manifest.model_validate_json(str(record["manifest"]))
    standardisation = None
    if "mean" in record:
        standardisation = (_tensor(record, "mean"), _tensor(record, "scale"))
    return Kept(manifest, _tensor(record, "probe").reshape(-1, manifest.num_features), standardisation)


def keep_standardisation(payload: Payload, context: Context) -> None:
    """Keep the mean and scale that heads are trained under.

    Raises:
        MessageError: if they are not of the manifest's form.
    """
    manifest = kept(context).manifest
    like = np.zeros(manifest.num_features, np.float32)
    check_arrays(payload.arrays, {"mean": like, "scale": like})
    record = context.state[RECORD]
    assert isinstance(record, ConfigRecord)
    for name, array in payload.arrays.items():
        record[name] = array.tobytes()


def _tensor(record: ConfigRecord, name: str) -> "Tensor":
    import torch

    blob = record[name]
    assert isinstance(blob, bytes)
    return torch.frombuffer(bytearray(blob), dtype=torch.float32)


def site_statistics(site: "Site", agreed: Kept, request: StatisticsRequest) -> RecordDict:
    """Return the sums over a site's rows, accumulated block by block in float64 about the probe's mean."""
    import torch

    from fedhead.moments import FeatureMoments
    from fedhead.statistics import FeatureStatistics, origin_of, projection_for

    holding = site.open(agreed.manifest)
    summed = ("training rows", holding.train) if request.rows == "train" else ("held-out rows", holding.summable)
    blocks = torch.split(torch.from_numpy(summed[1].rows), STATISTICS_ROWS)
    features, labels = holding.data.features, holding.data.labels
    if request.what == "moments":
        moments = FeatureMoments.empty(agreed.probe.mean(0))
        for block in blocks:
            moments = moments.updated(features[block].cpu())
        tensors = moments.to_tensors()
    else:
        project = projection_for(agreed.manifest.num_features, agreed.manifest.seed)
        origin = origin_of(agreed.probe, agreed.manifest.seed)
        stats = FeatureStatistics.empty(
            len(origin), len(agreed.manifest.classes), origin, multi_label=agreed.manifest.multi_label
        )
        for block in blocks:
            chosen = features[block].cpu()
            stats.update(chosen if project is None else project(chosen), labels[block].cpu())
        tensors = stats.to_tensors()
    content = Payload({}, {name: tensor.numpy() for name, tensor in tensors.items()}).to_content()
    return _released(content, site, agreed, STATISTICS, summed)


def compare_heads(site: "Site", agreed: Kept, payload: Payload) -> RecordDict:
    """Return on how many held-out rows which of the `HEADS` that arrived are right."""
    import torch

    from fedhead.diagnosis import HEADS, count_jointly
    from fedhead.heads import LinearHead

    shape = (len(HEADS), len(agreed.manifest.classes))
    check_arrays(
        payload.arrays,
        {
            "weight": np.zeros((*shape, agreed.manifest.num_features), np.float32),
            "bias": np.zeros(shape, np.float32),
        },
    )
    weight, bias = (torch.from_numpy(np.array(payload.arrays[name])) for name in ("weight", "bias"))
    heads = {name: LinearHead.from_weights(weight[row], bias[row]) for row, name in enumerate(HEADS)}
    holding = site.open(agreed.manifest)
    joint = torch.zeros(*[2] * len(HEADS), dtype=torch.int64)
    for rows in torch.split(torch.from_numpy(holding.held_out.rows), STATISTICS_ROWS):
        joint += count_jointly(heads, holding.data.features[rows].cpu(), holding.data.labels[rows].cpu())
    return Payload({}, {"joint": joint.numpy()}).to_content()


def head_of(manifest: Manifest) -> "Head":
    """Build the manifest's head."""
    from fedhead.heads import make_head

    return make_head(manifest.head, manifest.num_features, len(manifest.classes))


def empty_head(manifest: Manifest) -> Arrays:
    """Return arrays of the names, shapes and dtype that the manifest's head has."""
    return {name: value.numpy() for name, value in head_of(manifest).trainable().items()}


@dataclass(frozen=True)
class TrainedSites:
    """What one chunk of training made: stacked heads `[k, ...]` and metrics `[k, len(METRICS)]`."""

    positions: Sequence[int]
    arrays: Arrays
    metrics: FloatArray

    def replies(self) -> Iterator[HeadReply]:
        """Yield each site's own reply."""
        for row in range(len(self.positions)):
            yield HeadReply(self.metrics[row : row + 1], {name: value[row] for name, value in self.arrays.items()})


def train_sites(sites: Sequence["Site"], agreed: Kept, request: HeadRequest) -> Iterator[TrainedSites]:
    """Train the head at all `sites` at once, and evaluate the one that arrived on their held-out rows.

    Sites must share one `LabelledFeatures`, as those of a simulation do; a real site is alone.

    Yields:
        Chunks of sites, each by its positions in `sites`.
    """
    from fedhead.client.training import train_in_chunks

    manifest = agreed.manifest
    holdings, data, head, incoming = ready(sites, agreed, request)
    metrics = evaluate_sites(sites, agreed, request)
    local = manifest.local
    if request.proximal_mu is not None:
        local = local.model_copy(update={"proximal_mu": request.proximal_mu})
    for positions, trained in train_in_chunks(
        head,
        incoming,
        data,
        [holding.train for holding in holdings],
        local,
        seed=manifest.seed,
        round_number=request.server_round,
    ):
        table = metrics[positions]
        table[:, METRICS.index("examples")] = trained.rows
        table[:, METRICS.index("train_loss")] = trained.losses
        arrays = {name: value.cpu().numpy() for name, value in trained.parameters.items()}
        yield TrainedSites(positions.tolist(), arrays, table)


def evaluate_sites(sites: Sequence["Site"], agreed: Kept, request: HeadRequest) -> FloatArray:
    """Evaluate the head on the held-out rows of all `sites` at once; return metrics `[S, len(METRICS)]`."""
    from fedhead.client.training import evaluate_head

    holdings, data, head, parameters = ready(sites, agreed, request)
    evaluation = evaluate_head(head, parameters, data, [holding.held_out for holding in holdings])
    metrics = np.zeros((len(sites), len(METRICS)))
    metrics[:, METRICS.index("held_out")] = evaluation.rows
    metrics[:, METRICS.index("loss_sum")] = evaluation.losses
    metrics[:, METRICS.index("correct")] = evaluation.correct
    return metrics


def report_sites(sites: Sequence["Site"], agreed: Kept, request: ReportRequest) -> "Iterator[EvaluationSums]":
    """Count how the head does on each site's held-out rows, in detail; yield in the order of `sites`."""
    from fedhead.metrics import sums_by_site

    holdings, data, head, parameters = ready(sites, agreed, request.head)
    rows = np.concatenate([holding.held_out.rows for holding in holdings])
    owners = np.repeat(np.arange(len(sites)), [len(holding.held_out.rows) for holding in holdings])
    logits, labels = _logits(rows, data, head, parameters, agreed)
    return sums_by_site(logits, labels, owners, len(sites), bins=request.bins)


def calibrate_sites(
    sites: Sequence["Site"], agreed: Kept, request: CalibrateRequest
) -> "TemperatureSums | CalibrationSums":
    """Sum over the sites' held-out rows what chooses a temperature, or over their other half what judges it."""
    from fedhead.calibration import CalibrationSums, TemperatureSums
    from fedhead.data import held_out

    holdings, data, head, parameters = ready(sites, agreed, request.head)
    rows = np.concatenate([holding.held_out.rows for holding in holdings])
    # Negative seeds are no run's, so the halves have nothing to do with what is held out.
    choosing = held_out(holdings[0].keys[rows], 0.5, -1 - agreed.manifest.seed)
    wanted = rows[~choosing if request.temperature else choosing]
    logits, labels = _logits(wanted, data, head, parameters, agreed)
    if request.temperature:
        return CalibrationSums.from_logits(logits, labels, request.temperature)
    return TemperatureSums.from_logits(logits, labels)


def _logits(
    rows: "IntArray", data: "LabelledFeatures", head: "Head", parameters: "dict[str, Tensor]", agreed: Kept
) -> "tuple[Tensor, Tensor]":
    """Return logits `[n, C]` and labels of some rows, in the processor's memory."""
    import torch

    logits, labels = [torch.empty(0, len(agreed.manifest.classes))], [data.labels[:0].cpu()]
    like = next(iter(parameters.values()))
    with torch.inference_mode():
        for start in range(0, len(rows), STATISTICS_ROWS):
            features, truth = data.gather(rows[start : start + STATISTICS_ROWS], like)
            logits.append(head.logits(parameters, features).cpu())
            labels.append(truth.cpu())
    return torch.cat(logits), torch.cat(labels)


def ready(
    sites: Sequence["Site"], agreed: Kept, request: HeadRequest
) -> "tuple[list[Holding], LabelledFeatures, Head, dict[str, Tensor]]":
    """Return what the sites hold, the features that they share, the head's form and its parameters."""
    import torch

    holdings = [site.open(agreed.manifest) for site in sites]
    data = replace(holdings[0].data, standardisation=agreed.standardisation)
    device = data.features.device
    head = head_of(agreed.manifest).to(device)
    parameters = {name: torch.from_numpy(value.copy()).to(device) for name, value in request.arrays.items()}
    return holdings, data, head, parameters


@cache
def _local_site(name: str, data: str, device: str, strict_data: bool, min_class_count: int, min_rows: int) -> "Site":
    from fedhead.client.guard import Guard
    from fedhead.client.site_data import LocalSite

    return LocalSite(name, data, device, strict_data, Guard(min_class_count, min_rows))


def local_site(context: Context) -> "Site":
    """Return the site that a SuperNode's `--node-config` names.

    It has `site` and `data`, and perhaps `device`, `strict-data`, `min-class-count` and `min-rows`.

    Raises:
        FedheadError: if `site` or `data` is missing.
    """
    config = context.node_config
    for key in ("site", "data"):
        if key not in config:
            raise FedheadError(f'The node config lacks {key!r}; expected --node-config \'site="NAME" data="SPEC"\'.')
    return _local_site(
        str(config["site"]),
        str(config["data"]),
        str(config.get("device", "auto")),
        bool(config.get("strict-data", False)),
        int(config.get("min-class-count", 5)),
        int(config.get("min-rows", 20)),
    )


app = make_app(local_site, [discreet])
