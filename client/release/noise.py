"""The release step that adds calibrated noise, and lets nothing else about rows leave a private run."""

from dataclasses import dataclass
from typing import Literal

from fedhead.client.release.accounts import Account, Accounts
from fedhead.errors import FedheadError
from fedhead.privacy.noise import FloatArray
from fedhead.protocol.messages import Manifest, Payload
from fedhead.protocol.private import PrivacyTerms
from fedhead.protocol.steps import Release, Step


@dataclass(frozen=True)
class Noise(Step):
    """Adds the noise of a private run to its sums, and refuses every other reply about rows to such a run.

    In a simulation the noise of all sites that one reply speaks for is drawn at once. A real site charges its accounts
    and stores each reply; see `Accounts`.

    Attributes:
        accounts: of a real site; None in a simulation.
        own: whether the site adds all noise by itself, whatever a request says.
        unit: what the site protects; a run that protects groups protects their rows, too.
        required: whether the site answers private runs only.
    """

    accounts: Accounts | None = None
    own: bool = False
    unit: Literal["row", "group"] = "row"
    required: bool = False

    def check(self, terms: PrivacyTerms | None, run: str) -> None:
        """Check the terms of a run before anything is computed.

        Raises:
            FedheadError: why the site takes no part under them.
        """
        if terms is None:
            if self.required:
                raise FedheadError(
                    'This site takes part in differentially private runs only ([privacy] require = "dp" in site.toml).'
                )
            return
        if self.accounts is None or not self.accounts.epsilon:
            raise FedheadError(
                "This site has no privacy budget: set epsilon and delta in [privacy] of its site.toml to take part in "
                "differentially private runs."
            )
        if self.unit == "group" and terms.unit == "row":
            raise FedheadError('This site protects groups of rows; set unit = "group" in [privacy] of the run.')
        if terms.noise == "shared":
            raise FedheadError(
                'The run lets all sites share the noise, which only secure summation allows; set noise = "own".'
            )
        needs: dict[Account, float] = {"train": terms.spends("train"), "held_out": terms.spends("held_out")}
        self.accounts.require(run, needs)

    def leave(self, payload: Payload, release: Release) -> Payload:
        terms = None if release.manifest is None else release.manifest.privacy
        if terms is None or not release.parts:
            return payload
        request = release.private
        if request is None:
            raise FedheadError("This run is differentially private: nothing else about rows leaves the site.")
        assert release.manifest is not None
        mechanism = request.mechanism(len(release.manifest.classes), release.manifest.num_features)
        parties = 1 if self.own or terms.noise == "own" else request.parties

        def draw() -> dict[str, FloatArray]:
            return mechanism.add_noise(payload.arrays, parties, release.sites)

        if self.accounts is None:
            return Payload(payload.values, draw())
        key = request.key(release.manifest.model_dump_json())
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
