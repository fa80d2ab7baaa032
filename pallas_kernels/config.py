"""Tile sizes and launch plans: pure functions of device, dtype, head size and lengths."""

import dataclasses
import itertools

from pallas_kernels import schedule
from pallas_kernels.compat import plgpu

# Of one Hopper multiprocessor, less barriers, and reductions or words for other warpgroups.
REDUCTION_BYTES = 2048
SHARED_BYTES = 232448 - 1024 - REDUCTION_BYTES
ROWS = 64
CONSUMERS = 2
# Of the largest table that says where tiles look: part of the program, read by all blocks.
TABLE_BYTES = 32 << 20
# (away rows, stages, consumers) for heads of which little fits shared memory.
WIDE_TILES = ((64, 2), (64, 1), (64, 2, 1), (64, 1, 1))
# Heads up to which there are registers for 128 scores of a row beside their exponentials.
LAZY = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes of a kernel.

    away: rows of an away tile. stages: how many of them are in flight. consumers: warpgroups that
    compute, with ROWS home rows each. overlap, lazy: see `online_softmax.Warpgroup`. stagings:
    tiles of shared memory that results leave from.
    """

    away: int
    stages: int
    consumers: int = CONSUMERS
    overlap: bool = False
    stagings: int = 1
    lazy: bool = False


def is_hopper(device_kind: str) -> bool:
    """Whether a `jax.Device.device_kind` names a Hopper GPU.

    Example:
        >>> is_hopper("NVIDIA H100 80GB HBM3"), is_hopper("NVIDIA A100-SXM4-80GB")
        (True, False)
    """
    return any(name in device_kind for name in ("H100", "H200", "H800", "GH200", "H20"))


def multiprocessors(device_kind: str) -> int:
    """Blocks of the persistent grid: one for each multiprocessor.

    Example:
        >>> multiprocessors("NVIDIA H200")
        132
    """
    if "H20" in device_kind and "H200" not in device_kind and "GH200" not in device_kind:
        return 78
    return 114 if "PCIe" in device_kind else 132


def set_registers(consumers: int, *, computes: bool) -> None:
    """Moves registers from the warpgroup that copies to those that compute, inside a kernel.

    Two warpgroups have as many as a thread can name from the beginning: nothing moves then.
    """
    if consumers == 1:
        return
    most, least = (240, 24) if consumers == 2 else (160, 32)
    if computes:
        plgpu.set_max_registers(most, action="increase")
    else:
        plgpu.set_max_registers(least, action="decrease")


def queries_apart(head_dim: int) -> bool:
    """Whether a warpgroup of its own computes the queries' gradient in the fused backward.

    It has the registers for it at the expense of the others, which then cannot begin two products
    of scores at once: short products of small heads are slower that way.
    """
    return head_dim > 64


def first_apart(head_dim: int) -> bool:
    """Whether the first launch of a series forward, which continues nothing, has its own program.

    What it would share takes short steps of small heads 4 % of their time; others do not notice.
    """
    return head_dim <= 64


def set_fused_registers(head_dim: int, role: str) -> None:
    """As `set_registers`, in the fused backward; role: "keys", "queries" or "copies"."""
    keys, queries = (208, 72) if queries_apart(head_dim) else (240, 0)
    if role == "keys":
        plgpu.set_max_registers(keys, action="increase")
    else:
        plgpu.set_max_registers(queries if role == "queries" else 24, action="decrease")


def _first_fit(
    options: tuple[tuple[int, ...], ...], home_row: int, away_row: int, room: int = SHARED_BYTES
) -> Blocks | None:
    for away, stages, consumers in ((*option, CONSUMERS)[:3] for option in options):
        if consumers * ROWS * home_row + away * stages * away_row <= room:
            return Blocks(away, stages, consumers)
    return None


def forward_blocks(
    head_dim: int,
    out_bytes: int,
    length: int,
    *,
    causal: bool,
    marks: int,
    dropout: bool = False,
) -> Blocks | None:
    """Tiles of the forward kernel, or None if none fits shared memory.

    out_bytes: size of one output element (4 when a float32 partial result is continued). length:
    dilated rows of the shortest segment. marks: int32 vectors that travel with the keys.

    Example:
        >>> forward_blocks(128, 2, 2048, causal=True, marks=0)
        Blocks(away=128, stages=2, consumers=2, overlap=True, stagings=1, lazy=True)
    """
    # Small heads are bound by exponentials, not by products: more warpgroups or longer tiles help,
    # for which there are no registers where maxima are looked for rarely; with causality or short
    # segments that, and shorter tiles, is better. 192 rows a tile waste too much of short segments.
    options = ((128, 2), *WIDE_TILES)
    lazy = causal or head_dim > 64 or length < 2048
    lazy = lazy and head_dim <= LAZY and not (marks or dropout)
    if lazy and head_dim <= 64:
        options = ((64, 4, 3) if length >= 4096 else (128, 3), *options)
    elif head_dim <= 64 and length >= 4096:
        options = ((128, 2, 3), *options)
    elif head_dim <= 64 and not causal:
        options = ((256, 2), *options)
    elif head_dim <= 96:
        options = ((128, 3), *options)
    elif head_dim > 128:
        options = options[1:]
    blocks = _first_fit(options, head_dim * (2 + out_bytes), 2 * 2 * head_dim + 4 * marks)
    if blocks is None:
        return None
    overlap = head_dim > 64 or blocks.consumers > 2 or lazy
    return dataclasses.replace(blocks, overlap=overlap, lazy=lazy)


def queries_blocks(head_dim: int, marks: int, out_bytes: int = 2) -> Blocks | None:
    """Away (key) tile of the queries' gradient kernel, or None if none fits.

    out_bytes: size of one gradient element.

    Example:
        >>> queries_blocks(128, marks=0)
        Blocks(away=128, stages=2, consumers=2, overlap=False, stagings=1, lazy=False)
    """
    options = ((128, 2), *WIDE_TILES)
    home_row, away_row = head_dim * (2 * 2 + out_bytes), 2 * 2 * head_dim + 4 * marks
    return _first_fit(options[head_dim > 128 :], home_row, away_row)


def keys_blocks(head_dim: int, marks: int, out_bytes: int = 2) -> Blocks | None:
    """Away (query) tile of the keys' and values' gradient kernel, or None if none fits.

    out_bytes: size of one gradient element (4 while several launches add to it).

    Example:
        >>> keys_blocks(64, marks=0)
        Blocks(away=64, stages=2, consumers=2, overlap=False, stagings=2, lazy=False)
    """
    per_row = 2 * 2 * head_dim + 4 * marks
    for consumers, stages, stagings in ((2, 2, 2), (2, 2, 1), (2, 1, 1), (1, 1, 1)):
        home_row = head_dim * (2 * 2 + stagings * out_bytes)
        if consumers * ROWS * home_row + per_row * 64 * stages <= SHARED_BYTES:
            return Blocks(64, stages, consumers, stagings=stagings)
    return None


def candidates(kernel: str, head_dim: int, marks: int = 0) -> tuple[Blocks, ...]:
    """Tile sizes of a kernel (as in `flash.attend`'s tiles) that may fit shared memory.

    Example:
        >>> [(b.away, b.stages) for b in candidates("queries", 128)][-3:]
        [(128, 2), (192, 1), (256, 1)]
    """
    options = itertools.product((64, 128, 192, 256), (1, 2, 3, 4))
    if kernel == "forward":
        choices = itertools.product((2, 3), (False, True), {False, head_dim <= LAZY})
        kinds = [(consumers, overlap, 1, lazy) for consumers, overlap, lazy in choices]
    else:
        kinds = [(2, False, n, False) for n in ((1, 2) if kernel == "keys" else (1,))]
    # Rows of 16-bit elements that a home row holds: what it reads, and what it is written from.
    held = {"forward": 2, "queries": 3, "keys": 2, "fused": 2}[kernel]
    found = []
    for (away, stages), kind in itertools.product(options, kinds):
        consumers, _, stagings, _ = kind
        rows = held + (stagings if kernel == "keys" else 0)
        used = consumers * ROWS * rows * head_dim * 2
        used += away * stages * (2 * 2 * head_dim + 4 * marks)
        if used <= SHARED_BYTES and (kernel != "fused" or away == _fused_away(head_dim)):
            found.append(Blocks(away, stages, *kind))
    return tuple(found)


def lanes(block_size: int) -> int:
    """Lists that a tile of 128 rows over block lists follows: with small blocks two, of 64 rows.

    Example:
        >>> lanes(64), lanes(256)
        (2, 1)
    """
    return CONSUMERS if block_size < CONSUMERS * ROWS else 1


def _fused_away(head_dim: int) -> int:
    # More does not fit the registers. Two warpgroups take half the rows of the queries' gradient
    # each; one that is apart has registers for half its columns at once.
    return ROWS if queries_apart(head_dim) else CONSUMERS * ROWS


def fused_blocks(head_dim: int, marks: int = 1) -> Blocks | None:
    """Away (query) tile of the fused backward kernel, or None if it does not take this head size.

    marks: int32 vectors that travel with the queries. Heads between 64 and 128 do not split in two
    where tiles of shared memory do.

    Example:
        >>> fused_blocks(128)
        Blocks(away=64, stages=2, consumers=2, overlap=False, stagings=1, lazy=False)
    """
    if head_dim > 64 and head_dim != 128:
        return None
    home, away, stages = CONSUMERS * ROWS, _fused_away(head_dim), 2
    used = home * head_dim * 2 * 2 + stages * away * (head_dim * 2 * 2 + 4 * 2)
    used += stages * home * away * 2 + home * min(head_dim, 64) * 4 + home * head_dim * 2
    # It reduces nothing, but has more barriers and small rings than others, that of a mark too.
    used += max(0, marks - 1) * stages * away * 4
    return Blocks(away, stages) if used <= SHARED_BYTES + REDUCTION_BYTES // 2 else None


def block_forward_blocks(
    head_dim: int,
    block_size: int,
    out_bytes: int,
    marks: int,
    *,
    dropout: bool = False,
    whole: bool = False,
) -> Blocks | None:
    """Away (key) tile of the forward kernel over block lists, or None if none fits.

    marks: int32 vectors that travel with the keys. whole: nothing inside a block is hidden or
    dropped. Small heads then take 256 keys a step, as in `forward_blocks`.

    Example:
        >>> block_forward_blocks(128, 128, 2, marks=0)
        Blocks(away=128, stages=2, consumers=2, overlap=True, stagings=1, lazy=True)
    """
    home_row = head_dim * (2 + out_bytes)
    away_row = (2 * 2 * head_dim + 4 * marks) * lanes(block_size)
    options = _key_tiles(head_dim, block_size)
    if whole and head_dim <= 64 and (block_size == 128 or block_size % 256 == 0):
        options = ((256, 2), *options)
    blocks = _first_fit(options, home_row, away_row)
    if blocks is None:
        return None
    lazy = head_dim <= LAZY and blocks.away <= 128 and not (marks or dropout)
    return dataclasses.replace(blocks, overlap=head_dim > 64 or lazy, lazy=lazy)


def block_queries_blocks(head_dim: int, block_size: int, marks: int) -> Blocks | None:
    """Away (key) tile of the queries' gradient over block lists, or None if none fits.

    Example:
        >>> block_queries_blocks(128, 64, marks=0)
        Blocks(away=64, stages=2, consumers=2, overlap=False, stagings=1, lazy=False)
    """
    away_row = (2 * 2 * head_dim + 4 * marks) * lanes(block_size)
    return _first_fit(_key_tiles(head_dim, block_size), head_dim * 2 * 3, away_row)


def block_fused_blocks(head_dim: int, block_size: int, marks: int) -> Blocks | None:
    """Away (query) tile of the fused backward over block lists, or None if two passes do it.

    Both warpgroups add to one gradient of queries, so they must follow one list. At H=128 there is
    room for one mark.

    Example:
        >>> block_fused_blocks(128, 256, 1).away, block_fused_blocks(128, 64, 1)
        (64, None)
    """
    return fused_blocks(head_dim, marks) if lanes(block_size) == 1 else None


def _key_tiles(head_dim: int, block_size: int) -> tuple[tuple[int, int], ...]:
    small = ((64, 3), (64, 2), (64, 1))
    if block_size < 128:
        return ((64, 4), *small) if head_dim <= 64 else small
    if head_dim > 128:
        return small
    # Smaller tiles only where whole ones do not fit twice.
    return ((128, 3), (128, 2), *small) if head_dim <= 96 else ((128, 2), *small)


def block_keys_blocks(head_dim: int, block_size: int, marks: int) -> Blocks | None:
    """Away (query) tile of the keys' and values' gradient over block lists, or None if none fits.

    Example:
        >>> block_keys_blocks(128, 128, marks=0)
        Blocks(away=64, stages=2, consumers=2, overlap=False, stagings=1, lazy=False)
    """
    away_row = (2 * 2 * head_dim + 8 + 4 * marks) * lanes(block_size)
    return _first_fit(
        ((64, 2), (64, 1)), head_dim * 2 * 3, away_row, SHARED_BYTES + REDUCTION_BYTES
    )


def partition(launch: schedule.Launch) -> tuple[tuple[int, ...], ...]:
    """Splits the branches of a launch into groups that run one after the other.

    Branches of one group share a tile, whose rows are stepped by the group's common stride, so
    that nothing is read back and merged; but such a tile spans more positions, and what causality
    or unaligned segments hide from only part of it is computed in vain. Takes the cheapest of the
    partitions that run some first branches alone and the rest together.

    Very long calls never share, for the size of the table; nor do causal calls: on an H100 that was
    slower, for the masked steps that it adds.

    Returns tuples of indices into launch.rates.
    """
    count = len(launch.rates)
    singles = tuple((i,) for i in range(count))
    table = 4 * schedule.FIELDS * count * launch.stride * launch.tiles
    if count == 1 or launch.causal or table > TABLE_BYTES:
        return singles
    candidates = [singles]
    for alone in range(count - 1):
        candidates.append((*singles[:alone], tuple(range(alone, count))))

    def cost(groups: tuple[tuple[int, ...], ...]) -> float:
        total = 0.0
        for group in groups:
            part = subset(launch, group)
            rows = schedule.participation(part) != 0
            total += schedule.steps(part).sum()
            if not part.gaps and schedule.knows_starts(part):
                # Masks take time, above all those of several branches.
                total += 0.5 * schedule.of_heads(part, schedule.masked_steps(part)).sum()
            # A tile costs its start and end (2 steps), a launch its ramp (4 steps a block).
            total += 2.0 * rows.sum() * part.tiles + 4.0 * 132
        return total

    return min(candidates, key=cost)


def subset(launch: schedule.Launch, group: tuple[int, ...]) -> schedule.Launch:
    """The launch of some branches only, with their own common stride."""
    names = ("rates", "lengths", "offsets", "numbers", "phases")
    parts = {name: tuple(getattr(launch, name)[i] for i in group) for name in names}
    return dataclasses.replace(launch, **parts, stride=schedule.common_stride(parts["rates"]))
