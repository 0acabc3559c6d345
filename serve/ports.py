"""Whether the HTTP port is free, asked before Serve is.

Serve's proxies listen with SO_REUSEPORT: a second one of the same user would take half of the
first one's requests in silence. And ``serve run`` ends with exit code 0 where a proxy fails.
"""

from __future__ import annotations

import socket

from journeyman.errors import ClusterError


def check_port(host: str, port: int) -> None:
    """Raises ClusterError if something listens there already."""
    with _bound(host, port):
        pass


def free_port(host: str) -> int:
    """A port on which nothing listens now; raises ClusterError."""
    with _bound(host, 0) as bound:
        return int(bound.getsockname()[1])


def check_port_of_serve_run() -> None:
    """The same for the address that ``serve run`` will use; does nothing anywhere else.

    A cluster that runs already may have Serve on that port, and rightly; only where the command
    will start Ray itself is a taken port someone else's.
    """
    import click
    from ray.serve.config import HTTPOptions

    context = click.get_current_context(silent=True)
    if context is None or context.params.get("address") or _joins_local_cluster():
        return
    options = HTTPOptions()  # `serve run IMPORT_PATH` takes no others
    try:
        check_port(options.host or "127.0.0.1", options.port)
    except ClusterError as error:
        raise ClusterError(
            f"{error} `serve run` with an import path always takes this port; free it, or set "
            "http_options.port in serve/cascade.yaml and `serve deploy` that."
        ) from error


def _joins_local_cluster() -> bool:
    """Whether ``ray.init()`` would join a cluster that ``ray start`` left on this machine."""
    from ray._private.utils import read_ray_address

    return read_ray_address() is not None


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    # As Serve's own proxy: connections of a server that has just ended do not count.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ClusterError(
            f"{host}:{port}: cannot listen there ({error.strerror}); another program has the "
            "port, or the address is not this machine's."
        ) from error
    return bound
