"""Shares of a mix are exact, and every line of a dataset comes once per epoch."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.jsonl import JsonLines
from training.data.mixture import Mix, parse_mix, shuffled

BLOCK = 16384


def test_weights_are_shares():
    assert parse_mix(" a:1, b:3 ", {"a", "b", "c"}) == {"a": 0.25, "b": 0.75}
    assert parse_mix("x:y:2", ["x:y"]) == {"x:y": 1.0}  # the last colon counts


def test_shares_are_exact_and_ranks_have_no_gap():
    mix = Mix([0.5, 0.125, 0.375], seed=3)
    picks = [mix.pick(number) for number in range(2 * BLOCK)]
    counts = Counter(dataset for dataset, _ in picks)
    assert counts == {0: BLOCK, 1: BLOCK // 4, 2: BLOCK * 3 // 4}
    for dataset in range(3):
        ranks = [rank for chosen, rank in picks if chosen == dataset]
        assert ranks == list(range(counts[dataset]))
    assert mix.pick(BLOCK + 7) == picks[BLOCK + 7]  # in any order
    assert Mix([0.5, 0.125, 0.375], seed=4).pick(BLOCK - 1) != picks[BLOCK - 1]


def test_no_lane_has_a_dataset_for_itself():
    # Lanes advance at different speeds, so a dataset confined to one lane would miss its share.
    mix = Mix([0.5, 0.5], seed=0)
    for lanes in (2, 4, 8):
        for lane in range(lanes):
            share = sum(mix.pick(n)[0] for n in range(lane, 4000, lanes)) * lanes / 4000
            assert 0.4 < share < 0.6


def test_the_smallest_share_is_one_of_a_block():
    mix = Mix([1 - 2e-9, 1e-9, 1e-9], seed=0)
    counts = Counter(mix.pick(number)[0] for number in range(BLOCK))
    assert counts == {0: BLOCK - 2, 1: 1, 2: 1}


@given(st.integers(1, 300), st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_shuffle_has_every_index_once(size, key):
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_shuffles_differ_and_are_even():
    first = Counter(shuffled(0, 10, f"{key}") for key in range(2000))
    assert len(first) == 10
    assert min(first.values()) > 130
    assert max(first.values()) < 280
    follows = Counter(
        (shuffled(1, 10, f"{key}") - shuffled(0, 10, f"{key}")) % 10 for key in range(2000)
    )
    assert max(follows.values()) < 300  # about 222 for each of 9 differences


def test_a_shuffle_of_very_many():
    size = 10**12 + 1
    found = {shuffled(i, size, "a") for i in range(200)}
    assert len(found) == 200
    assert max(found) > size // 2
    assert all(0 <= i < size for i in found)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("scanned", [1, 3, 1 << 20])
def test_lines_are_found_by_number(tmp_path, monkeypatch, end, scanned):
    monkeypatch.setattr("training.data.jsonl.SCAN_BYTES", scanned)
    path = tmp_path / f"{scanned}.jsonl"
    newline = "\r\n" if end == "\r\n" else "\n"
    path.write_bytes((newline.join(['{"a": 1}', "5", '["\u00e9"]', "null"]) + end).encode())
    lines = JsonLines(path, "set")
    assert [lines.load(i) for i in range(len(lines))] == [{"a": 1}, 5, ["\u00e9"], None]
    assert lines.where(3) == "set line 4"


def test_a_file_that_grew_is_scanned_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("1\n")
    assert len(JsonLines(path, "a")) == 1
    path.write_text("1\n2\n")
    assert JsonLines(path, "a").load(1) == 2
