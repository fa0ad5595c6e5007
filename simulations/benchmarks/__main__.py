"""`python -m fedhead.simulations.benchmarks NAME`: one command per figure."""

from fedhead.simulations.benchmarks import extraction as extraction
from fedhead.simulations.benchmarks import rounds as rounds
from fedhead.simulations.benchmarks.measurement import app

app()
