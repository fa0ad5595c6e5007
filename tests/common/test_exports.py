import importlib
import subprocess
import sys
import types

import pytest

import fedhead


@pytest.mark.parametrize("name", [name for name in fedhead.__all__ if name != "__version__"])
def test_every_export_is_the_thing_and_not_a_module_of_its_name(name: str) -> None:
    for module in ("simulations", "server.app", "client.app", "cli"):
        importlib.import_module(f"fedhead.{module}")
    assert not isinstance(getattr(fedhead, name), types.ModuleType)


def test_what_does_not_exist_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = fedhead.nothing


@pytest.mark.parametrize(
    "module", ["fedhead", "fedhead.cli", "fedhead.config", "fedhead.protocol.messages", "fedhead.client.app"]
)
def test_light_modules_do_not_bring_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
