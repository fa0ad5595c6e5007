"""Which sites take part in a run, under which node of the Grid, and why others do not."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from flwr.app import RecordDict

from fedhead.messages import DESCRIBE, INSTALL, Description, Manifest, MessageError, Payload, single_bytes
from fedhead.server.exchange import Exchange, Messenger
from fedhead.server.observer import Observer, SiteState, Standing
from fedhead.server.weights_file import WeightsFile

logger = logging.getLogger(__name__)


INSTALLING = 16
"""To so many sites weights are sent at the same time."""

DESCRIBED = 100_000
"""So many sites describe themselves in one merged reply, which a header of safetensors holds."""


Verdict = Literal["refused", "lacking", "fit"]
"""Whether a site can take part; `lacking`, once it has the weights."""


@runtime_checkable
class NamedSites(Protocol):
    """A Grid that knows what name each node is registered under."""

    def site_name(self, node_id: int) -> str | None:
        """Return the name; None if the node is not known."""


class Roster:
    """The sites of a run: they are told of it, given the backbone where they lack it, and known by name from then on.

    Args:
        messenger: reaches the sites.
        manifest: what they are told.
        weights: the backbone's, for those that lack them.
        probe: its features `[PROBES, d]` of the probe.
        observer: is told of the sites.

    Attributes:
        nodes: the node of each site that takes part, by name.
        rows: how many rows each of them said that it has.
        refused: why others take no part.
        excluded: those of them whose sums could not be used; they take no part in the rest of the run.
        turned_away: nodes that are connected and take no part.
    """

    def __init__(
        self,
        messenger: Messenger,
        manifest: Manifest,
        weights: WeightsFile,
        probe: torch.Tensor,
        observer: Observer,
    ) -> None:
        self.nodes: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.excluded: dict[str, str] = {}
        self.turned_away: set[int] = set()
        self.weights = weights
        self._messenger = messenger
        # Asked once: it takes longer than all else that is asked of a site.
        self._named = messenger.grid if isinstance(messenger.grid, NamedSites) else None
        self._manifest = manifest
        self._probe = probe
        self._observer = observer
        self._states: dict[str, SiteState] = {}
        self._changed = False

    def gather(self, exchange: Exchange) -> None:
        """Describe the run to every site, install the backbone where it is missing, and know who takes part."""
        self._observer.on_step("describe", 0)
        nodes = {str(node): node for node in self._messenger.grid.get_node_ids()}
        descriptions = self._descriptions(nodes, DESCRIBE, self.description(), exchange)
        # Who is registered under another name counts as no namesake, and is refused alone.
        claimed = Counter(
            description.site
            for key, description in descriptions.items()
            if self._registered(nodes[key]) in (None, description.site)
        )
        lacking: dict[str, int] = {}
        for key, description in sorted(descriptions.items()):
            if claimed[description.site] > 1:
                self.refuse(
                    f"node {key}",
                    f"{claimed[description.site]} sites call themselves {description.site!r}; give each its own name.",
                )
                continue
            verdict = self.judge(description, nodes[key])
            if verdict == "lacking":
                lacking[description.site] = nodes[key]
            elif verdict == "fit":
                self.admit(description, nodes[key])
        if lacking:
            self._observer.on_step("install", 0)
            self.tell()
            self._install(lacking, exchange)
        for name, reason in exchange.dropped.items():
            node_id = nodes.get(name, lacking.get(name))
            site = name if node_id is None else self.name_of(node_id, name)
            if name in exchange.late:
                self._note(site, "lost", reason)
                nodes = {key: node for key, node in nodes.items() if node != node_id}
            else:
                self.refuse(site, reason)
        # Who was only late is met again.
        self.turned_away = set(nodes.values()) - set(self.nodes.values())
        self.tell()

    def description(self) -> RecordDict:
        """Return what every site is told."""
        return Payload(self._manifest.model_dump(mode="json"), {"probe": self._probe.numpy()}).to_content()

    def judge(self, description: Description, node_id: int, sent: int | None = None) -> Verdict:
        """Note what a site says of itself, and return whether it can take part.

        Args:
            description: what it says.
            node_id: where it is.
            sent: where the chunk of weights begins that it answers to, if it answers to one.
        """
        site = description.site
        registered = self._registered(node_id)
        refusal = description.refusal or self.excluded.get(site, "")
        if registered is not None and registered != site:
            refusal = f"It calls itself {site!r} and is registered as {registered!r}; use the kit made for {site}."
            site = registered
        elif site in self.nodes and self.nodes[site] != node_id:
            site, refusal = (
                f"node {node_id}",
                f"A site of the name {site!r} takes part already; give each its own name.",
            )
        elif sent is not None and not description.has_weights and description.received <= sent:
            refusal = "The weights were sent, but it still has none."
        if refusal:
            self.refuse(site, refusal)
            return "refused"
        self.refused.pop(site, None)
        if description.has_weights:
            return "fit"
        self._note(site, "lacking", rows=description.rows, weights=description.received / self.weights.size)
        return "lacking"

    def admit(self, description: Description, node_id: int, server_round: int = 0) -> None:
        """Have a site take part from a round on."""
        site = description.site
        self.nodes[site] = node_id
        self.rows[site] = description.rows
        self._note(site, "ready", rows=description.rows, weights=1.0, joined=server_round)

    def refuse(self, site: str, reason: str) -> None:
        """Note why a site takes no part."""
        self.refused[site] = reason
        self._note(site, "refused", reason)
        logger.warning("%s takes no part: %s", site, reason)

    def lose(self, site: str, reason: str) -> None:
        """Go on without a site until it is there again."""
        if self.nodes.pop(site, None) is not None:
            self._note(site, "lost", reason)
            logger.warning("%s is lost, and skipped until it is there again: %s.", site, reason.rstrip("."))

    def tell(self) -> None:
        """Tell the observer how all sites stand, if that changed."""
        if self._changed:
            self._changed = False
            self._observer.on_sites(dict(self._states))

    def exclude(self, dropped: Mapping[str, str]) -> None:
        """Go on without sites whose sums could not be used: the head would be of other rows than those trained on."""
        for site in sorted(dropped.keys() & self.nodes.keys()):
            self.excluded[site] = dropped[site]
            self.turned_away.add(self.nodes.pop(site))
            self.refuse(site, dropped[site])
        self.tell()

    def shortage(self, needed: int) -> str:
        """Return a sentence if fewer than `needed` sites take part, else nothing."""
        if len(self.nodes) >= needed:
            return ""
        missing = {site: state.reason for site, state in self._states.items() if state.standing in ("refused", "lost")}
        installing = [site for site, state in self._states.items() if state.standing == "lacking"]
        if not self._states:
            return f"No site is connected, and the run needs {needed} or more."
        able = f" ({', '.join(sorted(self.nodes)[:3])}{', ...' if len(self.nodes) > 3 else ''})" if self.nodes else ""
        receiving = f" {len(installing)} of them still need the weights." if installing else ""
        reasons = "".join(f" {site}: {reason.rstrip('.')}." for site, reason in sorted(missing.items())[:3])
        return (
            f"{len(self.nodes)} of {len(self._states)} sites can take part{able}, and the run needs {needed} or more."
            f"{receiving}{reasons}"
        )

    def _install(self, lacking: Mapping[str, int], exchange: Exchange) -> None:
        """Send the weights to sites that lack them, beginning where each was interrupted before."""
        batch = INSTALLING if self.weights.in_chunks else len(lacking)
        names = list(lacking)
        for start in range(0, len(names), batch):
            offsets: dict[str, int | None] = dict.fromkeys(names[start : start + batch], None)
            if not self.weights.in_chunks:
                offsets = dict.fromkeys(offsets, 0)
            while offsets:
                offset = min(offsets.values(), key=lambda one: -1 if one is None else one)
                asked = {site: lacking[site] for site, reached in offsets.items() if reached == offset}
                content = self.weights.question() if offset is None else self.weights.chunk(offset)
                answers = self._descriptions(asked, INSTALL, content, exchange)
                for site in asked:
                    del offsets[site]
                    if site not in answers:
                        continue
                    verdict = self.judge(answers[site], lacking[site], offset)
                    if verdict == "lacking":
                        offsets[site] = answers[site].received
                    elif verdict == "fit":
                        self.admit(answers[site], lacking[site])
                self.tell()

    def name_of(self, node_id: int, known_as: str = "") -> str:
        """Return what a node is registered as, or else what it is known as, or else a name for it."""
        return self._registered(node_id) or known_as or f"node {node_id}"

    def _registered(self, node_id: int) -> str | None:
        return self._named.site_name(node_id) if self._named is not None else None

    def _descriptions(
        self, nodes: Mapping[str, int], action: str, content: RecordDict, exchange: Exchange
    ) -> dict[str, Description]:
        descriptions: dict[str, Description] = {}
        names_of_all = list(nodes)
        parts = [names_of_all[start : start + DESCRIBED] for start in range(0, len(nodes), DESCRIBED)]
        answers = (
            self._messenger.ask_together({name: nodes[name] for name in part}, action, content, exchange)
            for part in parts
        )
        for names, answer in chain.from_iterable(answers):
            try:
                described = Description.several_from_content(answer, len(names))
                sites = [description.site for description in described]
                for name, site in zip(names, sites, strict=True):
                    self._messenger.traffic.rename(name, site)
                self._messenger.receive(sites, action, single_bytes(answer), exchange)
            except MessageError as error:
                for name in names:
                    exchange.drop(name, str(error))
                continue
            descriptions.update(zip(names, described, strict=True))
        return descriptions

    def _note(self, site: str, standing: Standing, reason: str = "", **answered: float) -> None:
        """Note how a site stands, and what it answered if it did."""
        values: dict[str, Any] = {**answered, "seen": time.time()} if answered else {}
        state = self._states.get(site, SiteState(standing))
        self._states[site] = replace(state, standing=standing, reason=reason, **values)
        self._changed = self._changed or self._states[site] != state
