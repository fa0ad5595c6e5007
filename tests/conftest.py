import hashlib
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

# Before torch is imported: threads that spin while they wait make it many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Where the tests run in the background it may be ignored, and then it would be in every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite on up to four cores, and named files in this process."""
    option = config.option
    whole = config.args_source is not config.ArgsSource.ARGS and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and getattr(option, "numprocesses", 0) is None and not option.usepdb and not option.collectonly:
        option.numprocesses = min(os.cpu_count() or 1, 4)
        option.dist = "loadfile"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape half surrogate pairs in captured output, since a worker cannot send them."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode("utf-8")) for name, text in report.sections
    ]
    return report


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
def install_weights() -> Callable[[bytes, str], Path]:
    """Install weights as a site does with those that a coordinator sends."""
    from fedhead.backbones.weights import PartialWeights, weights_path

    def install(blob: bytes, weights_digest: str) -> Path:
        partial = PartialWeights(weights_digest, hashlib.sha256(blob).hexdigest(), len(blob), "a test")
        assert partial.add(0, blob)
        return weights_path(weights_digest)

    return install


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real weights and photographs, where a developer has them."""
    named = os.environ.get("FEDHEAD_ASSETS")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("needs real weights and photographs: set FEDHEAD_ASSETS to the folder that holds them")
    return folder
