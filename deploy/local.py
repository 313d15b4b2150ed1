"""Keeping Ray to this machine: what it would open to others, it opens on 127.0.0.1."""

import os

ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: whether other machines may join, and so call
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",  # each line of an access log counts
    "RAY_prestart_worker_first_driver": "0",  # else a process a core waits for work that never comes
    "RAY_worker_niceness": "0",  # what runs here is the service itself, not work for when there is time
}
OBJECT_STORE = 100_000_000  # bytes; requests of more than 100 kB pass through it


def prepare() -> None:
    """Set what Ray reads when it is imported, where the environment does not say otherwise."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def stay_local() -> None:
    """Where this node has no other address than 127.0.0.1, let this replica listen on no other.

    Each replica of Ray Serve opens a port for calls by gRPC on all addresses, whatever was set. (Who calls it
    needs the cluster's token, as everywhere in Ray.)
    """
    from ray.serve._private import replica
    from ray.util import get_node_ip_address

    if get_node_ip_address() == "127.0.0.1":
        everywhere = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, _: everywhere(server, "127.0.0.1:0")
