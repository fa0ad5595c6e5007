"""The figures in the README, each with one command: `python -m fedhead.simulations.benchmarks NAME [--json]`.

A benchmark pairs everything that it compares in one process, takes the least of repeated timings, checks that what it
compares computes the same, and leaves out, saying so, a peer that is not installed.
"""
