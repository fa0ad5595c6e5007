"""Actions: all requests that a coordinator may send to a site, each declared once."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """A request that a coordinator may send to a site.

    Attributes:
        name: the type of its Flower message.
        asks: its description in `site.toml`.
        tells: the description of its reply in the report.
        permitted: whether a site answers it by default; `site.toml` may override this.
        sums: whether its reply is sums over rows, or a head trained on them.
    """

    name: str
    asks: str
    tells: str
    permitted: bool = True
    sums: bool = False


DESCRIBE = "query.describe"
INSTALL = "query.install"
MAP = "query.map"
STATISTICS = "query.statistics"
STANDARDISE = "query.standardise"
COMPARE = "query.compare"
RIVALS = "evaluate.rivals"
PERSONALISE = "query.personalise"
ADAPT = "evaluate.adaptations"
DISTANCES = "query.distances"
CLUSTER = "query.clusters"
PRIVATE = "query.private"
TRAIN = "train"
GRADIENT = "train.gradient"
EVALUATE = "evaluate"
OPEN = "query.open"
AGREE = "query.agree"
UNMASK = "query.unmask"
REPORT = "evaluate.report"
CALIBRATE = "evaluate.calibrate"
SUBGROUPS = "evaluate.subgroups"

ACTIONS: Mapping[str, Action] = {
    action.name: action
    for action in (
        Action(
            DESCRIBE,
            "check whether this site can take part, and return its number of rows",
            "the site's name, its number of rows, and whether it has the backbone",
        ),
        Action(
            INSTALL,
            "receive the backbone's weights",
            "confirmation that the site received the backbone",
        ),
        Action(
            MAP,
            "receive a map of its features: to rows of unit length, or to a larger number of features",
            "confirmation that the site stored the map of features",
        ),
        Action(
            STATISTICS,
            "send sums over its rows: counts, sums of features per class or target, and the Gram matrix of features",
            "sums over its rows: counts of rows, sums of features per class or target, and the Gram matrix of features",
            sums=True,
        ),
        Action(
            STANDARDISE,
            "receive the pooled mean and scale",
            "confirmation that the site stored the mean and scale",
        ),
        Action(
            PRIVATE,
            "send sums over its rows with noise, in differentially private runs",
            "sums over its rows with calibrated noise: counts, features, or a head's held-out results",
            sums=True,
        ),
        Action(
            TRAIN,
            "train a head and send it",
            "a head trained on its rows, the training loss, and the received head's held-out results",
            sums=True,
        ),
        Action(
            GRADIENT,
            "sum the gradient of a head's loss over its rows",
            "the gradient of a head's loss over its rows, the loss, and the head's held-out results",
            sums=True,
        ),
        Action(
            EVALUATE,
            "evaluate a head on held-out rows",
            "a head's results on held-out rows: the number of rows, the summed score and the summed loss",
            sums=True,
        ),
        Action(
            REPORT,
            "evaluate a head on held-out rows in detail, for the report",
            "detailed results on held-out rows: counts of predictions by true value or class, in bins",
            sums=True,
        ),
        Action(
            CALIBRATE,
            "measure a head's calibration on held-out rows",
            "calibration sums on held-out rows: losses by temperature, predictions by probability, or errors by size",
            sums=True,
        ),
        Action(
            SUBGROUPS,
            "evaluate a head on held-out rows by subgroup, if the site's data names their column (group_by)",
            "detailed results on held-out rows by subgroup, such as sex: counts of predictions by true class, in bins",
            sums=True,
        ),
        Action(
            COMPARE,
            "compare three heads on held-out rows, for the diagnosis",
            "the number of held-out rows that each combination of three heads predicts correctly, or for targets and "
            "labels their squared errors, summed and multiplied in pairs",
            sums=True,
        ),
        Action(
            RIVALS,
            "compare several heads on held-out rows, to choose one",
            "losses of several heads on held-out rows, summed and multiplied in pairs, and correct predictions",
            sums=True,
        ),
        Action(
            PERSONALISE,
            "make a head for this site alone, keep it here, and compare it with the shared head",
            "the number of held-out rows that each combination of personal, shared and own head predicts correctly",
            sums=True,
        ),
        Action(
            ADAPT,
            "adapt heads of the other sites' rows to this site's rows without their labels, and compare them",
            "losses on held-out rows of heads adapted to this site's rows without their labels, summed and multiplied "
            "in pairs, and correct predictions",
            sums=True,
        ),
        Action(
            DISTANCES,
            "send sums over rows of unit length, and measure how far held-out rows are from those of all sites",
            "sums over training rows of unit length, or counts of held-out rows by distance from those of all sites",
            sums=True,
        ),
        Action(
            CLUSTER,
            "assign rows to clusters by centres, and send sums by cluster",
            "rows and sums of features by cluster, or how likely mixtures of clusters make held-out rows, summed",
            sums=True,
        ),
        Action(
            OPEN,
            "take part in a secure sum: make keys, and share the secrets behind its masks, sealed for one site each",
            "keys for a secure sum, and sealed shares of the secrets behind its masks",
        ),
        Action(
            AGREE,
            "sign which sites' masked replies are in a secure sum",
            "a signature of the sites in a secure sum",
        ),
        Action(
            UNMASK,
            "return the shares that remove the masks from the total of a secure sum, after enough sites signed it",
            "shares that remove the masks from the total of a secure sum",
        ),
    )
}
"""All actions by name, in the order of a run."""
