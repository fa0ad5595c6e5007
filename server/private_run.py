"""The coordinator of differentially private runs: noisy sums, a head of them, and its noisy evaluation."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedhead.backbones import Backbone
from fedhead.errors import FedheadError
from fedhead.heads import UnitHead
from fedhead.privacy.accountant import epsilon_for
from fedhead.privacy.descent import descend
from fedhead.privacy.heads import NoisySums, solve_noisy, temperature_of, trusted_names
from fedhead.privacy.mechanism import Mechanism
from fedhead.privacy.sensitivity import unit_rows
from fedhead.privacy.stages import (
    BINS,
    CENTRE_SHARE,
    LARGEST_WEIGHT,
    LOSS_LIMIT,
    NAMES_SHARE,
    better_solver,
    calibration_share,
    centre_of,
    descends,
    noise_level,
    temperature_from,
)
from fedhead.protocol.actions import PRIVATE
from fedhead.protocol.private import NoisyReply, PrivacyTerms, PrivateRequest
from fedhead.secure.session import threshold_for
from fedhead.server.collect import Question, collect
from fedhead.server.coordinator import Coordinator
from fedhead.server.exchange import Exchange
from fedhead.server.runs.history import Outcome, Round
from fedhead.sums.sums import Arrays

logger = logging.getLogger(__name__)

_NORMAL = 1.96

_BATCH = 64
"""Names of classes that go through the backbone at a time."""

_SETTLED = "settled"
"""In a checkpoint, the entry that says how many sites' noises add up."""


class PrivateCoordinator(Coordinator):
    """Runs a differentially private configuration on a Grid; see `Coordinator`.

    Its `mu^2` of the training rows goes to their centre, and to rounds of noisy gradients or the sums that a head is
    solved from, and a share of that of the held-out rows to the head's evaluation. What is asked for depends on public
    figures and earlier noisy replies alone.
    """

    def run(self) -> Outcome:
        """Run to the end, or from the first release that the checkpoint lacks.

        Raises:
            FedheadError: if too few sites can take part, or replies of an exchange are missing.
        """
        self._exchange = self.roster.gather()
        self._exchange.add_traffic(self.attendance.await_sites(0))
        terms = self.manifest.privacy
        assert terms is not None
        self._parties = self._settle_parties(terms)
        self.observer.on_step("statistics", 0)
        names = named_features(self.backbone, self.config.classes)
        solved = solve_private(self._ask, terms.mu, len(self.config.classes), self.config.rounds, names)
        self.observer.on_step("evaluate", 0)
        evaluation = self._evaluate(terms.spends("held_out"), solved) if terms.evaluate else {}
        spent = {
            "epsilon": terms.epsilon,
            "delta": terms.delta,
            "unit": terms.unit,
            "noise": terms.noise,
            "secure_sum": self.config.privacy.secure_sum,
            "parties": self._parties,
            "max_colluding": terms.max_colluding,
            "solver": solved.solver,
            "names": solved.names,
            **({"rounds": solved.rounds, "asked_rounds": self.config.rounds} if self.config.rounds else {}),
            "accounts": {
                "training rows": _account(terms.mu, terms.delta),
                "held-out rows": _account(terms.spends("held_out"), terms.delta),
            },
        }
        return self._outcome(
            solved.head(self.backbone.probe()), {**spent, **({"evaluation": evaluation} if evaluation else {})}
        )

    def _settle_parties(self, terms: PrivacyTerms) -> int:
        """Return the number of sites whose noises add up to the variance; a resumed run keeps it.

        Under secure summation these are the sites that are in every sum and do not collude.
        """
        saved = self.checkpoint.releases if self.checkpoint is not None else {}
        if _SETTLED in saved:
            return int(saved[_SETTLED][0]["parties"])
        sites = len(self.roster.nodes)
        if terms.noise == "own":
            parties = 1
        elif self.messenger.summation is None:
            parties = sites
        else:
            least = sites if self.messenger.in_process else min(sites, self.config.min_sites)
            parties = threshold_for(least, terms.max_colluding) - terms.max_colluding
        self._keep(_SETTLED, {"parties": parties}, {})
        return parties

    def _keep(self, name: str, values: Mapping[str, Any], arrays: Arrays) -> None:
        if self.checkpoint is not None and not self.messenger.in_process:
            self.checkpoint.record_release(name, values, arrays)

    def _evaluate(self, mu: float, solved: "Solved") -> dict[str, Any]:
        arrays = {"shift": solved.shift, "weight": solved.weight, "bias": solved.bias}
        released = self._ask(PrivateRequest("evaluation", mu, {name: array.numpy() for name, array in arrays.items()}))
        return evaluation_of(released.sums, {name: released.sigma(name) for name in released.mechanism.arrays})

    def _ask(self, request: PrivateRequest) -> "Released":
        """Return the noisy sums over all sites, from the checkpoint if it has them.

        Raises:
            FedheadError: if a site's reply is missing, or under secure summation too many are.
        """
        if request.stage == "gradient":
            self.observer.on_step("train", request.step)
        mechanism = request.mechanism(len(self.config.classes), self.backbone.num_features)
        asked = replace(request, parties=self._parties)
        key = asked.key(self.manifest.model_dump_json(), self._parties)
        if self.checkpoint is not None and key in self.checkpoint.releases:
            known, sums = self.checkpoint.releases[key]
            return Released(mechanism, sums, float(known["deviations"]))
        self._exchange.add_traffic(self.attendance.await_sites(0))
        question = Question(PRIVATE, asked.to_content(), NoisyReply.zeros(mechanism))
        collected = collect(self.messenger, self.roster.nodes, question, self.roster.rows)
        self._exchange.include(collected.exchange)
        secure, missing = self.messenger.summation is not None, collected.exchange.dropped
        if not collected.replies or (missing and not secure):
            # Without one site's noise the others' would be too little, or the sums of other rows than before.
            hint = f" {self.checkpoint.hint}" if self.checkpoint is not None else ""
            raise FedheadError(
                f"A private run needs {'enough sites' if secure else 'every site'} in a sum, and some are missing."
                f"{collected.exchange.first_reasons()} Sites repeat the replies that they have given, and spend "
                f"nothing for them.{hint}"
            )
        self.attendance.skip_late(collected.exchange)
        sites = len(self.roster.nodes) if not secure else len(collected.sites)
        released = Released(mechanism, collected.total.arrays, math.sqrt(sites / self._parties))
        self._keep(key, {"deviations": released.deviations}, released.sums)
        return released

    def _outcome(self, head: UnitHead, privacy: Mapping[str, Any]) -> Outcome:
        evaluation = privacy.get("evaluation", {})
        only = Round(
            number=0,
            sites=len(self.roster.nodes),
            seconds=self.version(0, {}, Exchange()).seconds,
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
            participants=sorted(self.roster.nodes),
            sites={},
            calibrated=None,
            diagnoses=[],
            coverage=[],
            refused=dict(sorted(self.roster.refused.items())),
            full_model_bytes=0,
            statistics=None,
            traffic=self.messenger.traffic,
            privacy=dict(privacy),
        )


@dataclass(frozen=True)
class Solved:
    """A head of noisy releases.

    Attributes:
        solver: `gradients`, or the sums that it was solved from or starts from.
        weight: `[C, d]`, float32, for rows of norm 1 about the centre.
        bias: `[C]`.
        shift: `[d]`, the noisy centre.
        rounds: of noisy gradients.
        names: whether class means were shrunk to the names of classes.
    """

    solver: str
    weight: Tensor
    bias: Tensor
    shift: Tensor
    rounds: int = 0
    names: bool = False

    def head(self, probe: Tensor) -> UnitHead:
        """Return the head for features as they are, given the features `[PROBES, d]` of the probe."""
        return UnitHead.from_parts(self.weight, self.bias, probe.cpu().double().mean(0).float(), self.shift)


@dataclass(frozen=True)
class Released:
    """Noisy sums over all sites.

    Attributes:
        mechanism: that the account is charged for.
        sums: by name.
        deviations: how many times the mechanism's noise is in the sums: more than once if sites add more than their
            part of it, because others could be lost or collude, or because each adds all of it.
    """

    mechanism: Mechanism
    sums: Arrays
    deviations: float = 1.0

    def sigma(self, name: str) -> float:
        """Return the standard deviation of the noise in one array."""
        return self.deviations * self.mechanism.sigma(name)


Ask = Callable[[PrivateRequest], Released]
"""Makes a release."""


def named_features(backbone: Backbone, classes: Sequence[str]) -> Tensor | None:
    """Return `[C, d]`, features of the names of classes about the probe's mean, of norm 1; None if not of texts."""
    if backbone.kind != "text":
        return None
    texts = [re.sub(r"[\s_-]+", " ", name).strip() or name for name in classes]
    parts = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    prepare = backbone.preprocessing
    features = [backbone.features(prepare.collate([prepare(text) for text in part])).cpu().double() for part in parts]
    return unit_rows(torch.cat(features) - backbone.probe().cpu().double().mean(0))


def solve_private(ask: Ask, mu: float, classes: int, rounds: int = 0, names: Tensor | None = None) -> Solved:
    """Solve a head by rounds of noisy gradients about the centre of the rows, or from sums about it.

    Public figures and the noisy number of rows decide between the two, before anything else is asked for.

    Args:
        ask: makes the releases.
        mu: that all may spend.
        classes: `C`.
        rounds: of gradients that are asked for.
        names: `[C, d]`, features of the names of classes, of norm 1 as rows are before their centre is known.
    """
    released = ask(PrivateRequest("centre", mu * math.sqrt(CENTRE_SHARE)))
    count = float(released.sums["count"][0])
    shift = centre_of(count, released.sums["total"], released.sigma("total")).astype(np.float32)
    about = _Centre(shift, count, released.deviations)
    if names is not None:
        names = unit_rows(names - torch.from_numpy(shift).double())
    rest = mu * math.sqrt(1 - CENTRE_SHARE)
    if descends(about.noise_level(rest, classes), rounds):
        return _descended(ask, rest, about, classes, rounds, names)
    return _summed(ask, mu, about, classes, names)


@dataclass(frozen=True, eq=False)
class _Centre:
    """The first release: the noisy centre of rows.

    Attributes:
        shift: `[d]`, float32.
        count: the noisy number of rows.
        deviations: see `Released`.
    """

    shift: npt.NDArray[np.float32]
    count: float
    deviations: float

    def noise_level(self, mu: float, classes: int) -> float:
        """Return the noise on the mean of a class if sums of all classes spend `mu`."""
        return noise_level(self.count, classes, len(self.shift), mu / self.deviations)


def _descended(ask: Ask, mu: float, about: _Centre, classes: int, rounds: int, names: Tensor | None) -> Solved:
    """Make rounds of noisy gradients, starting from zeros, or from class means if these prove near the names."""
    size, named, rest = len(about.shift), False, mu
    weight, bias = torch.zeros(classes, size), torch.zeros(classes)
    if names is not None:
        noisy = _class_sums(ask, PrivateRequest("nearest-mean", mu * math.sqrt(NAMES_SHARE)), about, names)
        rest = mu * math.sqrt(1 - NAMES_SHARE)
        if named := trusted_names(noisy) is not None:
            weight, bias = (part.float() for part in solve_noisy(noisy).affine())
    each = rest / math.sqrt(rounds)

    def gradient(step: int, weight: Tensor, bias: Tensor) -> Tensor:
        arrays = {"shift": about.shift, "weight": weight.numpy(), "bias": bias.numpy()}
        return torch.from_numpy(ask(PrivateRequest("gradient", each, arrays, step)).sums["gradient"])

    level = about.noise_level(rest, classes)
    weight, bias = descend(gradient, weight, bias, max(about.count, 1.0), rounds, level)
    solver = "nearest-mean" if named else "gradients"
    return Solved(solver, weight, bias, torch.from_numpy(about.shift), rounds, named)


def _summed(ask: Ask, mu: float, about: _Centre, classes: int, names: Tensor | None) -> Solved:
    """Solve a head from sums, and calibrate it if that is worth its share of all `mu`."""
    calibrating = calibration_share(about.count, mu / about.deviations)
    rest = mu * math.sqrt(1 - CENTRE_SHARE - calibrating)
    solver = better_solver(about.noise_level(rest, classes))
    noisy = _class_sums(ask, PrivateRequest(solver, rest), about, names)
    head = solve_noisy(noisy)
    temperature = temperature_of(head, noisy)
    weight, bias = ((part / temperature).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT).float() for part in head.affine())
    if calibrating:
        arrays = {"shift": about.shift, "weight": weight.numpy(), "bias": bias.numpy()}
        released = ask(PrivateRequest("calibration", mu * math.sqrt(calibrating), arrays))
        best = temperature_from(released.sums["excess"], released.sigma("excess"))
        weight, bias = weight / best, bias / best
    return Solved(solver, weight, bias, torch.from_numpy(about.shift), names=trusted_names(noisy) is not None)


def _class_sums(ask: Ask, request: PrivateRequest, about: _Centre, names: Tensor | None) -> NoisySums:
    """Ask for sums by class about the centre."""
    released = ask(replace(request, arrays={"shift": about.shift}))
    sums, gram = released.sums, "gram" in released.sums
    return NoisySums(
        counts=torch.from_numpy(sums["counts"]),
        sums=torch.from_numpy(sums["sums"]),
        gram=torch.from_numpy(sums["gram"]) if gram else None,
        sigma_counts=released.sigma("counts"),
        sigma_sums=released.sigma("sums"),
        sigma_gram=released.sigma("gram") if gram else 0.0,
        names=names,
    )


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
