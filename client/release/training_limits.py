"""Bounds on how a coordinator may have heads trained: extreme settings make single rows stand out in a head."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from fedhead.config import LocalConfig
from fedhead.errors import FedheadError
from fedhead.protocol.messages import MessageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_LR = 10.0
MAX_EPOCHS = 1000
MAX_PENALTY = 1000.0
MAX_FEATURE = 1000.0
MAX_SHARE = 1.0
MAX_TRAINABLE = 20_000_000


@dataclass(frozen=True)
class TrainingLimits:
    """A site's own bounds on the settings of local training.

    Attributes:
        min_batch: least rows of a minibatch.
        max_lr: largest learning rate.
        max_epochs: most passes over the rows in one round.
        max_penalty: largest weight decay, and largest weight of the proximal term.
        max_feature: largest root mean square of standardised features, which scale steps as the learning rate does.
        max_share: largest share of one row in the absolute residuals behind a full gradient, for any output.
        max_trainable: most parameters of a backbone that are trained and sent; 0 for the head alone.
        refuse_small: whether to refuse a run with smaller minibatches; else only the short last ones are avoided.
    """

    min_batch: int = 1
    max_lr: float = MAX_LR
    max_epochs: float = MAX_EPOCHS
    max_penalty: float = MAX_PENALTY
    max_feature: float = MAX_FEATURE
    max_share: float = MAX_SHARE
    refuse_small: bool = True
    max_trainable: float = MAX_TRAINABLE

    @classmethod
    def off(cls, min_batch: int = 1) -> Self:
        """Return limits that allow everything, and train on the minibatches of a site with this `min_batch`."""
        return cls(
            min_batch, math.inf, math.inf, math.inf, math.inf, math.inf, refuse_small=False, max_trainable=math.inf
        )

    def check(self, local: LocalConfig) -> None:
        """Return if a site may train so.

        Raises:
            MessageError: naming the setting that is out of bounds, and the bound.
        """
        if self.refuse_small and local.batch_size < self.min_batch:
            raise MessageError(
                f"This site trains on minibatches of {self.min_batch} rows or more, not {local.batch_size}: set "
                "local.batch_size."
            )
        for name, most, limit in (
            ("lr", self.max_lr, "max_lr"),
            ("epochs", self.max_epochs, "max_epochs"),
            ("weight_decay", self.max_penalty, "max_penalty"),
            ("proximal_mu", self.max_penalty, "max_penalty"),
        ):
            if (value := getattr(local, name)) > most:
                raise MessageError(
                    f"This site trains with a {name} of at most {most:g}, not {value:g}: set local.{name}, or at the "
                    f"site {limit} under [limits] in site.toml."
                )

    def check_tail(self, layers: str, parameters: int) -> None:
        """Return if a site may train and send so many parameters of a backbone: more of them reveal more of its rows.

        Raises:
            MessageError: naming the limit.
        """
        if parameters > self.max_trainable:
            raise MessageError(
                f"This site trains and sends at most {self.max_trainable:,.0f} parameters of a backbone, and tuning "
                f"{layers!r} needs {parameters:,}: tune fewer layers or adapters such as 'lora:8', or at the site "
                "raise max_trainable under [limits] in site.toml."
            )

    def check_share(self, largest: float) -> None:
        """Return if a full gradient may leave: it is a sum of rows' features weighted by their residuals.

        This is the dominance rule of official statistics: a sum is withheld if one contributor makes up most of it. By
        default it allows everything: an accurate head's gradient rests on few rows at a small site, also in honest
        runs, and one epoch of training in one batch shows the same.

        Args:
            largest: the largest share of one row in the absolute residuals of an output.

        Raises:
            FedheadError: if it is too large.
        """
        if largest > self.max_share:
            raise FedheadError(
                f"This site sends no gradient in which one row makes up more than {self.max_share:g} of an output's "
                "residuals (max_share under [limits] in site.toml)."
            )

    def check_scale(self, blocks: Iterable["Tensor"], mean: "Tensor", scale: "Tensor") -> None:
        """Return if a site's features may be standardised so.

        Args:
            blocks: `[k, d]` each, the features of the site's training rows.
            mean: `[d]`.
            scale: `[d]`.

        Raises:
            FedheadError: if they become too large.
        """
        if math.isinf(self.max_feature):
            return
        total, rows = 0.0, 0
        for block in blocks:
            total += float(((block.double() - mean) / scale).square().mean(1).sum())
            rows += len(block)
        size = math.sqrt(total / max(rows, 1))
        if not size <= self.max_feature:
            raise FedheadError(
                "This site's features would be too large after standardisation: their root mean square must be at most "
                f"{self.max_feature:g} (max_feature under [limits] in site.toml)."
            )
