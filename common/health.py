"""gRPC's health service (`grpc.health.v1`): whether a process serves, for load balancers, systemd and Kubernetes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from fedhead.errors import FedheadError, UserError

ASK_SECONDS = 5.0


class Health:
    """What the health service answers; every service name but the empty one is unknown."""

    def __init__(self) -> None:
        self._servicer = HealthServicer()
        self.serving(False)

    def serving(self, well: bool) -> None:
        """Say whether the process does its work."""
        state = health_pb2.HealthCheckResponse
        self._servicer.set("", state.SERVING if well else state.NOT_SERVING)

    @contextmanager
    def served(self, address: str) -> Iterator[int]:
        """Serve it on `HOST:PORT`; gives the port, which differs where 0 was asked for.

        Raises:
            UserError: if it cannot listen there.
        """
        server = grpc.server(ThreadPoolExecutor(max_workers=2), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port:
            raise UserError(f"The health service cannot listen on {address!r}; expected a free HOST:PORT.")
        server.start()
        try:
            yield port
        finally:
            self._servicer.enter_graceful_shutdown()
            server.stop(0.5).wait()


def ask(address: str) -> str:
    """Return the answer of the health service at `HOST:PORT`: `SERVING` or `NOT_SERVING`.

    Raises:
        FedheadError: if nothing answers there, or something else.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=ASK_SECONDS)
        except grpc.RpcError as error:
            raise FedheadError(
                f"No health service answers at {address} ({error.code().name}). Is the process up, with --health?"
            ) from None
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
