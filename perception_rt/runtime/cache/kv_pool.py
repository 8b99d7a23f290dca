"""Who has which row of which key-value cache block, within one budget of bytes.

A block is rows of equal size. A request starts in the smallest row that holds its prompt and moves,
once, to the row that holds all it may become; both are promised to it when it is admitted, so that
it never runs out of memory half way. Knows rows, lengths and owners, and not what is in them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from perception_rt.errors import BackendError
from perception_rt.runtime.cache.kv_block import CacheBlock

Allocate = Callable[[int, int], CacheBlock]  # of rows and slots

SMALLEST_ROW = 256


def bucket_sizes(max_length: int, smallest: int = SMALLEST_ROW) -> tuple[int, ...]:
    """Slots of a row, doubling from `smallest`; the last is `max_length`."""
    sizes = [smallest]
    while sizes[-1] < max_length:
        sizes.append(2 * sizes[-1])
    return (*sizes[:-1], max_length)


@dataclass(slots=True, kw_only=True, eq=False)
class _Bucket:
    """The rows of one size.

    Attributes:
        slots: tokens that a row holds.
        owners: of each row; None for a free one.
        takes: how often each row was taken, so that an owner from before is not taken for this one.
        promised: rows that admitted requests have here or may still move to.
        touched: rows that were used since the block was made, which is the memory that it costs.
        block: None while no row is taken, unless it stays.
        dirty: free rows that could not be cleared, and are before they are taken.
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
    """One request's row. Read it; only `KvPool` and `advance` change it.

    Attributes:
        row: which one of `block`.
        length: tokens in the cache.
        closed: whether the row was given back.
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
        """Where the row is."""
        assert not self.closed and self.bucket.block is not None
        return self.bucket.block

    def advance(self, length: int, written: int = 0) -> None:
        """Says that the row holds `length` tokens now, and what is behind them is void.

        Args:
            length: tokens, those from before among them.
            written: slots that were written, if more than those.
        """
        self.length = length
        self.written = max(self.written, length, written)
        assert not self.closed and self.written <= self.bucket.slots


class KvPool:
    """Rows for requests, taken by `admit` and given back by `release`. Not for several threads."""

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
        """An empty pool; it holds no memory.

        Args:
            bytes_per_token: of the keys and values of all layers.
            max_length: tokens of the longest sequence.
            max_bytes: bound on the memory of all rows.
            max_rows: rows of one size.
            allocate: makes a block, whose rows should cost memory only once they are used.
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
        """Memory of all rows that are used, were used, or are promised; at most `max_bytes`."""
        return self._bytes(())

    @property
    def used_rows(self) -> int:
        """Rows that requests have."""
        return len(self._leases)

    def cost(self, start: int, total: int) -> int:
        """Bytes that a request takes; see `admit`."""
        return sum(b.slots for b in self._needed(start, total)) * self._bytes_per_token

    def admit(self, start: int, total: int) -> Lease | None:
        """A row for a request, or None while there is no room for it.

        Args:
            start: tokens that it has at first.
            total: tokens that it may ever have, up to the pool's `max_length`.
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
        """Moves a request, with what its row holds, if that is too small for `length` tokens."""
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
        """Takes a row back and zeroes it; a second call does nothing."""
        if lease.closed:
            return
        _check_owner(lease)
        lease.closed = True
        self._leases.remove(lease)
        for bucket in lease.promises:
            bucket.promised -= 1
        _vacate(lease.bucket, lease.row, lease.written)

    def close(self) -> None:
        """Gives the memory of all blocks back; no request has a row any more."""
        for bucket in self._buckets:
            bucket.block, bucket.touched, bucket.dirty = None, 0, set()

    def invariants(self) -> None:
        """AssertionError if two requests have one row, rows were lost, or there are too many."""
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
        """The smallest bucket for the start, and that for all, if it is another one.

        The last alone where both at once are more than there is: then there is no moving.
        """
        first = next(b for b in self._buckets if b.slots >= start)
        last = next(b for b in self._buckets if b.slots >= total)
        both = (first.slots + last.slots) * self._bytes_per_token
        return [last] if first is last or both > self.max_bytes else [first, last]

    def _bytes(self, more: Sequence[_Bucket]) -> int:
        """`accounted_bytes` if another request had a row of each of `more`.

        Rows are taken lowest first, so those in use are never more than what was promised at once,
        and moving to a promised row adds nothing to this.
        """
        rows = ((b.slots, max(b.touched, b.promised + (b in more))) for b in self._buckets)
        return sum(slots * count for slots, count in rows) * self._bytes_per_token

    def _take(self, bucket: _Bucket, lease: Lease) -> tuple[int, int]:
        """The lowest free row, and how often it has been taken by now."""
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
    assert not lease.closed, "this row was given back"
    assert lease.bucket.owners[lease.row] is lease
    assert lease.bucket.takes[lease.row] == lease.take


def _vacate(bucket: _Bucket, row: int, written: int) -> None:
    """Frees a row; the block goes with the last one."""
    assert bucket.block is not None
    bucket.owners[row] = None
    if bucket.block.stays or any(owner is not None for owner in bucket.owners):
        try:
            bucket.block.clear(row, written)
        except BackendError:  # of a device; whoever is next is told, not who leaves
            bucket.dirty.add(row)
    else:
        bucket.block = None
        bucket.touched = 0
        bucket.dirty.clear()
