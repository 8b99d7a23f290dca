"""Cache rows: owners, cost, and that no row is lost or shared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_rt.errors import BackendError, CapacityError
from perception_rt.package.plm_graphs import CacheShape
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cache.kv_pool import KvPool, Lease, bucket_sizes

SHAPE = CacheShape(layers=2, kv_heads=1, head_dim=2, dtype="float32")
TOKEN = SHAPE.bytes_per_token


def make_pool(*, slots: int = 256, max_rows: int = 4, max_length: int = 64) -> KvPool:
    """A pool with rows of 16, 32 and 64 tokens, `slots` tokens in all."""
    return KvPool(
        TOKEN,
        max_length=max_length,
        max_bytes=slots * TOKEN,
        max_rows=max_rows,
        allocate=lambda rows, slots: CacheBlock(SHAPE, rows, slots),
        smallest=16,
    )


def write(lease: Lease, value: float, length: int) -> None:
    for array in (*lease.block.keys, *lease.block.values):
        array[lease.row, :, lease.length : length] = value
    lease.advance(length)


def content(lease: Lease) -> np.ndarray:
    return lease.block.read(lease.row, lease.block.slots)


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(11520, (256, 512, 1024, 2048, 4096, 8192, 11520)), (512, (256, 512)), (256, (256,)),
     (257, (256, 257)), (100, (100,))],
)  # fmt: skip
def test_sizes_double_up_to_the_longest_sequence(max_length: int, expected: tuple) -> None:
    assert bucket_sizes(max_length) == expected


def test_the_lowest_free_row_is_taken() -> None:
    pool = make_pool()
    leases = [pool.admit(1, 16) for _ in range(4)]
    assert [lease.row for lease in leases] == [0, 1, 2, 3]
    assert pool.admit(1, 16) is None
    pool.release(leases[2])
    pool.release(leases[0])
    pool.invariants()
    assert [pool.admit(1, 16).row, pool.admit(1, 16).row] == [0, 2]
    pool.invariants()


def test_a_request_moves_once_with_what_its_row_holds() -> None:
    pool = make_pool()
    other, lease = pool.admit(10, 10), pool.admit(10, 60)
    write(other, 1.0, 10)
    write(lease, 2.0, 16)
    pool.make_room(lease, 16)
    assert lease.block is other.block
    pool.make_room(lease, 17)
    pool.invariants()
    assert (lease.block.slots, lease.row, lease.length) == (64, 0, 16)
    assert (content(lease)[:, :, :, :16] == 2).all() and not content(lease)[:, :, :, 16:].any()
    # The released slots are zero, and the rows beside them are unchanged.
    assert not other.block.read(1, 16).any()
    assert (content(other)[:, :, :, :10] == 1).all()
    write(lease, 3.0, 64)
    pool.make_room(lease, 64)
    with pytest.raises(AssertionError, match="more tokens than were admitted"):
        pool.make_room(lease, 65)


def test_a_released_row_is_zero_for_the_next_owner() -> None:
    """GEN-02: never the contents of an earlier request."""
    pool = make_pool()
    keeper, lease = pool.admit(1, 16), pool.admit(1, 16)
    write(lease, 5.0, 12)
    lease.advance(3)  # 9 of 12 tokens were wrong drafts
    pool.release(lease)
    again = pool.admit(1, 16)
    assert again.row == 1 and again.block is keeper.block and not content(again).any()


def test_memory_goes_with_the_last_row() -> None:
    pool = make_pool()
    first, second = pool.admit(1, 16), pool.admit(1, 16)
    assert pool.accounted_bytes == 32 * TOKEN
    pool.release(first)
    # The row below is free, but its memory is still there.
    assert pool.accounted_bytes == 32 * TOKEN
    pool.release(second)
    assert pool.accounted_bytes == 0 and pool.used_rows == 0


def test_the_budget_counts_rows_to_come() -> None:
    pool = make_pool(slots=160)
    lease = pool.admit(10, 60)
    assert pool.accounted_bytes == pool.cost(10, 60) == (16 + 64) * TOKEN
    assert pool.admit(20, 60) is None  # 32 + 64 more
    other = pool.admit(10, 60)
    assert pool.accounted_bytes == pool.max_bytes
    assert pool.admit(1, 1) is None
    for growing in (lease, other):
        pool.make_room(growing, 17)
        pool.invariants()
    pool.release(lease)
    pool.release(other)
    assert pool.admit(1, 1) is not None


def test_rows_are_bounded_even_where_memory_is_not() -> None:
    pool = make_pool(slots=10**6, max_rows=2)
    assert pool.admit(1, 64) and pool.admit(1, 64)
    assert pool.admit(1, 16) is None and pool.admit(20, 64) is None
    assert pool.admit(20, 20) is not None


def test_a_row_larger_than_the_budget_costs_more_than_it() -> None:
    pool = make_pool(slots=40)
    assert pool.cost(33, 64) > pool.max_bytes and pool.admit(33, 64) is None
    assert pool.cost(16, 16) <= pool.max_bytes and pool.admit(16, 16) is not None


def test_release_is_idempotent_and_the_row_is_no_longer_its_own() -> None:
    pool = make_pool()
    lease = pool.admit(1, 60)
    pool.release(lease)
    pool.release(lease)
    pool.invariants()
    heir = pool.admit(1, 60)
    assert heir.take == lease.take + 1
    pool.release(lease)
    pool.invariants()
    assert pool.used_rows == 1
    for use in (
        lambda: pool.make_room(lease, 17),
        lambda: lease.advance(1),
        lambda: lease.block,
    ):
        with pytest.raises(AssertionError):
            use()


@pytest.mark.parametrize("error", [CapacityError("no memory"), KeyboardInterrupt()])
def test_a_move_that_fails_changes_nothing(error: BaseException, monkeypatch) -> None:
    pool = make_pool()
    lease = pool.admit(10, 60)
    write(lease, 2.0, 16)

    def copy_row(*_: object) -> None:
        raise error

    monkeypatch.setattr(CacheBlock, "copy_row", copy_row)
    with pytest.raises(type(error)):
        pool.make_room(lease, 17)
    pool.invariants()
    assert lease.block.slots == 16 and (content(lease) == 2).all()
    pool.release(lease)
    assert pool.accounted_bytes == 0


def test_a_block_that_cannot_be_made_changes_nothing() -> None:
    def allocate(rows: int, slots: int) -> CacheBlock:
        raise CapacityError("no memory")

    pool = KvPool(
        TOKEN, max_length=64, max_bytes=1 << 20, max_rows=2, allocate=allocate, smallest=16
    )
    with pytest.raises(CapacityError):
        pool.admit(1, 16)
    pool.invariants()
    assert pool.accounted_bytes == 0 and pool.used_rows == 0


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_order_of_calls_keeps_the_invariants(data: st.DataObject) -> None:
    """GEN-03."""
    pool = make_pool(slots=data.draw(st.sampled_from([80, 160, 400])), max_rows=3)
    leases: list[Lease] = []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["admit", "grow", "release"]))
        if action == "admit":
            start = data.draw(st.integers(1, 64))
            lease = pool.admit(start, data.draw(st.integers(start, 64)))
            leases += [] if lease is None else [lease]
        elif leases:
            lease = data.draw(st.sampled_from(leases))
            if action == "grow":
                length = data.draw(st.integers(lease.length, lease.promises[-1].slots))
                pool.make_room(lease, length)
                write(lease, id(lease), length)
            else:
                leases.remove(lease)
                pool.release(lease)
        pool.invariants()
        for lease in leases:
            values = content(lease)[:, :, :, : lease.length]
            assert (values == np.float32(id(lease))).all()
            assert not content(lease)[:, :, :, lease.length :].any()
    for lease in leases:
        pool.release(lease)
    assert pool.accounted_bytes == 0 and pool.used_rows == 0


def test_one_longest_row_is_enough_for_every_request() -> None:
    """A request does not move between two rows if there is memory for one only."""
    pool = KvPool(
        1,
        max_length=11520,
        max_bytes=11520,
        max_rows=8,
        allocate=lambda rows, slots: CacheBlock(SHAPE, rows, slots),
    )
    for start in range(1, 11265, 64):
        assert pool.cost(start, start + 256) <= pool.max_bytes, start


def test_a_row_that_cannot_be_cleared_is_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing device does not fail the release; the next owner gets a clear row or none."""
    pool = make_pool()
    other, lease = pool.admit(1, 16), pool.admit(1, 16)
    write(lease, 7.0, 9)
    block = lease.block

    def fails(self: CacheBlock, row: int, length: int) -> None:
        raise BackendError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(CacheBlock, "clear", fails)
        pool.release(lease)
        pool.invariants()
        assert lease.closed and pool.used_rows == 1
        with pytest.raises(BackendError, match="gone"):
            pool.admit(1, 16)
        pool.invariants()
    assert block.read(1, 16).any()
    again = pool.admit(1, 16)
    assert again.row == 1 and not again.block.read(1, 16).any()
    pool.release(again)
    pool.release(other)
    pool.invariants()
