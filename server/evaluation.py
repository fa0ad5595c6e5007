"""A head evaluated in detail: what each site counts on its held-out rows."""

from fedhead.heads import Head, LinearHead
from fedhead.messages import REPORT, HeadRequest, Manifest, MessageError, Payload, ReportRequest, payload_bytes
from fedhead.metrics import EvaluationSums, ScoreBins
from fedhead.server.exchange import Exchange, Messenger
from fedhead.server.roster import Roster
from fedhead.statistics import FeatureStatistics


def evaluate_in_detail(
    messenger: Messenger,
    roster: Roster,
    manifest: Manifest,
    request: HeadRequest,
    head: Head,
    stats: FeatureStatistics | None,
    exchange: Exchange,
) -> dict[str, EvaluationSums]:
    """Return what each site with held-out rows counts of a head, by name.

    Args:
        messenger: reaches the sites.
        roster: the sites that take part.
        manifest: of the run.
        request: the head, as the sites train it.
        head: the same, for features as they are.
        stats: the sites' statistics, where there are any; they tell which scores to expect.
        exchange: takes the traffic.
    """
    num_classes = len(manifest.classes)
    bins = ScoreBins.default(num_classes)
    if isinstance(head, LinearHead) and stats is not None and stats.num_features == head.num_features:
        bins = score_bins(head, stats)
    reports = {}
    content = ReportRequest(request, bins).to_content()
    for name, answer in messenger.ask(roster.nodes, REPORT, content, exchange):
        try:
            arrays = Payload.from_content(answer).arrays
            sums = EvaluationSums.from_arrays(arrays, num_classes, multi_label=manifest.multi_label)
            exchange.bytes_up += payload_bytes(answer)
            if sums.rows > roster.rows[name]:
                raise ValueError(f"it evaluated {sums.rows} rows, of {roster.rows[name]} that it has")
        except (MessageError, ValueError) as error:
            exchange.drop(name, str(error))
            continue
        if sums.rows:
            reports[name] = sums
    return dict(sorted(reports.items()))


def score_bins(head: LinearHead, stats: FeatureStatistics) -> ScoreBins:
    """Return bins that fit the logits which `head` gives to rows with these statistics."""
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    covariance = weight @ (stats.scatter() / stats.rows) @ weight.T
    mean = (weight @ stats.mean() + bias).numpy()
    return ScoreBins.from_moments(mean, covariance.numpy(), multi_label=stats.multi_label)
