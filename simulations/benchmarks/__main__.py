"""`python -m fedhead.simulations.benchmarks NAME`: one command per figure."""

from fedhead.simulations.benchmarks import baselines as baselines
from fedhead.simulations.benchmarks import cluster as cluster
from fedhead.simulations.benchmarks import crowd as crowd
from fedhead.simulations.benchmarks import extraction as extraction
from fedhead.simulations.benchmarks import faults as faults
from fedhead.simulations.benchmarks import heads as heads
from fedhead.simulations.benchmarks import memory as memory
from fedhead.simulations.benchmarks import network as network
from fedhead.simulations.benchmarks import privacy as privacy
from fedhead.simulations.benchmarks import rounds as rounds
from fedhead.simulations.benchmarks import scaling as scaling
from fedhead.simulations.benchmarks import secure as secure
from fedhead.simulations.benchmarks import time_to_accuracy as time_to_accuracy
from fedhead.simulations.benchmarks import traffic as traffic
from fedhead.simulations.benchmarks import tuning as tuning
from fedhead.simulations.benchmarks import tuning_accuracy as tuning_accuracy
from fedhead.simulations.benchmarks.measurement import app

if __name__ == "__main__":
    app()
