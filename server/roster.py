"""The roster of a run: the sites that take part with their nodes, and the reasons why others do not."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from flwr.app import RecordDict

from fedhead.protocol.actions import DESCRIBE, INSTALL
from fedhead.protocol.messages import Description, Manifest, Payload
from fedhead.server.exchange import Exchange
from fedhead.server.installing import Installation
from fedhead.server.messenger import Messenger, Reply
from fedhead.server.observer import Observer, SiteState, Standing
from fedhead.server.weights_file import WeightsFile
from fedhead.wording import counted

logger = logging.getLogger(__name__)


DESCRIBED = 100_000
"""Sites per merged description, which must fit into a safetensors header."""


Verdict = Literal["refused", "lacking", "fit"]
"""Whether a site can take part; a `lacking` site can once it has the weights."""


class Roster:
    """The sites of a run, which receive its manifest and the backbone if they lack it.

    Args:
        messenger: reaches the sites.
        manifest: the manifest of the run.
        weights: the file of the backbone's weights.
        probe: the backbone's features `[PROBES, d]` of the probe.
        observer: receives the states of the sites.

    Attributes:
        nodes: the node of each site that takes part, by name.
        rows: the number of rows that each of them claims.
        refused: reasons why other sites take no part, by name.
        excluded: the refused sites whose sums could not be used; they stay out for the rest of the run.
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
        self._manifest = manifest
        self._probe = probe
        self._observer = observer
        self._states: dict[str, SiteState] = {}
        self._changed = False

    def gather(self) -> Exchange:
        """Send every site the manifest, install missing backbones, and note the sites that take part."""
        self._observer.on_step("describe", 0)
        nodes = {str(node): node for node in self._messenger.grid.get_node_ids()}
        descriptions, exchange = self._descriptions(nodes, DESCRIBE, self.description())
        # A site that is registered under another name is refused alone, not with its namesakes.
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
            exchange.include(self._install(lacking))
        for name, reason in exchange.dropped.items():
            node_id = nodes.get(name, lacking.get(name))
            site = name if node_id is None else self.name_of(node_id, name)
            if name in exchange.late:
                self._note(site, "lost", reason)
                nodes = {key: node for key, node in nodes.items() if node != node_id}
            else:
                self.refuse(site, reason)
        # Sites that were only late are asked again.
        self.turned_away = set(nodes.values()) - set(self.nodes.values())
        self.tell()
        return exchange

    def description(self) -> RecordDict:
        """Return the message with the manifest and the probe."""
        return Payload(self._manifest.wire(), {"probe": self._probe.numpy()}).to_content()

    def judge(self, description: Description, node_id: int, sent: int | None = None) -> Verdict:
        """Note a site's description, and return whether it can take part.

        Args:
            description: the site's answer.
            node_id: its node.
            sent: the offset of the chunk of weights that it answers, if it answers one.
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
        elif not (refusal or sent is None or description.has_weights or self._advances(sent, description.received)):
            refusal = "The weights were sent, but it still has none."
        if refusal:
            self.refuse(site, refusal)
            return "refused"
        self.refused.pop(site, None)
        if description.has_weights:
            return "fit"
        self._note(site, "lacking", rows=description.rows, weights=min(description.received / self.weights.size, 1.0))
        return "lacking"

    def _advances(self, sent: int, received: int) -> bool:
        # The last chunk ends in weights that the site has, or in none.
        return received < self.weights.size and self.weights.advances(sent, received)

    def admit(self, description: Description, node_id: int, server_round: int = 0) -> None:
        """Admit a site from a round on."""
        site = description.site
        self.nodes[site] = node_id
        self.rows[site] = description.rows
        self._note(site, "ready", rows=description.rows, weights=1.0, joined=server_round, steps=description.steps)

    def refuse(self, site: str, reason: str) -> None:
        """Note that a site takes no part, and why; the log has each reason once."""
        before = next((other for other, known in self.refused.items() if known == reason), None)
        self.refused[site] = reason
        self._note(site, "refused", reason)
        if before is None:
            logger.warning("%s takes no part: %s", site, reason)
        elif before != site:
            logger.warning("%s takes no part, for the same reason as %s.", site, before)

    def lose(self, site: str, reason: str) -> None:
        """Skip a site until it connects again."""
        if self.nodes.pop(site, None) is not None:
            self._note(site, "lost", reason)
            logger.warning("%s is lost, and skipped until it is there again: %s.", site, reason.rstrip("."))

    def tell(self) -> None:
        """Send the observer the states of all sites, if one has changed."""
        if self._changed:
            self._changed = False
            self._observer.on_sites(dict(self._states))

    def exclude(self, dropped: Mapping[str, str]) -> None:
        """Exclude sites whose sums could not be used: the head would not be solved from the rows that they train on."""
        for site in sorted(dropped.keys() & self.nodes.keys()):
            self.excluded[site] = dropped[site]
            self.turned_away.add(self.nodes.pop(site))
            self.refuse(site, dropped[site])
        self.tell()

    def shortage(self, needed: int) -> str:
        """Return a sentence if fewer than `needed` sites take part, else an empty text."""
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
            f"{len(self.nodes)} of {counted(len(self._states), 'site')} can take part{able}, and the run needs "
            f"{needed} or more.{receiving}{reasons}"
        )

    def _install(self, lacking: Mapping[str, int]) -> Exchange:
        """Send the weights to sites that lack them."""
        if self.weights.in_chunks:
            return Installation(self._messenger, self, lacking).run()
        answers, exchange = self._descriptions(lacking, INSTALL, self.weights.chunk(0))
        for site, answer in answers.items():
            if self.judge(answer, lacking[site], 0) == "fit":
                self.admit(answer, lacking[site])
        self.tell()
        return exchange

    def name_of(self, node_id: int, known_as: str = "") -> str:
        """Return the registered name of a node, else `known_as`, else a made-up name."""
        return self._registered(node_id) or known_as or f"node {node_id}"

    def _registered(self, node_id: int) -> str | None:
        return self._messenger.registered_name(node_id)

    def _descriptions(
        self, nodes: Mapping[str, int], action: str, content: RecordDict
    ) -> tuple[dict[str, Description], Exchange]:
        """Ask nodes, and return their descriptions of their sites."""
        descriptions: dict[str, Description] = {}

        def read(reply: Reply) -> None:
            described = Description.several_from_values(reply.payload.values, len(reply.sites))
            for name, description in zip(reply.sites, described, strict=True):
                # By its registered name, as a site may claim another's.
                self._messenger.traffic.rename(name, self.name_of(nodes[name], description.site))
            descriptions.update(zip(reply.sites, described, strict=True))

        exchange, names = Exchange(), list(nodes)
        for start in range(0, len(names), DESCRIBED):
            part = {name: nodes[name] for name in names[start : start + DESCRIBED]}
            exchange.include(self._messenger.ask(part, action, content, read))
        return descriptions, exchange

    def _note(self, site: str, standing: Standing, reason: str = "", **answered: Any) -> None:
        """Note the state of a site, with the values that it answered."""
        values: dict[str, Any] = {**answered, "seen": time.time()} if answered else {}
        state = self._states.get(site, SiteState(standing))
        self._states[site] = replace(state, standing=standing, reason=reason, **values)
        self._changed = self._changed or self._states[site] != state
