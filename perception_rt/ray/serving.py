"""The HTTP server as a Ray Serve deployment, with the routes of `perception-rt serve`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from perception_rt.errors import BackendError, InputError
from perception_rt.ray.cluster import ray_library

if TYPE_CHECKING:
    from perception_rt.serve.options import ServeOptions


def deployment(
    options: "ServeOptions", *, replicas: int = 1, cpus: int = 1, gpus: int = 0, **more: Any
) -> Any:
    """An application for `ray.serve.run`; each replica loads every package.

    Requests meet the bounds, keys and batchers of the replica that Ray chooses. Ray listens, so
    `host`, `port` and `workers` of the options do not count, and `/metrics` is that of one replica.

    Args:
        options: what to serve. `threads` in `options.load` is `cpus` by default.
        replicas: how many copies.
        cpus: CPUs per replica.
        gpus: GPUs per replica.
        **more: further arguments of `ray.serve.deployment`, such as `autoscaling_config`, which
            replaces `replicas`.

    Raises:
        BackendError: Ray Serve or the extra `serve` is not installed.
    """
    ray_library()
    try:
        from ray import serve

        import perception_rt.serve.app  # noqa: F401 - here, not in every replica
    except ImportError as error:
        raise BackendError(
            f'the server needs {error.name}: pip install "perception_rt[ray,serve]"'
        ) from None
    load = dict(options.load)
    load["threads"] = load.get("threads") or cpus
    text = replace(options, load=load).to_json()

    def build() -> Any:
        from perception_rt.serve.app import make_app
        from perception_rt.serve.options import ServeOptions
        from perception_rt.serve.service import Service

        return make_app(Service(ServeOptions.from_json(text)))

    settings: dict[str, Any] = {
        "name": "perception_rt",
        "max_ongoing_requests": options.max_requests,
        "graceful_shutdown_timeout_s": options.drain_s,
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        **more,
    }
    if "autoscaling_config" not in settings:
        settings["num_replicas"] = replicas
    return serve.deployment(**settings)(serve.ingress(build)()).bind()


def build_app(arguments: Mapping[str, Any]) -> Any:
    """An application builder for Serve's configuration files.

    Args:
        arguments: fields of `ServeOptions`, such as `packages`, and arguments of `deployment`.

    Raises:
        InputError: an argument is unknown or unusable.
        BackendError: as for `deployment`.
    """
    ray_library()
    from perception_rt.serve.options import ServeOptions

    fields = ServeOptions.__dataclass_fields__
    given = {name: value for name, value in arguments.items() if name in fields}
    for name in ("packages", "media_hosts"):
        if isinstance(given.get(name), str):
            raise InputError(f"{name} must be a list, not {given[name]!r:.80}")
        given[name] = tuple(given.get(name, ()))
    more = {name: value for name, value in arguments.items() if name not in fields}
    return deployment(ServeOptions(**given), **more)
