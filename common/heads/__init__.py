"""Heads: the trainable part of a model, on top of frozen features."""

from fedhead.heads.feature_map import FeatureMap, MapForm, MappedHead, behind, delivered_spec, make_delivered, unmapped
from fedhead.heads.head import CosineHead, Head, LinearHead, MLPHead, Solutions, heads, make_head
from fedhead.heads.passing import NoHead
from fedhead.heads.tail import ObjectiveHead, TunedHead
from fedhead.heads.unit import UnitHead

__all__ = [
    "CosineHead",
    "FeatureMap",
    "Head",
    "LinearHead",
    "MLPHead",
    "MapForm",
    "MappedHead",
    "NoHead",
    "ObjectiveHead",
    "Solutions",
    "TunedHead",
    "UnitHead",
    "behind",
    "delivered_spec",
    "heads",
    "make_delivered",
    "make_head",
    "unmapped",
]
