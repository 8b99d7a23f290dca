"""The HTTP server as a Ray Serve deployment, with the routes of `perception-rt serve`."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from perception_rt.errors import BackendError, InputError, describe
from perception_rt.ray.arguments import check_names, keywords
from perception_rt.ray.cluster import ray_library
from perception_rt.records import check_integer, check_value
from perception_rt.runtime.load import load as load_package

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
        **more: further arguments of `ray.serve.deployment`. `autoscaling_config` and
            `num_replicas` replace `replicas`.

    Raises:
        InputError: an argument is unknown or unusable.
        BackendError: Ray Serve or the extra `serve` is not installed.
    """
    for name, value, least in (("replicas", replicas, 1), ("cpus", cpus, 1), ("gpus", gpus, 0)):
        check_integer(name, value, least)
    serve = _serve_library()
    check_names("deployment", more, keywords(serve.deployment))
    check_names("load", options.load, keywords(load_package))
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
    if not settings.keys() & {"autoscaling_config", "num_replicas"}:
        settings["num_replicas"] = replicas
    try:
        return serve.deployment(**settings)(serve.ingress(build)()).bind()
    except (TypeError, ValueError) as error:  # Ray checks the values of its arguments
        raise InputError(f"deployment: {' '.join(str(error).split()):.300}") from None


def build_app(arguments: Mapping[str, Any]) -> Any:
    """An application builder for Serve's configuration files.

    Args:
        arguments: fields of `ServeOptions`, such as `packages`, and arguments of `deployment`.

    Raises:
        InputError: an argument is unknown or unusable.
        BackendError: as for `deployment`.
    """
    serve = _serve_library()
    from perception_rt.serve.options import ServeOptions

    if not isinstance(arguments, Mapping):
        raise InputError(f"arguments must be an object, not {describe(arguments)}")
    known = {field.name: field.type for field in fields(ServeOptions)}
    check_names(
        "build_app", arguments, [*known, *keywords(deployment), *keywords(serve.deployment)]
    )
    given: dict[str, Any] = {"packages": ()}
    for name in arguments.keys() & known.keys():
        value = arguments[name]
        if name not in ("names", "load"):
            value = check_value(name, value, known[name])
        elif not isinstance(value, Mapping):
            raise InputError(f"{name} must be an object, not {describe(value)}")
        given[name] = value
    more = {name: value for name, value in arguments.items() if name not in known}
    return deployment(ServeOptions(**given), **more)


def _serve_library() -> Any:
    """The module `ray.serve`; BackendError if it or the extra `serve` is not installed."""
    ray_library()
    try:
        from ray import serve

        import perception_rt.serve.app  # noqa: F401 - here, not in every replica
    except ImportError as error:
        raise BackendError(
            f'the server needs {error.name}: pip install "perception_rt[ray,serve]"'
        ) from None
    return serve
