"""Allocates key-value cache rows to requests within a byte budget.

All rows of a block have the same size. A request starts in the smallest row that holds its prompt
and moves, once, to a row that holds its longest possible answer. Both rows are promised when it is
admitted, so it never runs out of memory half-way. Knows rows, lengths and owners, not contents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from perception_rt.errors import BackendError
from perception_rt.runtime.cache.kv_block import CacheBlock

Allocate = Callable[[int, int], CacheBlock]  # (rows, slots)

SMALLEST_ROW = 256


def bucket_sizes(max_length: int, smallest: int = SMALLEST_ROW) -> tuple[int, ...]:
    """Returns slots per row of each bucket: doubling from `smallest`, the last `max_length`."""
    sizes = [smallest]
    while sizes[-1] < max_length:
        sizes.append(2 * sizes[-1])
    return (*sizes[:-1], max_length)


@dataclass(slots=True, kw_only=True, eq=False)
class _Bucket:
    """The rows of one size.

    Attributes:
        slots: tokens per row.
        owners: the lease of each row; None for a free row.
        takes: how often each row was taken, to tell an earlier owner from the current one.
        promised: rows that admitted requests use here or may still move to.
        touched: rows used since the block was allocated, which decides its memory.
        block: the memory; None while no row is taken, unless the block stays.
        dirty: free rows that could not be cleared, and must be before they are taken.
    """

    slots: int
    owners: list["Lease | None"]
    takes: list[int]
    promised: int = 0
    touched: int = 0
    block: CacheBlock | None = None
    dirty: set[int] = field(default_factory=set)


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """One request's row; only `KvPool` and `advance` change it.

    Attributes:
        bucket: the row's bucket.
        promises: buckets where a row is promised; the last one holds the longest answer.
        row: index of the row in `block`.
        take: value of the bucket's `takes` when the row was taken.
        length: tokens in the cache.
        written: slots ever written, which are cleared on release.
        closed: whether the row was released.
    """

    bucket: _Bucket
    promises: Sequence[_Bucket]
    row: int = -1
    take: int = 0
    length: int = 0
    written: int = 0
    closed: bool = False

    @property
    def block(self) -> CacheBlock:
        """The block that holds the row."""
        assert not self.closed and self.bucket.block is not None
        return self.bucket.block

    def advance(self, length: int, written: int = 0) -> None:
        """Sets the number of valid tokens in the row; slots after them are void.

        Args:
            length: all valid tokens.
            written: slots that were or will be written, if more.
        """
        self.length = length
        self.written = max(self.written, length, written)
        assert not self.closed and self.written <= self.bucket.slots


class KvPool:
    """Rows for requests: `admit` takes one, `release` frees it. Not thread-safe."""

    def __init__(
        self,
        bytes_per_token: int,
        *,
        max_length: int,
        max_bytes: int,
        max_rows: int,
        allocate: Allocate,
        smallest: int = SMALLEST_ROW,
    ) -> None:
        """Creates an empty pool, which holds no memory.

        Args:
            bytes_per_token: bytes of one token's keys and values in all layers.
            max_length: longest sequence, in tokens.
            max_bytes: total bytes of all rows.
            max_rows: most rows of one size.
            allocate: allocates a block; its rows should cost memory only when used.
            smallest: slots of the smallest row.
        """
        self.max_bytes = max_bytes
        self._bytes_per_token = bytes_per_token
        self._allocate = allocate
        self._leases: list[Lease] = []
        self._buckets = []
        for slots in bucket_sizes(max_length, smallest):
            rows = min(max_rows, max_bytes // (slots * bytes_per_token))
            self._buckets.append(_Bucket(slots=slots, owners=[None] * rows, takes=[0] * rows))

    @property
    def accounted_bytes(self) -> int:
        """Bytes of all rows that are or were used, or are promised; at most `max_bytes`."""
        return self._bytes(())

    @property
    def used_rows(self) -> int:
        """Number of rows in use."""
        return len(self._leases)

    def cost(self, start: int, total: int) -> int:
        """Returns the bytes that a request takes; arguments as `admit`."""
        return sum(b.slots for b in self._needed(start, total)) * self._bytes_per_token

    def admit(self, start: int, total: int) -> Lease | None:
        """Takes a row for a request; returns None while there is no room.

        Args:
            start: tokens at the start.
            total: most tokens that it can have, up to `max_length`.
        """
        needed = self._needed(start, total)
        if self._bytes(needed) > self.max_bytes:
            return None
        if any(bucket.promised == len(bucket.owners) for bucket in needed):
            return None
        lease = Lease(bucket=needed[0], promises=needed)
        lease.row, lease.take = self._take(lease.bucket, lease)
        for bucket in needed:
            bucket.promised += 1
        self._leases.append(lease)
        return lease

    def make_room(self, lease: Lease, length: int) -> None:
        """Moves a request to a larger row if its row is too small for `length` tokens."""
        _check_owner(lease)
        if length <= lease.bucket.slots:
            return
        small, row, target = lease.bucket, lease.row, lease.promises[-1]
        assert length <= target.slots, "more tokens than were admitted"
        new_row, take = self._take(target, lease)
        try:
            assert target.block is not None
            lease.block.copy_row(row, target.block, new_row, lease.length)
        except BaseException:
            _vacate(target, new_row, lease.length)
            raise
        lease.bucket, lease.row, lease.take = target, new_row, take
        lease.promises = [target]
        _vacate(small, row, lease.written)
        small.promised -= 1

    def release(self, lease: Lease) -> None:
        """Frees a row and zeroes it; a second call does nothing."""
        if lease.closed:
            return
        _check_owner(lease)
        lease.closed = True
        self._leases.remove(lease)
        for bucket in lease.promises:
            bucket.promised -= 1
        _vacate(lease.bucket, lease.row, lease.written)

    def close(self) -> None:
        """Frees the memory of all blocks; no row may be in use."""
        for bucket in self._buckets:
            bucket.block, bucket.touched, bucket.dirty = None, 0, set()

    def invariants(self) -> None:
        """AssertionError if two requests share a row, a row was lost, or a bound is exceeded."""
        owned = [
            (bucket, row, owner)
            for bucket in self._buckets
            for row, owner in enumerate(bucket.owners)
            if owner is not None
        ]
        assert len(owned) == len(self._leases), "a request has no row, or two"
        for bucket, row, lease in owned:
            assert not lease.closed and lease in self._leases
            assert (lease.bucket, lease.row) == (bucket, row)
            assert lease.take == bucket.takes[row]
            assert 0 <= lease.length <= lease.written <= bucket.slots
            assert lease.promises[0] is bucket
        for bucket in self._buckets:
            used = [row for row, owner in enumerate(bucket.owners) if owner is not None]
            assert bucket.promised == sum(bucket in lease.promises for lease in self._leases)
            assert len(used) <= bucket.promised <= len(bucket.owners)
            assert max(used, default=-1) < max(bucket.touched, 1) <= max(len(bucket.owners), 1)
            assert bucket.dirty.isdisjoint(used)
            stays = bucket.block is not None and bucket.block.stays
            assert (bucket.block is not None) == (bucket.touched > 0) == (stays or bool(used))
            assert bucket.block is not None or not bucket.dirty
        assert self.accounted_bytes <= self.max_bytes

    def _needed(self, start: int, total: int) -> list[_Bucket]:
        """The smallest buckets for the start and for all tokens; one if they are the same.

        Only the second if both rows together exceed the budget: the request then never moves.
        """
        first = next(b for b in self._buckets if b.slots >= start)
        last = next(b for b in self._buckets if b.slots >= total)
        both = (first.slots + last.slots) * self._bytes_per_token
        return [last] if first is last or both > self.max_bytes else [first, last]

    def _bytes(self, more: Sequence[_Bucket]) -> int:
        """`accounted_bytes` if one more row of each of `more` were promised.

        The lowest free row is taken first, so rows in use never exceed rows promised at one time,
        and moving to a promised row does not change this sum.
        """
        rows = ((b.slots, max(b.touched, b.promised + (b in more))) for b in self._buckets)
        return sum(slots * count for slots, count in rows) * self._bytes_per_token

    def _take(self, bucket: _Bucket, lease: Lease) -> tuple[int, int]:
        """Takes the lowest free row; returns it and how often it has been taken."""
        if bucket.block is None:
            bucket.block = self._allocate(len(bucket.owners), bucket.slots)
        row = bucket.owners.index(None)
        if row in bucket.dirty:
            bucket.block.clear(row, bucket.slots)
            bucket.dirty.remove(row)
        bucket.owners[row] = lease
        bucket.takes[row] += 1
        bucket.touched = max(bucket.touched, row + 1)
        return row, bucket.takes[row]


def _check_owner(lease: Lease) -> None:
    assert not lease.closed, "this row was released"
    assert lease.bucket.owners[lease.row] is lease
    assert lease.bucket.takes[lease.row] == lease.take


def _vacate(bucket: _Bucket, row: int, written: int) -> None:
    """Frees a row, and the block with its last row."""
    assert bucket.block is not None
    bucket.owners[row] = None
    if bucket.block.stays or any(owner is not None for owner in bucket.owners):
        try:
            bucket.block.clear(row, written)
        except BackendError:  # of a device: the next owner gets the error, not this one
            bucket.dirty.add(row)
    else:
        bucket.block = None
        bucket.touched = 0
        bucket.dirty.clear()
