"""Sums: the one kind of thing that leaves a site."""
