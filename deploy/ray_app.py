"""The application for Ray Serve: gateways, and behind them replicas of one engine.

`python -m deploy` runs deploy/serve.yaml on this machine alone, `serve run deploy.ray_app:build model=20b
replicas=2` on a cluster that is there.
"""

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application

from deploy.gateway import Gateway
from deploy.options import Options
from deploy.replica import Replica
from gptoss_lite.machine import cores


def build(options: Options) -> Application:
    """Make the application; its options come as arguments of Ray's commands, or from the environment."""
    logging = {"enable_access_log": False}  # replicas write the single server's
    replicas = serve.deployment(
        logging_config=logging,
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.threads or 1, "num_gpus": int(options.device == "cuda")},
        max_ongoing_requests=options.most_requests,
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain_seconds,
        request_router_config=RequestRouterConfig(
            request_router_class="deploy.router.ConversationRouter",
            request_router_kwargs={"batch": options.max_sequences},
        ),
    )(Replica)
    gateways = serve.deployment(
        logging_config=logging,
        num_replicas=options.gateways,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=options.most_requests * options.replicas,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain_seconds,
    )(Gateway)
    return gateways.bind(replicas.bind(options, _threads(options)), options)


def _threads(options: Options) -> int | None:
    """Return the CPU threads of a replica; None leaves them to what a GPU needs."""
    if options.threads or options.device == "cuda":
        return options.threads
    there = int(ray.cluster_resources()["CPU"]) if ray.is_initialized() else cores()
    return max(1, there // options.replicas)
