"""Reads a PerceptionLM folder's image preprocessing and end tokens, as transformers saves them.

Newer releases keep both processors in `processor_config.json`, older ones in files of their own.
"""

from pathlib import Path
from typing import get_args

from perception_rt.checkpoint.hf_plm import Fact, PlmFacts
from perception_rt.checkpoint.json_files import Section, find_beside, read_json
from perception_rt.errors import InputError
from perception_rt.processing.image import Interpolation

PROCESSOR_JSON = "processor_config.json"
_OLD_FILES = {
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}
_GENERATION_JSON = "generation_config.json"
_STEPS = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True}
# All fields of a processor that are read.
_FIELDS = (
    *_STEPS, "do_center_crop", "rescale_factor", "tile_size", "max_num_tiles", "vision_input_type",
    "image_mean", "image_std", "resample", "num_frames",
)  # fmt: skip
_RESCALE = 1 / 255
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_TRIPLE = tuple[float, float, float]


class ProcessorFacts:
    """Tile settings that the processor's files of a folder hold.

    Attributes:
        found: values by the names of `TileSpec`'s fields.
        file: name of the file that has, or should have, the image processor.

    Args:
        path: as for `open_checkpoint`.
        side: image size of the vision tower in pixels.

    Raises:
        CheckpointError: a file is not JSON.
        InputError: a field is mistyped, or asks for something else than tiles for the tower.
    """

    def __init__(self, path: Path, side: int) -> None:
        self._side = side
        self.found: dict[str, Fact] = {}
        image, video = (_processor(path, name) for name in _OLD_FILES)
        self.file = PROCESSOR_JSON if image is None else image.file
        self._prefix = "" if image is None else image.name("")
        if image is not None:
            self._read_image(image)
        if video is not None:
            self._read_video(video)

    def name(self, field: str) -> str:
        """File and dotted name of a field of the image processor, for messages."""
        return f"{self.file}: {self._prefix}{field}"

    def _read_image(self, image: Section) -> None:
        _check_steps(image)
        for ours, theirs, declared in (
            ("tile_size", "tile_size", int),
            ("max_tiles", "max_num_tiles", int),
            ("mode", "vision_input_type", str),
        ):
            if theirs in image:
                self.found[ours] = Fact(image.read(theirs, declared), image.name(theirs))
        self.found |= _pixels(image)
        size = self.found.get("tile_size")
        if size is not None and size.value != self._side:
            raise image.error(
                f"{size.name} is {size.value}, and the image size of the vision tower is "
                f"{self._side}; they must be equal"
            )

    def _read_video(self, video: Section) -> None:
        """Frames must be preprocessed like tiles; they always have the size of the tower."""
        _check_steps(video)
        for ours, fact in _pixels(video).items():
            mine = self.found.get(ours)
            if mine is not None and mine.value != fact.value:
                raise video.error(
                    f"{fact.name} is {fact.value}, and {mine.name} is {mine.value}; frames and "
                    "tiles must be preprocessed alike"
                )
        field = "num_frames"
        if field in video:
            self.found["max_frames"] = Fact(video.read(field, int), video.name(field))


def check_processor(path: Path, facts: PlmFacts) -> None:
    """InputError unless the processor makes as many image tokens per tile as the model."""
    file = find_beside(path, PROCESSOR_JSON)
    if file is None:
        return
    root = Section(file.name, read_json(file))
    found = facts.found
    wanted = {}
    if "vision_model" in found:
        wanted["patch_size"] = found["vision_model"].value.patch_size
    if "pooling_ratio" in found:
        wanted["pooling_ratio"] = found["pooling_ratio"].value
    for field, value in wanted.items():
        mine = root.read(field, int, value)
        if mine != value:
            raise root.error(f"{field} is {mine}, and {value} in {facts.file}; they must agree")


def read_end_ids(path: Path, config: Section) -> tuple[int, ...] | None:
    """The tokens that end an answer; None if no file names them.

    Args:
        path: as for `open_checkpoint`.
        config: content of `config.json`, which `generation_config.json` precedes.

    Raises:
        CheckpointError: a file is not JSON.
        InputError: `eos_token_id` is neither an integer nor a list of integers.
    """
    sections = [config, config.section("text_config", {})]
    file = find_beside(path, _GENERATION_JSON)
    if file is not None:
        sections.insert(0, Section(file.name, read_json(file)))
    field = "eos_token_id"
    section = next((section for section in sections if field in section), None)
    if section is None:
        return None
    value = section.content[field]
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(token) is not int or token < 0 for token in ids):
        raise section.error(
            f"{section.name(field)} must be a token id or a list of ids, not {value!r:.60}"
        )
    return tuple(dict.fromkeys(ids))


def _processor(path: Path, name: str) -> Section | None:
    """An image or video processor's settings; None if no file has them.

    Raises:
        InputError: two files have them and differ in a field that both give.
    """
    sections = []
    file = find_beside(path, PROCESSOR_JSON)
    if file is not None:
        root = Section(file.name, read_json(file))
        if name in root:
            sections.append(root.section(name))
    file = find_beside(path, _OLD_FILES[name])
    if file is not None:
        sections.append(Section(file.name, read_json(file)))
    if len(sections) == 2:
        _check_agreement(*sections)
    return sections[0] if sections else None


def _check_agreement(new: Section, old: Section) -> None:
    for field in _FIELDS:
        if field in new and field in old and new.content[field] != old.content[field]:
            raise new.error(
                f"{new.name(field)} is {new.content[field]!r:.60}, and "
                f"{old.content[field]!r:.60} in {old.file}; they must agree: correct or remove "
                "the file that is out of date"
            )


def _check_steps(processor: Section) -> None:
    """InputError unless images are resized, scaled to [0, 1] and normalised."""
    for field, only in _STEPS.items():
        processor.require(field, only)
    processor.require("do_center_crop", False)
    factor = processor.read("rescale_factor", float, _RESCALE)
    if abs(factor / _RESCALE - 1) > 1e-6:
        raise processor.error(
            f"{processor.name('rescale_factor')} is {factor}; only 1/255 is supported"
        )


def _pixels(processor: Section) -> dict[str, Fact]:
    """Filter, mean and standard deviation, by the names of `TileSpec`'s fields."""
    found = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in processor:
            found[ours] = Fact(processor.read(theirs, _TRIPLE), processor.name(theirs))
    if "resample" in processor:
        number = processor.read("resample", int)
        name = _RESAMPLE.get(number)
        if name not in get_args(Interpolation):
            raise processor.error(
                f"{processor.name('resample')} is {number}, which is no filter of this library: "
                f"{', '.join(get_args(Interpolation))}"
            )
        found["interpolation"] = Fact(name, processor.name("resample"))
    return found


def required(name: str) -> InputError:
    """The error for a tile setting that no file has."""
    return InputError(
        f"{name} is missing: copy the processor's files from the model that this one was made from"
    )
