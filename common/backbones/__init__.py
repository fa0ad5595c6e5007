"""Backbones: frozen feature extractors with their preprocessing, one file per source.

Your own source is a function of `(name, weights, layer, seed)` that returns a `Backbone`:

    from fedhead.backbones import Backbone, backbone_sources

    @backbone_sources.register("ours")
    def load(name, weights, layer, seed): ...
"""

from fedhead.backbones.backbone import Backbone as Backbone
from fedhead.backbones.backbone import backbone_sources as backbone_sources
from fedhead.backbones.backbone import load_backbone as load_backbone
from fedhead.backbones.preprocessing import ImagePreprocessing as ImagePreprocessing
from fedhead.backbones.preprocessing import Preprocessing as Preprocessing
from fedhead.backbones.preprocessing import TextPreprocessing as TextPreprocessing
