"""How PyTorch's caching allocator hands out device memory: pools, segments, blocks, and when it gives some back.

A model in our own words of c10/cuda/CUDACachingAllocator.cpp (its `DeviceCachingAllocator`); names in brackets are
upstream's functions. Not modelled, since no training step without CUDA graphs depends on it: private pools of graphs,
garbage collection (off by default), `record_stream` (a block used on a second stream is freed here at once).
Addresses are ours: segments get ascending ones, while the driver may use an old address again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

# c10/core/AllocatorConfig.h: kMinBlockSize, kSmallSize, kSmallBuffer, kMinLargeAlloc, kRoundLarge, large_segment_size_.
MIN_BLOCK_SIZE = 512
SMALL_SIZE = 1 << 20
SMALL_SEGMENT = 2 << 20
MIN_LARGE_ALLOC = 10 << 20
ROUND_LARGE = 2 << 20
LARGE_SEGMENT = 20 << 20
UNLIMITED = 1 << 62
# An expandable segment's address space, in pages. Upstream takes 9/8 of the card and opens another when it is full.
ADDRESS_PAGES = 1 << 32


@dataclass(frozen=True)
class AllocatorOptions:
    """PYTORCH_ALLOC_CONF, and `capacity`: the bytes that the allocator can get from the device (None: no limit).

    `capacity` is the card's memory less what does not pass through the allocator: CUDA context, NCCL, other processes.
    Sizes are bytes. `max_split_size`: blocks at least this large are not cut, and not used for smaller requests.
    `roundup_power2_divisions`: one number for all sizes; 0 or 1 is off. `expandable`: `expandable_segments:True`.
    """

    expandable: bool = False
    capacity: int | None = None
    large_segment_size: int = LARGE_SEGMENT
    max_split_size: int | None = None
    max_non_split_rounding: int = LARGE_SEGMENT
    roundup_power2_divisions: int = 0

    def __post_init__(self) -> None:
        if self.large_segment_size % MIN_BLOCK_SIZE or self.large_segment_size < MIN_LARGE_ALLOC:
            raise ValueError(f"large_segment_size {self.large_segment_size} is no multiple of 512 B above 10 MiB")
        divisions = self.roundup_power2_divisions
        if divisions < 0 or divisions & (divisions - 1):
            raise ValueError(f"roundup_power2_divisions {divisions} is no power of two")

    def rounded(self, size: int) -> int:
        """The size of the block that a request of `size` > 0 bytes gets (`round_size`)."""
        divisions = self.roundup_power2_divisions
        if divisions > 1 and size > MIN_BLOCK_SIZE * divisions:
            step = (1 << (size.bit_length() - 1)) // divisions
            return -(-size // step) * step
        return -(-size // MIN_BLOCK_SIZE) * MIN_BLOCK_SIZE

    def segment_size(self, size: int) -> int:
        """What is asked of the device when no cached block serves a rounded `size` (`get_allocation_size`)."""
        if size <= SMALL_SIZE:
            return SMALL_SEGMENT
        if size < MIN_LARGE_ALLOC:
            return self.large_segment_size
        return -(-size // ROUND_LARGE) * ROUND_LARGE


class Block:
    """A piece of a segment. `prev`, `next`: its neighbours there. `mapped` is False where no memory is behind it."""

    __slots__ = ("address", "allocated", "mapped", "next", "pool", "prev", "size")

    def __init__(self, pool: Pool, address: int, size: int, mapped: bool = True) -> None:
        self.pool, self.address, self.size, self.mapped = pool, address, size, mapped
        self.allocated = False
        self.prev: Block | None = None
        self.next: Block | None = None


class Pool:
    """The free blocks of one stream and one of the two kinds, small (requests up to 1 MiB) or large.

    `free` is ordered by size, then address (`BlockComparatorSize`); `unmapped` by address. `page`: what an expandable
    segment of this pool grows by.
    """

    __slots__ = ("free", "page", "small", "unmapped")

    def __init__(self, small: bool, page: int) -> None:
        self.small, self.page = small, page
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []

    def insert(self, block: Block) -> None:
        insort(self.free, (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]


def cut(block: Block, size: int) -> Block:
    """Shorten `block` to `size` and return its new neighbour with the rest, in no list yet."""
    rest = Block(block.pool, block.address + size, block.size - size, block.mapped)
    rest.prev, rest.next = block, block.next
    if block.next is not None:
        block.next.prev = rest
    block.next, block.size = rest, size
    return rest


class CachingAllocator:
    """Segments of the size that was needed, one request to the device each: the default."""

    def __init__(self, options: AllocatorOptions) -> None:
        self.options = options
        self.capacity = UNLIMITED if options.capacity is None else options.capacity
        self.max_split = UNLIMITED if options.max_split_size is None else options.max_split_size
        self.allocated = self.peak_allocated = self.reserved = self.peak_reserved = self.retries = 0
        self._pools: dict[tuple[bool, int], Pool] = {}
        self._address = 0

    def malloc(self, size: int, stream: int = 0) -> Block | None:
        """A block for a rounded `size`, or None when memory is out even after giving back all that was cached."""
        small = size <= SMALL_SIZE
        pool = self._pools.get((small, stream)) or self._open_pool(small, stream)
        block = self._take_cached(pool, size) or self._take_new(pool, size) or self._retry(pool, size)
        if block is None:
            return None
        if self._should_split(block, size):
            pool.insert(cut(block, size))
        block.allocated = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Back into its pool, joined with free neighbours (`free_block`)."""
        self.allocated -= block.size
        block.allocated = False
        if block.prev is not None and not block.prev.allocated:
            self._absorb(block, block.prev)
        if block.next is not None and not block.next.allocated:
            self._absorb(block, block.next)
        block.pool.insert(block)

    def empty_cache(self) -> None:
        """Give every segment without a live block back to the device (`release_cached_blocks`)."""
        for pool in self._pools.values():
            whole = [block for _, _, block in pool.free if block.prev is None and block.next is None]
            for block in whole:
                self._release(block)

    def pools(self) -> tuple[Pool, ...]:
        return tuple(self._pools.values())

    def _open_pool(self, small: bool, stream: int) -> Pool:
        page = SMALL_SEGMENT if small else self.options.large_segment_size
        return self._pools.setdefault((small, stream), Pool(small, page))

    def _take_cached(self, pool: Pool, size: int) -> Block | None:
        """The smallest free block that is large enough, the lowest of several (`get_free_block`)."""
        index = bisect_left(pool.free, (size,))
        if index == len(pool.free) or not self._suits(pool.free[index][0], size):
            return None
        return pool.free.pop(index)[2]

    def _suits(self, found: int, size: int) -> bool:
        """A block that may not be cut serves only requests nearly as large (`get_free_block`)."""
        if size < self.max_split:
            return found < self.max_split
        return found < size + self.options.max_non_split_rounding

    def _take_new(self, pool: Pool, size: int) -> Block | None:
        """A segment of its own from the device (`alloc_block`)."""
        wanted = self.options.segment_size(size)
        if self.reserved + wanted > self.capacity:
            return None
        block = Block(pool, self._address, wanted)
        self._address += wanted
        self._reserve(wanted)
        return block

    def _retry(self, pool: Pool, size: int) -> Block | None:
        """The device is full: give cached memory back and ask again (`malloc`, `release_available_cached_blocks`)."""
        if self._release_oversize(pool, size):
            block = self._take_new(pool, size)
            if block is not None:
                return block
        self.empty_cache()
        self.retries += 1
        return self._take_new(pool, size)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Only with `max_split_size`: free blocks that may not be cut go first, just enough of them."""
        if self.max_split == UNLIMITED:
            return False
        wanted = max(size, self.max_split)
        index = bisect_left(pool.free, (wanted,))
        if index < len(pool.free):
            self._release(pool.free[index][2])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1][0] >= self.max_split:
            released += pool.free[-1][0]
            self._release(pool.free[-1][2])
        return released >= wanted

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        self.reserved -= block.size

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _should_split(self, block: Block, size: int) -> bool:
        """Whether the rest of the block is worth keeping apart (`should_split`)."""
        rest = block.size - size
        return rest >= MIN_BLOCK_SIZE if block.pool.small else rest > SMALL_SIZE and size < self.max_split

    def _absorb(self, block: Block, neighbour: Block | None) -> None:
        """Join a neighbour that is free too; the neighbour is gone afterwards (`try_merge_blocks`)."""
        if neighbour is None or neighbour.allocated or neighbour.mapped != block.mapped:
            return
        pool = block.pool
        if neighbour.mapped:
            pool.remove(neighbour)
        else:
            del pool.unmapped[bisect_left(pool.unmapped, (neighbour.address,))]
        if neighbour is block.prev:
            block.address, block.prev = neighbour.address, neighbour.prev
            if block.prev is not None:
                block.prev.next = block
        else:
            block.next = neighbour.next
            if block.next is not None:
                block.next.prev = block
        block.size += neighbour.size


class ExpandableAllocator(CachingAllocator):
    """`expandable_segments:True`: a pool is one range of addresses, and memory is put behind them page by page."""

    def empty_cache(self) -> None:
        """Take the memory from behind every page that holds no live block (`unmap_block`)."""
        for pool in self._pools.values():
            for _, _, block in list(pool.free):
                self._unmap(block)

    def _open_pool(self, small: bool, stream: int) -> Pool:
        pool = super()._open_pool(small, stream)
        pool.unmapped.append((0, Block(pool, 0, pool.page * ADDRESS_PAGES, mapped=False)))
        return pool

    def _take_cached(self, pool: Pool, size: int) -> Block | None:
        """Best fit, where a block counts with the bare addresses behind it: the growing end is taken last."""
        free = pool.free
        index = bisect_left(free, (size,))
        if index == len(free):
            return None
        while index + 1 < len(free) and _room(free[index + 1][2]) < _room(free[index][2]):
            index += 1
        return free.pop(index)[2] if self._suits(free[index][0], size) else None

    def _take_new(self, pool: Pool, size: int) -> Block | None:
        """The lowest run of free and bare addresses that is long enough (`try_allocate_expandable_block`)."""
        block = self._lowest_run(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            bare = block.next
            assert bare is not None, "a run was counted longer than it is"
            if not self._map(bare, min(bare.size, size - block.size)):
                return None
            block = bare
        pool.remove(block)
        return block

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        return False  # upstream skips blocks of expandable segments here

    def _should_split(self, block: Block, size: int) -> bool:
        return block.size - size >= MIN_BLOCK_SIZE

    def _lowest_run(self, pool: Pool, size: int) -> Block:
        """The first block of the run (`find_expandable_block`). The last bare block is endless, so there is one."""
        for _, bare in pool.unmapped:
            first = bare.prev if bare.prev is not None and not bare.prev.allocated else bare
            length, block = 0, first
            while block is not None and not block.allocated and length < size:
                length += block.size
                block = block.next  # type: ignore[assignment]
            if length >= size:
                return first
        raise AssertionError("an expandable segment ran out of addresses")

    def _map(self, bare: Block, size: int) -> bool:
        """Put whole pages behind the first `size` bytes of a bare block (`map_block`); False when memory is out."""
        pool = bare.pool
        mapped = -(-size // pool.page) * pool.page
        if self.reserved + mapped > self.capacity:
            return False
        del pool.unmapped[bisect_left(pool.unmapped, (bare.address,))]
        if mapped < bare.size:
            rest = cut(bare, mapped)
            insort(pool.unmapped, (rest.address, rest))
        bare.mapped = True
        self._absorb(bare, bare.prev)
        self._absorb(bare, bare.next)
        pool.insert(bare)
        self._reserve(mapped)
        return True

    def _unmap(self, block: Block) -> None:
        """Free the whole pages inside a free block; what is left at its ends stays mapped and free."""
        pool, page = block.pool, block.pool.page
        start = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if start >= end:
            return
        pool.remove(block)
        if block.address + block.size > end:
            pool.insert(cut(block, end - block.address))
        if block.address < start:
            whole = cut(block, start - block.address)
            pool.insert(block)
            block = whole
        block.mapped = False
        self.reserved -= block.size
        self._absorb(block, block.prev)
        self._absorb(block, block.next)
        insort(pool.unmapped, (block.address, block))


def _room(block: Block) -> int:
    """How large a block could grow in place."""
    bare = block.next
    return block.size + (bare.size if bare is not None and not bare.mapped else 0)
