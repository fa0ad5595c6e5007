"""The release step that adds calibrated noise, and lets nothing else about rows leave a private run."""

import os
from dataclasses import dataclass
from typing import Literal

from fedhead.client.release.accounts import Account, Accounts
from fedhead.errors import FedheadError
from fedhead.privacy.noise import Entropy, FloatArray
from fedhead.protocol.actions import PRIVATE
from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.private import PrivacyTerms, PrivateRequest
from fedhead.protocol.steps import Masking, Release, Step
from fedhead.wording import counted


@dataclass(frozen=True)
class Noise(Step):
    """Adds the noise of a private run to its sums, and refuses every other reply about rows to such a run.

    In a simulation the noise of all sites that one reply speaks for is drawn at once. A real site charges its accounts
    and stores each reply; see `Accounts`. It leaves a part of the noise to other sites only under secure summation, and
    only if enough sites that do not collude add theirs, whichever are lost.

    Attributes:
        accounts: of a real site; None in a simulation.
        own: whether the site takes part only where each site adds all noise by itself.
        max_colluding: the number of other sites that may collude with the coordinator, and know their own noise.
        unit: the protected unit; a run that protects groups protects their rows, too.
        required: whether the site answers private runs only.
        entropy: of the noise; only tests have another.
    """

    accounts: Accounts | None = None
    own: bool = False
    max_colluding: int = 0
    unit: Literal["row", "group"] = "row"
    required: bool = False
    entropy: Entropy = os.urandom

    def check(self, manifest: Manifest) -> None:
        """Check the privacy terms of a run before anything is computed.

        Raises:
            FedheadError: why the site takes no part under them.
        """
        terms = manifest.privacy
        self._require(terms)
        if terms is None:
            return
        if manifest.task != "classification":
            raise FedheadError(
                "Differentially private runs are for classification with one class a row; the noise would not hide the "
                f"rows of a run of the task {manifest.task}."
            )
        if self.accounts is None or not self.accounts.epsilon:
            raise FedheadError(
                "This site has no privacy budget: set epsilon and delta in [privacy] of its site.toml to take part in "
                "differentially private runs."
            )
        if terms.noise == "shared":
            self._check_shared(terms, manifest.secure_sum)
        needs: dict[Account, float] = {"train": terms.spends("train"), "held_out": terms.spends("held_out")}
        self.accounts.require(manifest.run, needs)

    def _check_shared(self, terms: PrivacyTerms, secure_sum: bool) -> None:
        if not secure_sum:
            raise FedheadError(
                "The run lets all sites share the noise, which only secure summation allows; set secure_sum = true or "
                'noise = "own".'
            )
        if self.own:
            raise FedheadError(
                'This site adds all noise by itself ([privacy] noise in its site.toml); set noise = "own" in the run.'
            )
        if terms.max_colluding < self.max_colluding:
            raise FedheadError(
                f"The run's noise is enough without that of {counted(terms.max_colluding, 'colluding site')}, and this "
                f"site demands {self.max_colluding}: set max_colluding = {self.max_colluding} under [privacy] in "
                "run.toml."
            )

    def _parties(self, request: PrivateRequest, terms: PrivacyTerms, masking: Masking | None) -> int:
        """Return the number of sites whose noises add up to the variance.

        Raises:
            FedheadError: if so many sites need not be in the sum, or they may collude.
        """
        if terms.noise == "own":
            return 1
        if self.accounts is None and not self.own:
            return request.parties
        if self.own or masking is None:
            raise FedheadError("The noise of this run is shared, so its sums leave only under secure summation.")
        honest = masking.threshold - max(self.max_colluding, terms.max_colluding)
        if request.parties > honest:
            raise FedheadError(
                f"The noises of {counted(request.parties, 'site')} are to add up, and only {max(honest, 0)} that "
                "do not collude are certain to be in the sum."
            )
        return request.parties

    def _require(self, terms: PrivacyTerms | None) -> None:
        """Check the terms of a run against the site's own rules.

        Raises:
            FedheadError: if they protect less.
        """
        if terms is None and self.required:
            raise FedheadError(
                'This site takes part in differentially private runs only ([privacy] require = "dp" in site.toml).'
            )
        if terms is not None and self.unit == "group" and terms.unit == "row":
            raise FedheadError('This site protects groups of rows; set unit = "group" in [privacy] of the run.')

    def admit(self, action: str, manifest: Manifest, *, masked: bool) -> None:
        self._require(manifest.privacy)
        # Whether another request about rows succeeds is an exact answer about them.
        if manifest.privacy is not None and action != PRIVATE:
            raise FedheadError("This run is differentially private: this site answers requests for noisy sums only.")

    def leave(self, payload: Payload, release: Release) -> Payload:
        terms = None if release.manifest is None else release.manifest.privacy
        if terms is None or not release.parts:
            return payload
        request = release.private
        if request is None:
            raise FedheadError("This run is differentially private: nothing else about rows leaves the site.")
        assert release.manifest is not None
        mechanism = request.mechanism(len(release.manifest.classes), release.manifest.num_features)
        parties = self._parties(request, terms, release.masking)

        def draw() -> dict[str, FloatArray]:
            return mechanism.add_noise(payload.arrays, parties, release.sites, self.entropy)

        if self.accounts is None:
            return Payload(payload.values, draw())
        key = request.key(release.manifest.model_dump_json(), parties)
        most = terms.spends(request.account)
        noisy = self.accounts.release(release.run, request.stage, request.account, mechanism.mu, most, key, draw)
        return Payload(payload.values, noisy)

    def applies(self, manifest: Manifest) -> bool:
        return manifest.privacy is not None

    def describe(self) -> str:
        return (
            "Noise with exact privacy accounting is added to all sums of a differentially private run; nothing else "
            "about rows leaves a site."
        )
