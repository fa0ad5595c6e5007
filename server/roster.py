"""Which sites take part in a run, under which node of the Grid, and why others do not."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict

from fedhead.backbones import Backbone
from fedhead.errors import FedheadError
from fedhead.messages import DESCRIBE, INSTALL, Description, Manifest, MessageError, Payload, single_bytes
from fedhead.server.exchange import Exchange, Messenger
from fedhead.server.observer import Observer, SiteState, Standing

logger = logging.getLogger(__name__)


class Roster:
    """The sites of a run: they are told of it, given the backbone where they lack it, and known by name from then on.

    Args:
        messenger: reaches the sites.
        manifest: what they are told.
        backbone: what they are to hold.
        probe: its features `[PROBES, d]` of the probe.
        needed: how many sites must take part, at the least.
        observer: is told of the sites.

    Attributes:
        nodes: the node of each site that takes part, by name.
        rows: how many rows each of them said that it has.
        refused: why others take no part.
        excluded: those of them whose sums could not be used; they take no part in the rest of the run.
    """

    def __init__(
        self,
        messenger: Messenger,
        manifest: Manifest,
        backbone: Backbone,
        probe: torch.Tensor,
        needed: int,
        observer: Observer,
    ) -> None:
        self.nodes: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.excluded: dict[str, str] = {}
        self._messenger = messenger
        self._manifest = manifest
        self._backbone = backbone
        self._probe = probe
        self._needed = needed
        self._observer = observer
        self._states: dict[str, SiteState] = {}

    def gather(self, exchange: Exchange) -> None:
        """Describe the run to every site, install the backbone where it is missing, and know who takes part.

        Raises:
            FedheadError: if too few do.
        """
        self._observer.on_step("describe", 0)
        nodes = {str(node): node for node in self._messenger.grid.get_node_ids()}
        described = self._manifest.model_dump(mode="json")
        content = Payload(described, {"probe": self._probe.numpy()}).to_content()
        lacking: dict[str, int] = {}
        descriptions = self._descriptions(nodes, DESCRIBE, content, exchange)
        claimed = Counter(description.site for description in descriptions.values())
        for key, description in sorted(descriptions.items()):
            if claimed[description.site] > 1:
                self.refused[f"node {key}"] = (
                    f"{claimed[description.site]} sites call themselves {description.site!r}; give each its own name."
                )
                continue
            if not self._accept(description, nodes[key]):
                lacking[description.site] = nodes[key]
        if lacking:
            self._observer.on_step("install", 0)
            self._observer.on_sites(dict(self._states))
            blob = np.frombuffer(self._backbone.to_bytes(), dtype=np.uint8)
            content = Payload({}, {"weights": blob}).to_content()
            for site, description in self._descriptions(lacking, INSTALL, content, exchange).items():
                if description.site != site or not self._accept(description, lacking[site]):
                    self.refused[site] = "The weights were sent, but it still has none."
        self.refused.update(exchange.dropped)
        for site, reason in sorted(self.refused.items()):
            logger.warning("%s takes no part: %s", site, reason)
            self._note(site, "refused", reason=reason)
        self._observer.on_sites(dict(self._states))
        self._require()

    def exclude(self, dropped: Mapping[str, str]) -> None:
        """Go on without sites whose sums could not be used: the head would be of other rows than those trained on.

        Raises:
            FedheadError: if too few are left.
        """
        for site in dropped.keys() & self.nodes.keys():
            self.refused[site] = self.excluded[site] = dropped[site]
            del self.nodes[site]
            self._note(site, "refused", reason=dropped[site])
        if dropped:
            self._observer.on_sites(dict(self._states))
        self._require()

    def _require(self) -> None:
        if len(self.nodes) < self._needed:
            reasons = "".join(f" {site}: {reason}" for site, reason in sorted(self.refused.items())[:3])
            known = len(self.nodes) + len(self.refused)
            raise FedheadError(
                f"{len(self.nodes)} of {known} sites can take part, and the run needs {self._needed} or more.{reasons}"
            )

    def _descriptions(
        self, nodes: Mapping[str, int], action: str, content: RecordDict, exchange: Exchange
    ) -> dict[str, Description]:
        descriptions: dict[str, Description] = {}
        for names, answer in self._messenger.ask_together(nodes, action, content, exchange):
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

    def _accept(self, description: Description, node_id: int) -> bool:
        """Note what a site said of itself; return False if it still lacks the backbone."""
        site = description.site
        refusal = description.refusal or self.excluded.get(site)
        if refusal:
            self.refused[site] = refusal
            return True
        if not description.has_weights:
            self._note(site, "lacking", rows=description.rows)
            return False
        self.nodes[site] = node_id
        self.rows[site] = description.rows
        self._note(site, "ready", rows=description.rows, weights=1.0)
        return True

    def _note(self, site: str, standing: Standing, reason: str = "", **answered: float) -> None:
        """Note how a site stands, and what it answered if it did."""
        values: dict[str, Any] = {**answered, "seen": time.time()} if answered else {}
        state = self._states.get(site, SiteState(standing))
        self._states[site] = replace(state, standing=standing, reason=reason, **values)
