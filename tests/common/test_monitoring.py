from collections.abc import Iterable

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from fedhead.errors import UserError
from fedhead.monitoring import served_metrics

HOSTILE = 'a"} 1\nforged{x="\\'


class One(Collector):
    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("fedhead_one", "One.", labels=("site",))
        family.add_metric([HOSTILE], 1)
        yield family


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_metrics_are_served_with_escaped_labels(host: str) -> None:
    with served_metrics(f"{host}:0", One()) as port:
        answer = httpx.get(f"http://{host}:{port}/metrics", trust_env=False)
        missing = httpx.get(f"http://{host}:{port}/", trust_env=False)
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    (sample,) = families["fedhead_one"].samples
    assert sample.labels == {"site": HOSTILE}
    assert "forged" not in families
    assert "process_open_fds" in families
    assert missing.status_code == 404
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{host}:{port}/metrics", trust_env=False)


def test_a_foreign_host_name_is_refused_unless_other_machines_may_read() -> None:
    rebound = {"host": "attacker.example"}
    with served_metrics("127.0.0.1:0", One()) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/metrics", headers=rebound, trust_env=False).status_code == 421
    with served_metrics("0.0.0.0:0", One(), anywhere=True) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/metrics", headers=rebound, trust_env=False).status_code == 200


def test_addresses_that_cannot_be_used_are_refused() -> None:
    with served_metrics("127.0.0.1:0", One()) as port:
        for address, words in (
            ("0.0.0.0:0", "--metrics-anywhere"),
            ("9100", "is not HOST:PORT"),
            (f"127.0.0.1:{port}", "cannot be served"),
        ):
            with pytest.raises(UserError, match=words), served_metrics(address, One()):
                pass
