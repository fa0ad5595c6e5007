"""Data specs to samples: folders, tables, archives, data sets of other libraries, and user functions.

Labels are loaded at once; images and texts are read one at a time, on demand. `load_samples` takes a spec
`source:argument`; users register their own sources in `sources`.
"""

from fedhead.data.arrays import (
    load_digits,
    samples_from_arrays,
    samples_from_clips,
    samples_from_numbers,
    samples_from_texts,
)
from fedhead.data.folder import load_sites
from fedhead.data.frames import samples_from_frame
from fedhead.data.images import read_image, to_image
from fedhead.data.items import (
    BoolArray,
    Clip,
    Columns,
    FloatArray,
    IntArray,
    Item,
    KeyArray,
    Kind,
    RowError,
    TableRow,
    UnreadableSampleError,
)
from fedhead.data.samples import (
    Samples,
    calibration_half,
    held_out,
    load_samples,
    mix,
    relabel,
    require_kind,
    require_labels,
    sources,
)
from fedhead.data.sounds import read_clip, to_clip
from fedhead.data.texts import read_text

__all__ = [
    "BoolArray",
    "Clip",
    "Columns",
    "FloatArray",
    "IntArray",
    "Item",
    "KeyArray",
    "Kind",
    "RowError",
    "Samples",
    "TableRow",
    "UnreadableSampleError",
    "calibration_half",
    "held_out",
    "load_digits",
    "load_samples",
    "load_sites",
    "mix",
    "read_clip",
    "read_image",
    "read_text",
    "relabel",
    "require_kind",
    "require_labels",
    "samples_from_arrays",
    "samples_from_clips",
    "samples_from_frame",
    "samples_from_numbers",
    "samples_from_texts",
    "sources",
    "to_clip",
    "to_image",
]
