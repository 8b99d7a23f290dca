"""A run's configuration: one tree of frozen records, read from YAML and `--set` overrides.

Every key and type is checked before anything starts, and an error names the offending key. What
can be configured is exactly what stands here; the architecture is `perception_rt.config.PeConfig`.
"""

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from perception_rt.config import PeConfig
from perception_rt.errors import InputError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is trained on.

    Attributes:
        dataset: `digits` is the only one: handwritten digits in synthetic scenes.
        batch_size: samples per step over all ranks; every rank takes an equal share.
        plain_fraction: share of samples rendered as dark ink on a white page, from 0 to 1.
        validation: digits at the end of the training split that are kept for evaluation.
    """

    dataset: Literal["digits"] = "digits"
    batch_size: int = 128
    plain_fraction: float = 0.2
    validation: int = 200

    def __post_init__(self) -> None:
        _require(self.batch_size >= 2, f"data.batch_size must be at least 2, not {self.batch_size}")
        _require(
            0.0 <= self.plain_fraction <= 1.0,
            f"data.plain_fraction must be from 0 to 1, not {self.plain_fraction}",
        )
        _require(
            0 <= self.validation <= 1000,
            f"data.validation must be from 0 to 1000, not {self.validation}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW.

    Attributes:
        lr: peak learning rate.
        text_lr_scale: the text tower's learning rate, relative to `lr`. Below 1, the vision tower
            has time to learn what captions tell apart before the text tower gives it up as noise.
        beta1: decay of the gradient's mean.
        beta2: decay of its square's mean.
        eps: added to the root of the latter.
        weight_decay: acts on matrices only.
        clip: bound of the gradient's global norm.
    """

    lr: float = 1e-3
    text_lr_scale: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "text_lr_scale", "eps", "clip"):
            value = getattr(self, name)
            _require(value > 0, f"optim.{name} must be positive, not {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name} must be at least 0 and below 1, not {value}")
        _require(
            self.weight_decay >= 0,
            f"optim.weight_decay must not be negative, not {self.weight_decay}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine from the peak to `final_fraction` of it at the last step."""

    steps: int = 1000
    warmup: int = 100
    final_fraction: float = 0.01

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"schedule.steps must be at least 1, not {self.steps}")
        _require(
            0 <= self.warmup <= self.steps,
            f"schedule.warmup must be from 0 to schedule.steps {self.steps}, not {self.warmup}",
        )
        _require(
            0 <= self.final_fraction <= 1,
            f"schedule.final_fraction must be from 0 to 1, not {self.final_fraction}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How a run behaves, apart from what it computes.

    Attributes:
        out_dir: where metrics, resolved configuration, state and weights go.
        seed: of the weights, the order of the data, the scenes and stochastic depth.
        threads: torch's threads per process.
        log_every: steps between two progress lines.
        eval_every: steps between two evaluations; 0 for none.
        save_every: steps between two resumable states, besides the last; 0 for none.
        resume: continue from the state in `out_dir`; without one, start anew.
    """

    out_dir: str
    seed: int = 0
    threads: int = 2
    log_every: int = 20
    eval_every: int = 0
    save_every: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        _require(self.out_dir != "", "run.out_dir must not be empty")
        for name in ("seed", "eval_every", "save_every"):
            value = getattr(self, name)
            _require(value >= 0, f"run.{name} must not be negative, not {value}")
        for name in ("threads", "log_every"):
            value = getattr(self, name)
            _require(value >= 1, f"run.{name} must be at least 1, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A whole recipe."""

    model: PeConfig
    run: RunConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self) -> None:
        _require(self.model.text is not None, "contrastive training needs model.text")
        _require(
            self.data.validation > 0 or self.run.eval_every == 0,
            "run.eval_every needs a validation split; data.validation is 0",
        )

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain values, as a recipe file would hold it."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The resolved configuration as a recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_config(recipe: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a recipe and applies `key.path=value` overrides, in order.

    Raises:
        InputError: the file is missing or not YAML, or a key, a type or a value is wrong.
    """
    try:
        tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {recipe}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"recipe {recipe} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise InputError(f"recipe {recipe} is not valid YAML{where}") from None
    if not isinstance(tree, dict):
        raise InputError(f"recipe {recipe} must be a mapping, not {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    config: TrainConfig = _build(TrainConfig, tree, "")
    return config


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All (`a.b.c`, value) of a nested mapping, in order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _override(tree: dict[str, Any], override: str) -> None:
    """Applies one `key.path=value`; the value's type is the declared one."""
    path, equals, text = override.partition("=")
    if not equals:
        raise InputError(f"--set {override!r:.80} must be key.path=value")
    *parents, last = path.split(".")
    declared: Any = TrainConfig
    node = tree
    for depth, name in enumerate([*parents, last]):
        where = ".".join([*parents, last][: depth + 1])
        record = _record_of(declared)
        hints = {} if record is None else get_type_hints(record)
        if name not in hints:
            raise InputError(f"--set {path}: unknown key {where!r:.80}")
        declared = hints[name]
        if depth < len(parents):
            child = node.get(name)
            node[name] = child if isinstance(child, dict) else {}
            node = node[name]
    if _record_of(declared) is not None:
        raise InputError(f"--set {path}: {path} is a section, not a value")
    node[last] = _parse(text, declared, path)


def _record_of(declared: Any) -> type | None:
    """The dataclass that an annotation names, also as `X | None`; None for scalars."""
    options = [o for o in _options(declared) if isinstance(o, type) and is_dataclass(o)]
    return options[0] if options else None


def _options(declared: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if get_origin(declared) in (Union, types.UnionType):
        return get_args(declared)
    return (declared,)


def _parse(text: str, declared: Any, where: str) -> Any:
    """Turns a command line's text into the declared scalar type."""
    options = _options(declared)
    if type(None) in options and text == "null":
        return None
    for option in options:
        if option is str or get_origin(option) is Literal:
            return text
        if option is bool and text in ("true", "false"):
            return text == "true"
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    raise InputError(f"--set {where} must be {_type_names(options)}, not {text!r:.60}")


def _type_names(options: Sequence[Any]) -> str:
    special = {bool: "true or false", type(None): "null"}
    return " or ".join(special.get(option, str(option.__name__)) for option in options)


def _build(cls: type, data: Any, where: str) -> Any:
    """Builds a record from plain values; errors name the full key."""
    if cls is PeConfig:
        return _build_model(data, where)
    if not isinstance(data, Mapping):
        raise InputError(f"{where or 'recipe'} must be a mapping, not {type(data).__name__}")
    prefix = f"{where}." if where else ""
    known = {f.name: f for f in fields(cls)}
    for key in data:
        if key not in known:
            raise InputError(f"unknown key '{prefix}{key}'; known are {', '.join(known)}")
    for name, field in known.items():
        if field.default is MISSING and name not in data:
            raise InputError(f"missing key '{prefix}{name}'")
    hints = get_type_hints(cls)
    values = {n: _value(data[n], hints[n], f"{prefix}{n}") for n in known if n in data}
    return cls(**values)


def _build_model(data: Any, where: str) -> PeConfig:
    """The architecture is checked by its own record; its errors get the section's name."""
    try:
        return PeConfig.from_dict(data)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _value(value: Any, declared: Any, where: str) -> Any:
    """Checks one value against its annotation; an int is accepted where a float is declared."""
    if is_dataclass(declared):
        return _build(declared, value, where)  # type: ignore[arg-type]
    if get_origin(declared) is Literal:
        choices = get_args(declared)
        _require(value in choices, f"{where} must be one of {list(choices)}, not {value!r:.60}")
        return value
    if declared is float and type(value) is int:
        value = float(value)
    _require(
        type(value) is declared,
        f"{where} must be {declared.__name__}, not {type(value).__name__}",
    )
    if declared is float:
        _require(math.isfinite(value), f"{where} must be finite, not {value}")
    return value
