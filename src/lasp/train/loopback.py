"""Where all processes are on one machine, they need not be reached from another."""

import socket
from collections.abc import MutableMapping


def stay_on_loopback(environment: MutableMapping[str, str]) -> None:
    """Have gloo listen on the loopback interface alone, unless `environment` names an interface already."""
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())
