"""GEN-06 for the sampler: which tokens are sampled, how often, and unusable logits."""

import numpy as np
import pytest

from perception_rt.errors import BackendError
from perception_rt.runtime.generation.sampling import Sampler

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))


def drawn(logits: np.ndarray = LOGITS, count: int = 4000, **options) -> np.ndarray:
    """Frequency of each sampled token."""
    sampler = Sampler(seed=0, **options)
    tokens = [sampler.choose(logits) for _ in range(count)]
    return np.bincount(tokens, minlength=len(logits)) / count


def test_greedy_takes_the_likeliest_and_of_equals_the_first() -> None:
    assert Sampler().choose(LOGITS) == 1
    assert Sampler().choose(np.array([1, 2, 2, 0], np.float32)) == 1
    assert Sampler(top_k=3, top_p=0.5, seed=1).choose(LOGITS) == 1
    assert Sampler().choose(np.array([-np.inf, -5, -np.inf], np.float32)) == 1


def test_frequencies_are_probabilities() -> None:
    np.testing.assert_allclose(drawn(temperature=1.0), np.exp(LOGITS), atol=0.03)
    hot = np.exp(LOGITS / 2.5)
    np.testing.assert_allclose(drawn(temperature=2.5), hot / hot.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.1}, [1]),
        ({"top_p": 0.45}, [1, 3]),
        ({"top_p": 0.75}, [1, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.9999999}, [0, 1, 2, 3, 4]),
        # top_p applies to the tokens that top_k left: 0.4 / 0.7 is less than 0.6.
        ({"top_k": 2, "top_p": 0.55}, [1]),
        ({"top_k": 2, "top_p": 0.6}, [1, 3]),
        # At temperature 2 the probabilities are about 0.15, 0.29, 0.10, 0.25, 0.18.
        ({"top_p": 0.5, "temperature": 2.0}, [1, 3]),
        ({"top_p": 0.6, "temperature": 2.0}, [1, 3, 4]),
    ],
)
def test_cuts_leave_the_likeliest(options: dict, kept: list[int]) -> None:
    frequencies = drawn(**{"temperature": 1.0, **options})
    assert np.flatnonzero(frequencies).tolist() == kept


def test_of_equal_tokens_a_cut_keeps_the_first() -> None:
    equal = np.zeros(6, np.float32)
    assert np.flatnonzero(drawn(equal, temperature=1.0, top_k=2)).tolist() == [0, 1]
    assert np.flatnonzero(drawn(equal, temperature=1.0, top_p=0.5)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_the_nucleus_is_that_of_a_full_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 2000).astype(np.float32)
    for top_p in (0.05, 0.5, 0.9, 0.99):
        odds = np.exp(logits.astype(np.float64))
        order = np.argsort(-odds)
        mass = np.cumsum(odds[order]) / odds.sum()
        nucleus = set(order[: int(np.searchsorted(mass, top_p)) + 1].tolist())
        sampler = Sampler(temperature=1.0, top_p=top_p, seed=seed)
        tokens = {sampler.choose(logits) for _ in range(300)}
        assert tokens <= nucleus and (len(tokens) == len(nucleus) or len(nucleus) > 30)


def test_a_seed_repeats_and_another_does_not() -> None:
    def stream(seed: int | None) -> list[int]:
        sampler = Sampler(temperature=1.0, seed=seed)
        return [sampler.choose(LOGITS) for _ in range(50)]

    assert stream(3) == stream(3) != stream(4)
    assert stream(None) != stream(None)


def test_each_draw_takes_one_number_whatever_the_options() -> None:
    """So a seeded stream does not depend on other computations."""
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}):
        rng = np.random.default_rng(9)
        sampler = Sampler(temperature=1.0, seed=rng, **options)
        for _ in range(10):
            sampler.choose(LOGITS)
        expected = np.random.default_rng(9)
        expected.random(10)
        assert rng.random() == expected.random()


@pytest.mark.parametrize("temperature", [1e-9, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert set(np.flatnonzero(drawn(temperature=temperature, count=50))) == {1}


def test_a_huge_temperature_is_uniform() -> None:
    np.testing.assert_allclose(drawn(temperature=1e308), [0.2] * 5, atol=0.03)


def test_excluded_tokens_are_never_chosen() -> None:
    allowed = np.array([True, False, True, False, True])
    assert Sampler(allowed=allowed).choose(LOGITS) == 4
    assert np.flatnonzero(drawn(temperature=1.0, allowed=allowed)).tolist() == [0, 2, 4]
    nan = np.where(allowed, LOGITS, np.nan)
    assert Sampler(allowed=allowed).choose(nan) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_an_error(value: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[2] = value
    for bad in (logits, np.full(5, -np.inf, np.float32), np.full(5, value, np.float32)):
        with pytest.raises(BackendError, match="no token can be chosen"):
            Sampler(temperature=temperature, seed=0).choose(bad)
    nobody = np.zeros(5, np.bool_)
    with pytest.raises(BackendError):
        Sampler(temperature=temperature, allowed=nobody).choose(LOGITS)


def seen(*ids: int, size: int = 5) -> np.ndarray:
    found = np.zeros(size, np.bool_)
    found[list(ids)] = True
    return found


def test_a_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    """Hugging Face's definition: 4 / 2 = 2 for token 0, -1 * 2 = -2 for token 1, others as is."""
    logits = np.array([4, -1, 2.5, -3, 0], np.float32)
    assert Sampler(repetition_penalty=2.0, seen=seen(0, 1)).choose(logits) == 2
    assert Sampler(repetition_penalty=1.5, seen=seen(0, 1)).choose(logits) == 0
    assert Sampler(repetition_penalty=0.5, seen=seen(2)).choose(logits) == 2
    negative = np.array([-1, -1.5, -4, -4, -4], np.float32)
    assert Sampler(repetition_penalty=2.0, seen=seen(0)).choose(negative) == 1
    before = logits.copy()
    Sampler(repetition_penalty=2.0, seen=seen(0, 1)).choose(logits)
    assert np.array_equal(logits, before)


def test_a_penalty_counts_the_tokens_that_were_chosen() -> None:
    logits = np.array([4, 3, 2, 1.9, 1.8], np.float32)
    prompt = seen()
    sampler = Sampler(repetition_penalty=2.5, seen=prompt)
    assert [sampler.choose(logits) for _ in range(6)] == [0, 1, 2, 3, 4, 0]
    assert not prompt.any()
    assert [Sampler(repetition_penalty=1.0, seen=prompt).choose(logits) for _ in range(2)] == [0, 0]


def test_a_penalty_comes_before_temperature_and_cuts() -> None:
    logits = np.array([4, 3.9, 1, 0, -1], np.float32)
    options = {"temperature": 1.0, "top_k": 1, "seed": 0}
    assert Sampler(repetition_penalty=1.2, seen=seen(0), **options).choose(logits) == 1
    sampler = Sampler(temperature=2.0, repetition_penalty=3.0, seen=seen(0, 4), seed=1)
    reference = Sampler(temperature=2.0, seed=1)
    penalised = np.array([4 / np.float32(3), 3.9, 1, 0, -3], np.float32)
    assert sampler.choose(logits) == reference.choose(penalised)


def test_an_engine_picks_tokens_only_without_a_penalty() -> None:
    assert Sampler().greedy and Sampler(repetition_penalty=1.0, seen=seen(0)).greedy
    assert not Sampler(repetition_penalty=1.1, seen=seen(0)).greedy
    assert not Sampler(temperature=1.0).greedy


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_unusable_logits_are_an_error_with_a_penalty_too(value: float) -> None:
    logits = LOGITS.copy()
    logits[2] = value
    with pytest.raises(BackendError, match="no token can be chosen"):
        Sampler(repetition_penalty=2.0, seen=seen(0, 2)).choose(logits)
