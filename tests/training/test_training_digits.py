"""Held-out digits are never drawn for training, and captions describe their images."""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.datasets import load_digits

from training.demo import digits, scenes
from training.demo.digit_source import DigitSource, validation_digits
from training.recipe.schema import ContrastiveConfig


def rows_of(part: digits.Digits) -> set[bytes]:
    return {ink.tobytes() for ink in part.ink}


def test_splits_are_the_head_and_the_tail_of_the_file() -> None:
    assert slice(0, -450) == digits.TRAIN_DIGITS
    assert slice(-450, None) == digits.HELD_OUT_DIGITS
    everything = load_digits().images.astype(np.float32) / 16
    assert np.array_equal(digits.training_digits().ink, everything[:1347])
    assert np.array_equal(digits.held_out().ink, everything[1347:])
    assert not rows_of(digits.training_digits()) & rows_of(digits.held_out())


@pytest.mark.parametrize("validation", [0, 50])
def test_the_source_draws_from_the_training_split_only(
    tiny: Callable[..., ContrastiveConfig], monkeypatch: pytest.MonkeyPatch, validation: int
) -> None:
    config = tiny(f"data.validation={validation}")
    drawn: set[bytes] = set()
    ink_mask = scenes.ink_mask

    def spy(ink: digits.Floats, *args: object) -> digits.Floats:
        drawn.add(ink.tobytes())
        return ink_mask(ink, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(scenes, "ink_mask", spy)
    monkeypatch.setattr(scenes, "vary_pen", lambda rng, ink: ink)
    source = DigitSource(config.data, config.model, seed=0)
    for number in range(3000):
        source.sample(number, 16)
    allowed = rows_of(digits.training_digits()) - rows_of(validation_digits(config.data))
    assert len(drawn) > 1000
    assert drawn <= allowed


def test_held_out_digits_are_plain_images() -> None:
    images, labels = digits.held_out_digits(32)
    assert images.shape == (450, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(labels, load_digits().target[-450:])
    assert (images[:, 0] == 255).all()
    assert (images.min(axis=(1, 2, 3)) == 0).all()
    assert np.array_equal(images, digits.held_out_digits(32)[0])


def test_placement_moves_turns_and_leans_as_documented() -> None:
    bar = np.zeros((8, 8), dtype=np.float32)
    bar[:, 3:5] = 1  # upright, in the middle

    def centre_x(rows: slice, **placement: float) -> float:
        mask = digits.ink_mask(bar, 64, digits.Placement(**placement))[rows]
        return float((mask.sum(axis=0) * np.arange(64)).sum() / mask.sum())

    top, bottom = slice(10, 26), slice(38, 54)
    assert centre_x(top) == pytest.approx(31.5, abs=0.1)
    assert centre_x(top, x=0.6) == pytest.approx(31.5 + 6.4, abs=0.1)
    assert centre_x(top, angle=0.3) < 30 < 33 < centre_x(bottom, angle=0.3)
    assert centre_x(bottom, shear=0.3) < 30 < 33 < centre_x(top, shear=0.3)


def test_scenes_are_fixed_by_their_generator_and_show_their_colors() -> None:
    part = digits.training_digits().part(slice(0, 60))
    for i, (ink, label) in enumerate(zip(part.ink, part.labels, strict=True)):
        image, scene = scenes.draw_scene(np.random.default_rng((5, i)), ink, int(label), 32)
        again, _ = scenes.draw_scene(np.random.default_rng((5, i)), ink, int(label), 32)
        assert np.array_equal(image, again)
        assert scene.digit == label
        assert scene.ink != scene.ground
        ink_color = np.array(scenes.COLORS[scene.ink])
        assert np.abs(image.astype(int) - ink_color).max(axis=2).min() <= 40


def test_captions_and_prompts() -> None:
    scene = scenes.Scene(digit=7, ink="orange", ground="green", kind="striped")
    rng = np.random.default_rng(0)
    seen = {scenes.caption(rng, scene) for _ in range(300)}
    assert "a photo of the handwritten digit seven" in seen
    assert "an orange 7 on a green background" in seen
    assert not any("{" in text for text in seen)
    assert [prompts[0] for prompts in scenes.digit_prompts()][7] in seen
    assert len(scenes.digit_prompts()) == 10
    assert len({tuple(prompts) for prompts in scenes.ink_prompts()}) == len(scenes.COLOR_NAMES)
