"""How each site stands to the others: domain mismatch, own head against shared head, class coverage.

From feature statistics and small counts alone. With `n_c` a site's rows of class `c` and `m_c` those of all
other sites, `mu_c` and `nu_c` their class means: a site with other classes, or in other shares, has other
*overall* means, but under the null hypothesis that sites differ in labels only, every `mu_c - nu_c` is noise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedhead.errors import UserError
from fedhead.heads import LinearHead
from fedhead.solvers import ABSENT_MARGIN, shrink_correlation, solve_head
from fedhead.statistics import FeatureStatistics
