"""A membership attack on heads: how well does a head reveal the rows it was solved from?

LiRA, the likelihood-ratio attack (Carlini et al., 2022, "Membership inference attacks from first principles"), is
cheap on heads: many shadow heads are solved from random halves of the rows. For each row, the scores of the shadow
heads that it was part of, and of the others, are two normal distributions, and an attacked head's score is judged by
their likelihoods. The attacker knows all rows and how heads are solved, so it is stronger than most real ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.client.agreement import Agreement
from fedhead.client.private_sums import private_sums
from fedhead.client.release.guard import Guard
from fedhead.client.site_data import hold
from fedhead.config import RunConfig
from fedhead.data import IntArray
from fedhead.errors import UserError
from fedhead.heads import Head
from fedhead.protocol.messages import Manifest
from fedhead.protocol.private import PrivateRequest
from fedhead.server.private_run import Released, named_features, solve_private
from fedhead.simulations.sites import SharedData
from fedhead.solvers import solve_head
from fedhead.sums.features import FeatureStatistics

SHADOWS, ATTACKED = 48, 8
"""Heads that the attacker solves, and heads that are attacked."""

RATES = (0.001, 0.01, 0.1)
"""False positive rates at which the attack is reported."""

_POINTS = 101
_LEAST_DEVIATION = 1e-6

FloatArray = npt.NDArray[np.float64]
Solve = Callable[[IntArray], Head]
"""Solves a head from some rows, for features as they are."""


@dataclass(frozen=True, eq=False)
class Attack:
    """The outcome of an attack.

    Attributes:
        scores: `[m]`, the log likelihood ratio that a row was part of a head; larger means likelier.
        members: `[m]`, whether it was.
        mu: that the heads satisfy; None if they are not private.
    """

    scores: FloatArray
    members: npt.NDArray[np.bool_]
    mu: float | None = None

    def detected(self, rate: float) -> float:
        """Return the share of members that are detected at a false positive rate."""
        threshold = np.quantile(self.scores[~self.members], 1 - rate, method="higher")
        return float((self.scores[self.members] > threshold).mean())

    def bound(self, rate: float) -> float | None:
        """Return the largest share that any attack can detect at a false positive rate, for private heads.

        `1 - Phi(Phi^-1(1 - rate) - mu)` (Dong, Roth and Su, 2022).
        """
        if self.mu is None or not 0 < rate < 1:
            return None if self.mu is None else rate
        normal = NormalDist()
        return 1 - normal.cdf(normal.inv_cdf(1 - rate) - self.mu)

    @property
    def area(self) -> float:
        """The area under the ROC: the probability that a member scores higher than another row."""
        order = np.argsort(self.scores, kind="stable")
        ranks = np.empty(len(order))
        ranks[order] = np.arange(1, len(order) + 1)
        inside = int(self.members.sum())
        outside = len(self.members) - inside
        return float((ranks[self.members].sum() - inside * (inside + 1) / 2) / (inside * outside))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types: the area, and points of the ROC beside the bound."""
        rates = np.linspace(0, 1, _POINTS)[1:-1].tolist()
        return {
            "method": "likelihood ratio",
            "trials": len(self.scores),
            "area": self.area,
            "mu": self.mu,
            "at": [{"false": rate, "true": self.detected(rate), "bound": self.bound(rate)} for rate in RATES],
            "roc": [[rate, self.detected(rate)] for rate in rates],
            "bound": [[rate, self.bound(rate)] for rate in rates] if self.mu is not None else None,
        }


def attack_membership(config: RunConfig, backbone: Backbone, shared: SharedData, rows: IntArray) -> Attack:
    """Attack heads that are solved as a run solves its first one, each from a random half of the rows.

    A private run's heads are solved from noisy sums of one site: in total, the sites of a run add the same noise.

    Args:
        config: the run.
        backbone: of the run.
        shared: the features of all rows.
        rows: those of all sites.

    Raises:
        UserError: if the run solves no linear head from sums.
    """
    if not config.privacy.on and (config.head != "linear" or config.init not in ("lda", "ridge", "nearest-mean")):
        raise UserError("The membership attack is on linear heads that are solved from sums: set head and init so.")
    features, labels = shared.data.features[rows].cpu(), shared.data.labels[rows].cpu()
    if not config.privacy.on:
        origin = shared.probe.cpu().double().mean(0)

        def solve(chosen: IntArray) -> Head:
            part = FeatureStatistics.from_features(features[chosen], labels[chosen], len(config.classes), origin)
            return solve_head(part, config.init).float()

        return attack_heads(features, labels, solve, seed=config.seed)
    agreed = _agreement(config, backbone, shared.probe.cpu())
    terms = agreed.manifest.privacy
    assert terms is not None

    names = named_features(backbone, config.classes)

    def solve_noisy(chosen: IntArray) -> Head:
        own = rows[chosen]
        holding = hold(
            "", own, np.zeros(len(own), np.bool_), shared.data, shared.labels, shared.keys, shared.task, Guard.off()
        )

        def ask(request: PrivateRequest) -> Released:
            mechanism = request.mechanism(len(config.classes), backbone.num_features)
            return Released(mechanism, mechanism.add_noise(private_sums([holding], agreed, request)))

        return solve_private(ask, terms.mu, len(config.classes), config.rounds, names).head(shared.probe)

    return attack_heads(features, labels, solve_noisy, mu=terms.mu, seed=config.seed)


def _agreement(config: RunConfig, backbone: Backbone, probe: Tensor) -> Agreement:
    manifest = Manifest.of("attack", config, backbone, config.classes)
    return Agreement(manifest, probe, None)


def attack_heads(
    features: Tensor,
    labels: Tensor,
    solve: Solve,
    *,
    mu: float | None = None,
    shadows: int = SHADOWS,
    attacked: int = ATTACKED,
    seed: int = 0,
) -> Attack:
    """Attack heads that are solved from random halves of some rows.

    Args:
        features: `[n, d]`.
        labels: `[n]`, the classes of these rows.
        solve: the training that is attacked.
        mu: that each head satisfies, if it is private.
        shadows: the number of heads that the attacker solves.
        attacked: the number of heads that are attacked.
        seed: of the halves.
    """
    rng = np.random.default_rng(seed)
    total = shadows + attacked
    # Each row is in half of the heads.
    inside = np.argsort(rng.random((total, len(labels))), axis=1) < len(labels) // 2
    scores = np.stack([_scores(solve(np.flatnonzero(chosen)), features, labels) for chosen in inside])
    known, known_in = scores[:shadows], inside[:shadows]
    likelihoods = [_normal(known, known_in, scores[shadows:]), _normal(known, ~known_in, scores[shadows:])]
    return Attack((likelihoods[0] - likelihoods[1]).ravel(), inside[shadows:].ravel(), mu)


@torch.inference_mode()
def _scores(head: Head, features: Tensor, labels: Tensor) -> FloatArray:
    """Return `[n]`, the logit of each row's class less the largest other one."""
    outputs = head(features).double()
    own = outputs.gather(1, labels[:, None])
    others = outputs.scatter(1, labels[:, None], -torch.inf).max(1, keepdim=True).values
    margins: FloatArray = (own - others)[:, 0].numpy()
    return margins


def _normal(known: FloatArray, chosen: npt.NDArray[np.bool_], scores: FloatArray) -> FloatArray:
    """Return the log density of `scores` `[k, n]` under each row's chosen shadow scores, with one variance for all."""
    counts = np.maximum(chosen.sum(0), 1)
    means = (known * chosen).sum(0) / counts
    variances = ((known - means) ** 2 * chosen).sum(0) / counts
    # Few shadows estimate a row's own variance badly; it is drawn half way to the mean variance.
    deviations = np.sqrt(np.maximum((variances + variances.mean()) / 2, _LEAST_DEVIATION**2))
    result: FloatArray = -0.5 * ((scores - means) / deviations) ** 2 - np.log(deviations)
    return result
