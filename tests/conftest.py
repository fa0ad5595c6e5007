import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: threads that spin while they wait make it many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Where the tests run in the background it may be ignored, and then it would be in every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep features and weights of the tests apart from the user's, and share them among the tests."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDHEAD_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that share so little work mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real weights and photographs, where a developer has them."""
    named = os.environ.get("FEDHEAD_ASSETS")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("needs real weights and photographs: set FEDHEAD_ASSETS to the folder that holds them")
    return folder
