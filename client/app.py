"""The Flower `ClientApp`: one handler per action. Light to import; torch comes with the first message."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedhead.errors import FedheadError
from fedhead.messages import (
    DESCRIBE,
    INSTALL,
    METRICS,
    PROTOCOL,
    RECORD,
    Arrays,
    Description,
    FloatArray,
    HeadReply,
    HeadRequest,
    Manifest,
    Payload,
)

if TYPE_CHECKING:
    from fedhead.client.site_data import Site
    from fedhead.heads import Head

SiteOf = Callable[[Context], "Site"]


def make_app(site_of: SiteOf) -> ClientApp:
    """Build the app of the site that a context belongs to."""
    app = ClientApp()

    @app.query(DESCRIBE.split(".")[1])
    def describe(message: Message, context: Context) -> Message:
        return Message(describe_site(site_of(context), message.content, context), reply_to=message)

    @app.query(INSTALL.split(".")[1])
    def install(message: Message, context: Context) -> Message:
        site = site_of(context)
        blob = Payload.from_content(message.content).arrays["weights"].tobytes()
        site.install(manifest_of(context), blob)
        return Message(_describe(site, context), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        manifest = manifest_of(context)
        request = HeadRequest.from_content(message.content, empty_head(manifest))
        (trained,) = train_sites([site_of(context)], manifest, request)
        (reply,) = trained.replies()
        return Message(reply.to_content(), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        manifest = manifest_of(context)
        request = HeadRequest.from_content(message.content, empty_head(manifest))
        metrics = evaluate_sites([site_of(context)], manifest, request)
        return Message(HeadReply(metrics).to_content(), reply_to=message)

    return app


def describe_site(site: "Site", content: RecordDict, context: Context) -> RecordDict:
    """Keep the manifest that arrived, and answer whether `site` can take part under it."""
    payload = Payload.from_content(content)
    if payload.values.get("protocol") != PROTOCOL:
        refusal = (
            f"This site speaks protocol {PROTOCOL} and the coordinator {payload.values.get('protocol')}; install the "
            "coordinator's version of fedhead."
        )
        return Payload(Description(site=site.name, refusal=refusal).model_dump()).to_content()
    manifest = Manifest(**payload.values)
    context.state[RECORD] = ConfigRecord(
        {"manifest": manifest.model_dump_json(), "probe": payload.arrays["probe"].astype("<f4").tobytes()}
    )
    return _describe(site, context)


def _describe(site: "Site", context: Context) -> RecordDict:
    import torch

    manifest = manifest_of(context)
    record = context.state[RECORD]
    assert isinstance(record, ConfigRecord)
    probe = np.frombuffer(record["probe"], dtype="<f4").reshape(-1, manifest.num_features)  # type: ignore[arg-type]
    has_weights, refusal = False, ""
    try:
        has_weights = site.has_weights(manifest)
        if has_weights:
            site.check(manifest, torch.from_numpy(probe.copy()))
    except FedheadError as error:
        refusal = str(error)
    described = Description(site=site.name, rows=site.num_rows, has_weights=has_weights, refusal=refusal)
    return Payload(described.model_dump()).to_content()


def manifest_of(context: Context) -> Manifest:
    """Return the manifest that this site was described under.

    Raises:
        FedheadError: if it was not, in this process or its kept state.
    """
    record = context.state.get(RECORD)
    if not isinstance(record, ConfigRecord):
        raise FedheadError("This site has no manifest of the run; the coordinator must describe it again.")
    return Manifest.model_validate_json(str(record["manifest"]))


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


def train_sites(sites: Sequence["Site"], manifest: Manifest, request: HeadRequest) -> Iterator[TrainedSites]:
    """Train the head at all `sites` at once, and evaluate the one that arrived on their held-out rows.

    Sites must share one `LabelledFeatures`, as those of a simulation do; a real site is alone.

    Yields:
        Chunks of sites, each by its positions in `sites`.
    """
    import torch

    from fedhead.client.training import train_in_chunks

    holdings = [site.open(manifest) for site in sites]
    data = holdings[0].data
    head = head_of(manifest).to(data.features.device)
    incoming = {name: torch.from_numpy(value.copy()).to(data.features.device) for name, value in request.arrays.items()}
    metrics = evaluate_sites(sites, manifest, request)
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


def evaluate_sites(sites: Sequence["Site"], manifest: Manifest, request: HeadRequest) -> FloatArray:
    """Evaluate the head on the held-out rows of all `sites` at once; return metrics `[S, len(METRICS)]`."""
    import torch

    from fedhead.client.training import evaluate_head

    holdings = [site.open(manifest) for site in sites]
    data = holdings[0].data
    head = head_of(manifest).to(data.features.device)
    parameters = {
        name: torch.from_numpy(value.copy()).to(data.features.device) for name, value in request.arrays.items()
    }
    evaluation = evaluate_head(head, parameters, data, [holding.held_out for holding in holdings])
    metrics = np.zeros((len(sites), len(METRICS)))
    for name, values in (
        ("held_out", evaluation.rows),
        ("loss_sum", evaluation.losses),
        ("correct", evaluation.correct),
    ):
        metrics[:, METRICS.index(name)] = values
    return metrics


@cache
def _local_site(name: str, data: str, device: str, strict_data: bool) -> "Site":
    from fedhead.client.site_data import LocalSite

    return LocalSite(name, data, device, strict_data)


def local_site(context: Context) -> "Site":
    """Return the site that a SuperNode's `--node-config` names: `site`, `data`, and perhaps `device`, `strict-data`.

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
    )


app = make_app(local_site)
