"""The coordinator of differentially private runs: noisy sums, a head of them, and its noisy evaluation."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhead.errors import FedheadError
from fedhead.heads import UnitHead
from fedhead.privacy.accountant import epsilon_for
from fedhead.privacy.heads import NoisySums, solve_noisy, temperature_of
from fedhead.privacy.mechanism import Mechanism
from fedhead.privacy.stages import BINS, CENTRE_SHARE, LOSS_LIMIT, better_solver, centre_of
from fedhead.protocol.actions import PRIVATE
from fedhead.protocol.private import LARGEST_WEIGHT, NoisyReply, PrivateRequest
from fedhead.server.collect import Question, collect
from fedhead.server.coordinator import Coordinator
from fedhead.server.exchange import Exchange
from fedhead.server.runs.history import Outcome, Round
from fedhead.sums.sums import Arrays

logger = logging.getLogger(__name__)

_NORMAL = 1.96


class PrivateCoordinator(Coordinator):
    """Runs a differentially private configuration on a Grid; see `Coordinator`.

    Its `mu^2` of the training rows goes to their centre and to the sums that a head is solved from, and a share of that
    of the held-out rows to the head's evaluation. What is asked for depends on public figures and earlier noisy replies
    alone.
    """

    def run(self) -> Outcome:
        """Run to the end. A run that failed starts again: sites answer equal requests by their stored replies.

        Raises:
            FedheadError: if too few sites can take part, or replies of an exchange are missing.
        """
        self._exchange = self._roster.gather()
        self._exchange.add_traffic(self._await_sites(0))
        terms = self.manifest.privacy
        assert terms is not None
        self._parties = len(self._roster.nodes)
        self._deviations = math.sqrt(self._parties) if terms.noise == "own" else 1.0
        self.observer.on_step("statistics", 0)
        solved = solve_private(self._ask, terms.mu, len(self.config.classes), self._deviations)
        self.observer.on_step("evaluate", 0)
        evaluation = self._evaluate(terms.spends("held_out"), solved) if terms.evaluate else {}
        spent = {
            "epsilon": terms.epsilon,
            "delta": terms.delta,
            "unit": terms.unit,
            "noise": terms.noise,
            "solver": solved.solver,
            "accounts": {
                "training rows": _account(terms.mu, terms.delta),
                "held-out rows": _account(terms.spends("held_out"), terms.delta),
            },
        }
        return self._outcome(
            solved.head(self.backbone.probe()), {**spent, **({"evaluation": evaluation} if evaluation else {})}
        )

    def _evaluate(self, mu: float, solved: "Solved") -> dict[str, Any]:
        arrays = {"shift": solved.shift, "weight": solved.weight, "bias": solved.bias}
        request = PrivateRequest("evaluation", mu, {name: array.numpy() for name, array in arrays.items()})
        mechanism, sums = self._ask(request)
        return evaluation_of(sums, {name: self._deviations * mechanism.sigma(name) for name in mechanism.arrays})

    def _ask(self, request: PrivateRequest) -> tuple[Mechanism, Arrays]:
        """Return the mechanism of a release, and the noisy sums over all sites.

        Raises:
            FedheadError: if a site's reply is missing.
        """
        mechanism = request.mechanism(len(self.config.classes), self.backbone.num_features)
        content = PrivateRequest(request.stage, request.mu, request.arrays, request.step, self._parties).to_content()
        question = Question(PRIVATE, content, NoisyReply.zeros(mechanism))
        collected = collect(self._messenger, self._roster.nodes, question, self._roster.rows)
        self._exchange.include(collected.exchange)
        if collected.exchange.dropped:
            # Without one site's noise the others' would be too little, or the sums of other rows than before.
            raise FedheadError(
                f"A private run needs every site's reply, and some are missing.{collected.exchange.first_reasons()} "
                "Start it again: sites repeat the replies that they have given, and spend nothing for them."
            )
        return mechanism, collected.total.arrays

    def _outcome(self, head: UnitHead, privacy: Mapping[str, Any]) -> Outcome:
        evaluation = privacy.get("evaluation", {})
        only = Round(
            number=0,
            sites=len(self._roster.nodes),
            seconds=self._version(0, {}, Exchange()).seconds,
            bytes_down=self._exchange.bytes_down,
            bytes_up=self._exchange.bytes_up,
            loss=evaluation.get("loss"),
            score=evaluation["accuracy"][0] if evaluation else None,
            test_score=self.test(head) if self.test else None,
        )
        self.observer.on_round(only)
        self.observer.on_step("finish", 0)
        return Outcome(
            head=head,
            kept_round=0,
            all_rows=False,
            history=[only],
            participants=sorted(self._roster.nodes),
            sites={},
            calibrated=None,
            diagnoses=[],
            coverage=[],
            refused=dict(sorted(self._roster.refused.items())),
            full_model_bytes=0,
            statistics=None,
            traffic=self._messenger.traffic,
            privacy=dict(privacy),
        )


@dataclass(frozen=True)
class Solved:
    """A head solved from noisy sums.

    Attributes:
        solver: the sums that it was solved from.
        weight: `[C, d]`, float32, for rows of norm 1 about the centre.
        bias: `[C]`.
        shift: `[d]`, the noisy centre.
    """

    solver: str
    weight: Tensor
    bias: Tensor
    shift: Tensor

    def head(self, probe: Tensor) -> UnitHead:
        """Return the head for features as they are, given the features `[PROBES, d]` of the probe."""
        return UnitHead.from_parts(self.weight, self.bias, probe.cpu().double().mean(0).float(), self.shift)


Ask = Callable[[PrivateRequest], tuple[Mechanism, Arrays]]
"""Returns the mechanism of a release, and the noisy sums over all sites."""


def solve_private(ask: Ask, mu: float, classes: int, deviations: float = 1.0) -> Solved:
    """Solve a head from two releases: the centre of the rows, and sums about it.

    Args:
        ask: makes the releases.
        mu: that both may spend.
        classes: `C`.
        deviations: how many times a mechanism's own noise is in the sums: more than once if each site adds all of it.
    """
    mechanism, sums = ask(PrivateRequest("centre", mu * math.sqrt(CENTRE_SHARE)))
    count = float(sums["count"][0])
    shift = centre_of(count, sums["total"], deviations * mechanism.sigma("total")).astype(np.float32)
    rest = mu * math.sqrt(1 - CENTRE_SHARE)
    solver = better_solver(count, classes, rest / deviations)
    mechanism, sums = ask(PrivateRequest(solver, rest, {"shift": shift}))
    sigmas = [deviations * mechanism.sigma(name) for name in mechanism.arrays]
    gram = torch.from_numpy(sums["gram"]) if "gram" in sums else None
    noisy = NoisySums(torch.from_numpy(sums["counts"]), torch.from_numpy(sums["sums"]), gram, *sigmas)
    head = solve_noisy(noisy)
    temperature = temperature_of(head, noisy)
    weight, bias = ((part / temperature).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT).float() for part in head.affine())
    return Solved(solver, weight, bias, torch.from_numpy(shift))


def evaluation_of(sums: Arrays, sigmas: Mapping[str, float]) -> dict[str, Any]:
    """Return the evaluation of a head from noisy sums over held-out rows.

    The interval of the accuracy holds for sampling and for noise; both are normal to good approximation.

    Args:
        sums: as `fedhead.privacy.stages` defines them.
        sigmas: the standard deviation of the noise on each array.
    """
    wrong, right = (float(value) for value in sums["outcomes"])
    rows = max(wrong + right, 1.0)
    accuracy = min(max(right / rows, 0.0), 1.0)
    noise = sigmas["outcomes"] * math.sqrt(accuracy**2 + (1 - accuracy) ** 2) / rows
    half = _NORMAL * math.sqrt(accuracy * (1 - accuracy) / rows + noise**2)
    counts = np.maximum(sums["reliability"], 0).sum(0)
    right_share = np.clip(sums["reliability"][1] / np.maximum(counts, 1), 0, 1)
    return {
        "rows": wrong + right,
        "accuracy": [accuracy, max(accuracy - half, 0.0), min(accuracy + half, 1.0)],
        "loss": min(max(float(sums["loss"][0]) / rows, 0.0), LOSS_LIMIT),
        "confusion": np.maximum(np.rint(sums["confusion"]), 0).astype(int).tolist(),
        "sigma": dict(sigmas),
        "reliability": [
            {"from": place / BINS, "to": (place + 1) / BINS, "rows": float(counts[place]), "accuracy": float(share)}
            for place, share in enumerate(right_share)
        ],
    }


def _account(mu: float, delta: float) -> dict[str, float]:
    return {"mu": mu, "epsilon": epsilon_for(mu, delta)}
