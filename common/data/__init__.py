"""Data specs to samples: folders, tables, archives, data sets of other libraries, a function of yours.

Labels are known at once; images and texts are read one at a time, when asked for. `load_samples` takes a spec
`source:argument`; `sources` is where users register their own.
"""

from fedhead.data.arrays import load_digits, samples_from_arrays, samples_from_texts
from fedhead.data.folder import load_sites
from fedhead.data.images import read_image, to_image
from fedhead.data.samples import (
    BoolArray,
    IntArray,
    Item,
    KeyArray,
    Kind,
    Samples,
    UnreadableSampleError,
    held_out,
    load_samples,
    mix,
    relabel,
    require_kind,
    require_labels,
    sources,
)
from fedhead.data.texts import read_text

__all__ = [
    "BoolArray",
    "IntArray",
    "Item",
    "KeyArray",
    "Kind",
    "Samples",
    "UnreadableSampleError",
    "held_out",
    "load_digits",
    "load_samples",
    "load_sites",
    "mix",
    "read_image",
    "read_text",
    "relabel",
    "require_kind",
    "require_labels",
    "samples_from_arrays",
    "samples_from_texts",
    "sources",
    "to_image",
]
