"""Backbones: frozen feature extractors with their preprocessing, one file per source."""
