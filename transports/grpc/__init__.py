"""gRPC: the service `penstock.v1.Penstock` on a port of its own.

What it is: `grpc_transport`, the transport "grpc": without --grpc-port it is nothing, and nothing is imported for it.
What it does not know: what the rest of this folder is made of.
"""

from __future__ import annotations

from penstock.core.contract.transports import Transport
from penstock.transports.gateway import Gateway


def grpc_transport(gateway: Gateway) -> Transport:
    """TransportSpec.factory."""
    if gateway.config.grpc_port is None:
        return Transport()
    from penstock.transports.grpc.listener import GrpcListener

    return Transport(listeners=[GrpcListener(gateway)])
