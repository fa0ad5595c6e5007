"""Differential privacy: accounting, sensitivities, noise, and heads from noisy sums. Nothing here knows of sites."""
