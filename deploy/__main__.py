"""`python -m deploy`: Ray Serve's own `serve run`, on a Ray that is this machine alone.

Nothing listens but on 127.0.0.1, and nothing is reported to Ray's makers, unless the environment says so.
SIGTERM or Ctrl-C let answers under way come to their end; a second one ends at once.
"""

import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.local import OBJECT_STORE, prepare

CONFIG = Path(__file__).with_name("serve.yaml")


def main() -> None:
    """Run what is given as `serve run` has it, deploy/serve.yaml by default."""
    prepare()
    import ray
    from ray.serve.scripts import cli

    ray.init(namespace="serve", include_dashboard=False, object_store_memory=OBJECT_STORE)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    cli(["run", *(sys.argv[1:] or [str(CONFIG)])])


def _stop(*_: Any) -> None:
    """Drain all replicas: what comes next, in `serve run`, begins with the proxy that clients talk to."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    with suppress(RayError, RayServeException):  # where there is none yet, there is nothing to wait for
        for name in serve.status().applications:
            serve.get_deployment_handle("Replica", name).broadcast("drain").results()
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
