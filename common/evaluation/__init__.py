"""Metrics with intervals, and comparison of each site with the pool."""
