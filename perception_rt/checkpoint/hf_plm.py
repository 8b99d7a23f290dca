"""Reads the architecture of a PerceptionLM of transformers from its `config.json`.

Fields that older releases name otherwise are read under both names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from perception_rt.checkpoint.hf_config import HubConfig
from perception_rt.checkpoint.json_files import Section
from perception_rt.checkpoint.timm_encoder import timm_tower
from perception_rt.config import VisionConfig
from perception_rt.errors import InputError
from perception_rt.plm_config import DecoderConfig, PlmConfig

# Our names, and those of `text_config` with their types.
_TEXT: Mapping[str, tuple[str, Any]] = {
    "dim": ("hidden_size", int),
    "n_layers": ("num_hidden_layers", int),
    "n_heads": ("num_attention_heads", int),
    "vocab_size": ("vocab_size", int),
    "ffn_dim": ("intermediate_size", int),
    "norm_eps": ("rms_norm_eps", float),
    "max_seqlen": ("max_position_embeddings", int),
}
_TEXT_FIXED: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
_TOP: Mapping[str, tuple[str, Any]] = {
    "pooling_ratio": ("projector_pooling_ratio", int),
    "image_token_id": ("image_token_id", int),
}
# llama3 scaling: our names and those of `rope_parameters`.
_SCALING: Mapping[str, tuple[str, Any]] = {
    "rope_scale_factor": ("factor", float),
    "low_freq_factor": ("low_freq_factor", float),
    "high_freq_factor": ("high_freq_factor", float),
    "old_context_len": ("original_max_position_embeddings", int),
}
_VISION = "vision_model"
# Fields of a tower that decide what it computes; layer scale is compared by its presence.
_TOWER_FIELDS = (
    "patch_size",
    "width",
    "layers",
    "heads",
    "mlp_dim",
    "image_size",
    "use_abs_posemb",
    "use_cls_token",
    "use_rope2d",
    "use_ln_pre",
    "use_ln_post",
    "timm_grid",
)


@dataclass(frozen=True, slots=True)
class Fact:
    """A value in a file, with its dotted name there."""

    value: Any
    name: str


class PlmFacts:
    """The architecture in a `config.json`, which may lack fields that another file has.

    Attributes:
        file: name of the file.
        found: its values by our names: fields of `DecoderConfig`, `n_kv_heads` never None and
            `ffn_dim` instead of its two factors; `pooling_ratio`, `image_token_id`, `vision_model`.
        missing: dotted names in the file of the fields that it lacks, by our names.

    Args:
        hub: a `config.json` of a PerceptionLM.

    Raises:
        InputError: a field is mistyped, or has a value that this library does not support.
    """

    def __init__(self, hub: HubConfig) -> None:
        root, text = hub.root, hub.root.section("text_config")
        self.file = root.file
        self.found: dict[str, Fact] = {}
        self.missing: dict[str, str] = {}
        for field, only in _TEXT_FIXED.items():
            text.require(field, only)
        self._read(text, _TEXT)
        self._read_kv_heads(text)
        self._read_rope(text)
        self._read(root, _TOP)
        # Releases from 5 on obey the field outside `text_config`. Without either there is a head.
        tying = root if "tie_word_embeddings" in root else text
        self._add("weight_tying", tying, "tie_word_embeddings", bool, False)
        self._read_tower(root)

    def config(self) -> PlmConfig:
        """The architecture.

        Raises:
            InputError: fields are missing, or do not fit together.
        """
        if self.missing:
            names = list(dict.fromkeys(self.missing.values()))
            verb = "is" if len(names) == 1 else "are"
            raise InputError(
                f"{self.file}: {', '.join(names)} {verb} missing: complete the file, or give the "
                "architecture with --config"
            )
        values = {name: fact.value for name, fact in self.found.items()}
        ffn_dim, plain = values.pop("ffn_dim"), 8 * values["dim"] // 3
        factor = None if plain <= ffn_dim else ffn_dim / plain
        size = values.pop("head_dim", None)
        if size is not None and size * values["n_heads"] != values["dim"]:
            values["head_size"] = size
        vision, ratio = values.pop(_VISION), values.pop("pooling_ratio")
        image_token_id = values.pop("image_token_id")
        try:
            # The feed-forward size is rounded up to `multiple_of`, and so becomes `ffn_dim`.
            decoder = DecoderConfig(**values, ffn_dim_multiplier=factor, multiple_of=ffn_dim)
            return PlmConfig(
                decoder=decoder, vision=vision, pooling_ratio=ratio, image_token_id=image_token_id
            )
        except InputError as error:
            raise InputError(f"{self.file}: {error}") from None

    def _add(self, ours: str, section: Section, field: str, declared: Any, *default: Any) -> None:
        value = section.read(field, declared, *default)
        self.found[ours] = Fact(value, section.name(field))

    def _read(self, section: Section, fields: Mapping[str, tuple[str, Any]]) -> None:
        for ours, (theirs, declared) in fields.items():
            if theirs in section:
                self._add(ours, section, theirs, declared)
            else:
                self.missing[ours] = section.name(theirs)

    def _read_kv_heads(self, text: Section) -> None:
        """Heads of keys and values, and the size of all heads."""
        field = "num_key_value_heads"
        if field in text.content:  # null stands for all heads
            heads = text.read("num_attention_heads", int, None)
            self._add("n_kv_heads", text, field, int, heads)
        else:
            self.missing["n_kv_heads"] = text.name(field)
        if "head_dim" in text:
            self._add("head_dim", text, "head_dim", int)

    def _read_rope(self, text: Section) -> None:
        """`rope_parameters`, or `rope_theta` and `rope_scaling` of releases before 5."""
        new = "rope_parameters" in text
        field = "rope_parameters" if new else "rope_scaling"
        rope = text.section(field, {})
        if new:
            _refuse_older(text, rope)
        base = rope if "rope_theta" in rope else text
        if "rope_theta" in base:
            self._add("rope_theta", base, "rope_theta", float)
        else:
            self.missing["rope_theta"] = (rope if new else text).name("rope_theta")
        for section in (rope, text):
            section.require("partial_rotary_factor", 1.0)
        kind_field = "type" if "type" in rope and "rope_type" not in rope else "rope_type"
        if field not in text.content:
            self.missing["rope_scale_factor"] = text.name(field)
            return
        if field in text and kind_field not in rope:
            self.missing["rope_scale_factor"] = rope.name(kind_field)
            return
        kind = rope.read(kind_field, str, "default")  # a null `rope_scaling` is no scaling
        if kind == "llama3":
            self._read(rope, _SCALING)
        elif kind == "default":
            self.found["rope_scale_factor"] = Fact(1.0, text.name(field))
        else:
            raise rope.error(
                f"{rope.name(kind_field)} is {kind!r:.60}; only 'default' and 'llama3' are "
                "supported"
            )

    def _read_tower(self, root: Section) -> None:
        for section, field in ((root, "vision_config"), (root, "vision_use_cls_token")):
            if field not in section:
                self.missing[field] = section.name(field)
        if "vision_config" not in root:
            return
        section = root.section("vision_config")
        section.require("model_type", "timm_wrapper")
        if "architecture" not in section:
            self.missing[_VISION] = section.name("architecture")
            return
        tower = _tower(section)
        self.found[_VISION] = Fact(tower, section.name("model_args"))
        has_token = root.read("vision_use_cls_token", bool, tower.use_cls_token)
        if has_token != tower.use_cls_token:
            raise root.error(
                f"vision_use_cls_token is {has_token}, and class_token of the tower is "
                f"{tower.use_cls_token}; they must be equal"
            )


def _refuse_older(text: Section, rope: Section) -> None:
    """InputError unless fields of an older release say what `rope_parameters` does."""
    older = dict(text.section("rope_scaling", {}).content)
    older = {"rope_type" if name == "type" else name: value for name, value in older.items()}
    if "rope_theta" in text:
        older.setdefault("rope_theta", text.content["rope_theta"])
    for name, value in older.items():
        if rope.content.get(name, value) != value:
            raise text.error(
                f"{rope.name(name)} is {rope.content[name]!r:.60}, and {value!r:.60} in "
                f"{text.name('rope_scaling')} or {text.name('rope_theta')}, the names of older "
                "releases; remove one"
            )


def _tower(section: Section) -> VisionConfig:
    """The tower of a `vision_config`, without pooling, and without a norm after it."""
    where = section.name("model_args")
    args = section.section("model_args", {}).content
    try:
        tower = timm_tower(section.content["architecture"], {**args, "num_classes": 0}, where)
    except InputError as error:
        raise section.error(str(error)) from None
    return replace(
        tower,
        pool_type="none",
        use_ln_post=tower.use_ln_post and not tower.norm_after_pool,
        norm_after_pool=False,
        timm_grid=None if tower.timm_grid == tower.grid else tower.timm_grid,
    )


def check_agreement(
    config: PlmConfig, source: str, facts: PlmFacts, *, except_length: bool = False
) -> None:
    """Compares an architecture from another source with a `config.json`, field by field.

    Args:
        config: the architecture.
        source: its source, for messages.
        facts: content of the `config.json`; fields that it lacks are not compared.
        except_length: leave out the longest sequence, which an export may shorten.

    Raises:
        InputError: names each field that differs and both values.
    """
    found = {name: fact.value for name, fact in facts.found.items()}
    names = {name: fact.name for name, fact in facts.found.items()}
    mine = _values(config)
    if _VISION in found:
        tower = _tower_values(found.pop(_VISION))
        found |= tower
        names |= dict.fromkeys(tower, names[_VISION])
    if except_length:
        found.pop("max_seqlen", None)
    if 1.0 == mine["rope_scale_factor"] == found.get("rope_scale_factor"):
        for name in ("low_freq_factor", "high_freq_factor", "old_context_len"):
            found.pop(name, None)  # has no effect without scaling
    differences = [
        f"{name} is {mine[name]} in {source} and {value} in {facts.file} ({names[name]})"
        for name, value in found.items()
        if mine[name] != value
    ]
    if differences:
        raise InputError(
            f"{source} and {facts.file} must agree: {'; '.join(differences)}. A field that "
            f"{source} leaves out has its default"
        )


def _values(config: PlmConfig) -> dict[str, Any]:
    """Comparable values of an architecture, by the names of `PlmFacts.found`."""
    decoder = config.decoder
    return {
        **decoder.to_dict(),
        "n_kv_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "ffn_dim": decoder.ffn_dim,
        "pooling_ratio": config.pooling_ratio,
        "image_token_id": config.image_token_id,
        **_tower_values(config.vision),
    }


def _tower_values(tower: VisionConfig) -> dict[str, Any]:
    values = {f"{_VISION}.{name}": getattr(tower, name) for name in _TOWER_FIELDS}
    return {**values, f"{_VISION}.has_layer_scale": tower.ls_init_value is not None}
