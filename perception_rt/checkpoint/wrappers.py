"""Finds a model's tensors among what training code saves around them.

A training checkpoint is a dictionary with the weights somewhere inside it, often with an averaged
copy of them (EMA) beside optimizer states. Wrappers such as `torch.compile`, data parallelism and
Lightning put prefixes before the keys.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from perception_rt.errors import CheckpointError

StateDict = Mapping[str, Tensor]

# Parts of keys that wrapper modules add: data parallelism, torch.compile, FSDP, Fabric.
_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
# Entries that hold the model's weights rather than those of something else.
_MODELS = frozenset(
    {"state_dict", "model_state_dict", "model_state", "model", "module", "net", "weights"}
)
_AVERAGED = frozenset({"ema", "shadow", "swa", "averaged"})
# Words in the names of entries that hold no model.
_OTHERS = frozenset(
    {"optimizer", "optimizers", "optim", "scheduler", "schedulers", "scaler", "hyper", "hparams"}
)
_CALLBACKS = "callbacks"
# Counters that averaging code keeps among the weights.
_COUNT = "n_averaged"
_COUNTERS = frozenset({_COUNT, "num_updates", "updates", "decay", "initted", "step"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_MAX_DEPTH = 4  # nested dictionaries, and parts of a prefix
_LISTED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTensors:
    """The weights in a loaded file.

    Attributes:
        tensors: the state dictionary.
        averaged: whether it is an averaged copy that was asked for or is the only one.
        left_out: names of the averaged copies that were not taken.
    """

    tensors: StateDict
    averaged: bool = False
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainNames:
    """The keys of a model, without prefixes; see `FoundTensors` for the other attributes.

    Attributes:
        keys: keys of the file by plain name.
    """

    keys: Mapping[str, str]
    averaged: bool = False
    left_out: tuple[str, ...] = ()


def find_tensors(content: object, file: str, *, ema: bool) -> FoundTensors:
    """Finds the state dictionary in what `torch.load` returned.

    Args:
        content: a state dictionary, or dictionaries around one.
        file: name of the file, for messages.
        ema: take the averaged copy if there is one.

    Raises:
        CheckpointError: there is no dictionary of tensors, or there are several models.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a dictionary of tensors")
    found = dict(_state_dicts(content, ()))
    averaged = {path: tensors for path, tensors in found.items() if _is_averaged(path)}
    models = {p: t for p, t in found.items() if p not in averaged and _CALLBACKS not in p}
    nameless = _nameless(content)
    if ema and nameless and not averaged:
        raise CheckpointError(
            f"{file}: the EMA weights {listed(nameless)} are a list without names: copy them into "
            "the model, as with the averaging library's copy_to(), and save its state_dict()"
        )
    taken = (averaged or models) if ema else (models or averaged)
    if not taken:
        taken = {(): content}
    elif len(taken) > 1:
        # A loss or a discriminator may have weights of its own.
        known = {path: tensors for path, tensors in taken.items() if path and path[-1] in _MODELS}
        if len(known) != 1:
            names = listed([".".join(path) for path in taken])
            raise CheckpointError(
                f"{file} holds {len(taken)} sets of weights, {names}: save the one to export as a "
                "file of its own"
            )
        taken = known
    ((path, tensors),) = taken.items()
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{file} must hold a dictionary of tensors; {key!a:.80} is not a tensor"
            )
    left_out = () if path in averaged else (*(".".join(path) for path in averaged), *nameless)
    return FoundTensors(tensors=tensors, averaged=path in averaged, left_out=left_out)


def _nameless(content: Mapping[object, object]) -> list[str]:
    """Entries with an averaged copy that is a list, as that of torch_ema."""
    return [
        f"{key}.{inner}"
        for key, value in content.items()
        if isinstance(key, str) and _is_averaged([key]) and isinstance(value, dict)
        for inner, copy in value.items()
        if isinstance(copy, list) and copy and all(isinstance(item, Tensor) for item in copy)
    ]


def listed(names: Sequence[str]) -> str:
    """The first few names, without control characters, for a message."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:_LISTED]]
    return ", ".join(f"{name:.60}" for name in shown) + (", ..." if len(names) > _LISTED else "")


def _state_dicts(
    content: Mapping[object, object], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Tensor]]]:
    """State dictionaries within a dictionary, and the entries that lead to them."""
    named = {k: v for k, v in content.items() if isinstance(k, str)}
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    # Metrics of callbacks are numbers, and moments of optimizers have no names with dots.
    if any("." in key and value.ndim for key, value in tensors.items()):
        yield path, content  # type: ignore[misc]  # every value is checked once it is taken
        return
    if len(path) == _MAX_DEPTH:
        return
    for key, value in named.items():
        if isinstance(value, dict) and _OTHERS.isdisjoint(_words(key)):
            yield from _state_dicts(value, (*path, key))


def _words(name: str) -> set[str]:
    """Lower-case words of a name: `EMACallback` and `ema_callback` are `ema` and `callback`."""
    return {word.lower() for word in _WORD.findall(name)}


def _is_averaged(path: Collection[str]) -> bool:
    return any(not _AVERAGED.isdisjoint(_words(part)) for part in path)


def without_wrappers(keys: Collection[str]) -> dict[str, str]:
    """Maps each key, without the parts that wrapper modules add, to the key itself.

    Raises:
        CheckpointError: two keys differ only by such parts.
    """
    mapping: dict[str, str] = {}
    for key in keys:
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in mapping:
            raise CheckpointError(
                f"two tensors, {mapping[name]!a:.80} and {key!a:.80}, differ only by the prefix of "
                "a wrapper"
            )
        mapping[name] = key
    return mapping


def plain_names(keys: Collection[str], starts: tuple[str, ...], *, ema: bool) -> PlainNames:
    """Finds a model among the keys of a state dictionary, and takes its prefix away.

    All keys that are not of another, averaged or not averaged, copy belong to the model.

    Args:
        keys: the keys.
        starts: how keys of a model start without a prefix.
        ema: take the averaged copy.

    Raises:
        CheckpointError: there are several models, or no averaged one with `ema`.
    """
    names = without_wrappers(keys)
    counted = _COUNT in names  # the whole dictionary is that of an averaged model
    names = {n: key for n, key in names.items() if n.rpartition(".")[2] not in _COUNTERS}
    prefixes = {prefix for name in names if (prefix := _prefix(name, starts)) is not None}
    of_copies = {p for p in prefixes if _is_averaged(p.split("."))}
    averaged, models = _outer(of_copies), _outer(prefixes - of_copies)
    joined = _joined(names, averaged)
    if ema and not averaged and not joined and not counted:
        raise CheckpointError("it has no EMA weights; leave --ema away")
    take_averaged = bool(averaged) and (ema or not models)
    taken, others = (averaged, models) if take_averaged else (models, averaged)
    if not taken:
        return PlainNames(keys=names)
    if len(taken) > 1:
        raise CheckpointError(
            f"its keys hold {len(taken)} models, {listed(taken)}: save the one to "
            "export as a file of its own"
        )
    prefix = taken[0]
    kept = _kept(names, prefix, others)
    if ema and joined and not averaged:
        dotted = {name.replace(".", ""): name for name in kept}
        kept = {dotted.get(name, name): key for name, key in joined.items()}
        take_averaged = True
    left_out = () if take_averaged else tuple(p.rstrip(".") for p in averaged)
    if joined and not take_averaged:
        left_out += (next(iter(joined.values())).partition(".")[0],)
    return PlainNames(keys=kept, averaged=take_averaged or counted, left_out=left_out)


def _joined(names: Mapping[str, str], averaged: Collection[str]) -> dict[str, str]:
    """Keys of an averaged copy by name, if its names have lost their dots, as in LitEma."""
    return {
        rest: key
        for name, key in names.items()
        if "." not in (rest := name.partition(".")[2])
        and _is_averaged([name.partition(".")[0]])
        and not name.startswith(tuple(averaged))
    }


def _kept(names: Mapping[str, str], prefix: str, others: Collection[str]) -> dict[str, str]:
    """The names of one copy without its prefix, and those that belong to no copy."""
    kept: dict[str, str] = {}
    for name, key in names.items():
        owner = max((p for p in (prefix, *others) if name.startswith(p)), key=len, default=None)
        left_out = not _is_averaged([prefix]) and _is_averaged([name.partition(".")[0]])
        if left_out or owner not in (prefix, None):
            continue
        plain = name.removeprefix(prefix)
        if plain in kept:
            raise CheckpointError(
                f"two tensors, {kept[plain]!a:.80} and {key!a:.80}, differ only by a prefix"
            )
        kept[plain] = key
    return kept


def _prefix(name: str, starts: tuple[str, ...]) -> str | None:
    """The shortest prefix whose removal gives a name of the model; None if there is none."""
    rest = name
    for _ in range(_MAX_DEPTH + 1):
        if rest.startswith(starts):
            return name.removesuffix(rest)
        _, dot, rest = rest.partition(".")
        if not dot:
            break
    return None


def _outer(prefixes: Collection[str]) -> list[str]:
    """The prefixes that do not begin with another one, in order."""
    return sorted(
        p for p in prefixes if not any(p != other and p.startswith(other) for other in prefixes)
    )
