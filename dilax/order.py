"""Token orders: permutations of a 2-D or 3-D grid that keep neighbours in space close in sequence.

Images, slides and videos reach attention row by row, so that a segment or a window of tokens is a
thin stripe of the grid. Along a Hilbert curve it is compact. The permutation is applied once around
a call or a model; causality and rotary embeddings go by the original positions all the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dilax._types import refuse

KINDS = ("row", "tile", "hilbert")
_MOST_TOKENS = 2**31 - 1  # positions are int32


def _sizes(name: str, sizes: Any, dims: tuple[int, ...]) -> tuple[int, ...]:
    wanted = f"{' or '.join(map(str, dims))} positive ints"
    listed = isinstance(sizes, Sequence) and not isinstance(sizes, str | bytes)
    if not listed or len(sizes) not in dims:
        raise refuse(name, wanted, sizes)
    if any(isinstance(x, bool) or not isinstance(x, int | np.integer) or x < 1 for x in sizes):
        raise refuse(name, wanted, sizes)
    return tuple(map(int, sizes))


def row_order(grid: Sequence[int]) -> np.ndarray:
    """int32 [T]: the tokens of a grid row by row, the last axis fastest: 0, 1, ..., T - 1.

    Example:
        >>> row_order((2, 3)).tolist()
        [0, 1, 2, 3, 4, 5]
    """
    return np.arange(np.prod(_sizes("grid", grid, (2, 3))), dtype=np.int32)


def tile_order(grid: Sequence[int], tile: Sequence[int]) -> np.ndarray:
    """int32 [T]: tile after tile, row by row among the tiles and within each; edge tiles are cut.

    Entry t is the original (row by row) position of the token that comes t-th.

    Example:
        >>> tile_order((2, 5), (2, 2)).tolist()
        [0, 1, 5, 6, 2, 3, 7, 8, 4, 9]
    """
    grid = _sizes("grid", grid, (2, 3))
    tile = _sizes("tile", tile, (len(grid),))
    place = np.indices(grid).reshape(len(grid), -1)
    size = np.array(tile)[:, None]
    # lexsort: the last key counts most. Within a tile the row order stays, as sorts are stable.
    return np.asarray(np.lexsort((place // size)[::-1]), np.int32)


def hilbert_order(grid: Sequence[int]) -> np.ndarray:
    """int32 [T]: the tokens of a grid along a Hilbert curve that visits each exactly once.

    Works for every 2-D or 3-D grid: sides may differ, be odd or prime. Each step goes to a
    neighbour. On a square or cube whose side is a power of two it is a Hilbert curve: every aligned
    run of 4^s (in 3-D 8^s) tokens fills a square (cube). Entry t is the original (row by row)
    position of the token that comes t-th.

    Source: Hilbert, "Ueber die stetige Abbildung einer Linie auf ein Flaechenstueck", 1891; here
    with cuts at even lengths in place of halves, so that the ends of neighbouring parts meet.

    Example:
        >>> hilbert_order((2, 3)).tolist()
        [0, 3, 4, 1, 2, 5]
    """
    grid = _sizes("grid", grid, (2, 3))
    # The main axis, along which the curve goes from end to end, is the longest. Where it is odd
    # and another is even no such path exists: then a tail about as long as wide turns to the
    # even one.
    axes = sorted(range(len(grid)), key=lambda i: -grid[i])
    main = axes[0]
    even = next((i for i in axes if grid[i] % 2 == 0), None)
    if grid[main] % 2 == 0 or even is None:
        cells = _along(grid, main)
    else:
        length = min(grid[even] - 1, grid[main] - 2)
        head, tail = list(grid), list(grid)
        head[main], tail[main] = grid[main] - length, length
        last = _along(tail, even)
        last[:, main] += head[main]
        cells = np.concatenate([_along(head, main), last])
    return np.asarray(np.ravel_multi_index(tuple(cells.T), grid), np.int32)


def _along(grid: Sequence[int], main: int) -> np.ndarray:
    """Cells [T, len(grid)] of the curve from the origin to the far end of the axis `main`."""
    others = [i for i in range(len(grid)) if i != main]
    sizes = [grid[main], *(grid[i] for i in others), 1][:3]
    cells = _curves()(*sizes)[:, : len(grid)]
    return cells[:, np.argsort([main, *others])]


def _curves() -> Callable[[int, int, int], np.ndarray]:
    """curve(w, h, d): cells [w h d, 3] of a box, from the origin to (w - 1, 0, 0).

    A box is cut into parts, each a smaller curve that is moved and turned. If w is odd and h d is
    even no path of single steps exists (colour the cells like a chess board), nor if w = 1 < h d;
    so a cut is taken only if none of its parts is such a box.
    """

    @functools.cache
    def curve(w: int, h: int, d: int) -> np.ndarray:
        if h * d == 1:
            return np.stack([np.arange(w), np.zeros(w, int), np.zeros(w, int)], axis=1)
        if h < d:
            return curve(w, d, h)[:, [0, 2, 1]]
        for parts in _cuts(w, h, d):
            if all(_has_path(sizes) for sizes, *_ in parts):
                break
        else:
            raise AssertionError(f"no cut of the box {w, h, d}")  # tests go through all small ones
        return np.concatenate([_placed(curve(*part[0]), *part[1:]) for part in parts])

    return curve


def _has_path(sizes: tuple[int, int, int]) -> bool:
    w, across = sizes[0], sizes[1] * sizes[2]
    return across == 1 or (w > 1 and (w % 2 == 0 or across % 2 == 1))


def _placed(cells: np.ndarray, start: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """Cells that begin at `start`; axis i of the part runs along axes[i] - 1, backwards if < 0."""
    placed = np.empty_like(cells)
    for i, axis in enumerate(axes):
        j = abs(axis) - 1
        placed[:, j] = start[j] + (cells[:, i] if axis > 0 else -cells[:, i])
    return placed


def _middle(n: int) -> int:
    """About half of n, and even if that leaves anything."""
    return n // 2 if n < 3 else n // 2 + n // 2 % 2


def _cuts(w: int, h: int, d: int):
    """Ways to cut a box, the best first: lists of parts (sizes, start, axes), d <= h."""
    a, b, c = _middle(w), _middle(h), _middle(d)
    halves = [((a, h, d), (0, 0, 0), (1, 2, 3)), ((w - a, h, d), (a, 0, 0), (1, 2, 3))]
    # Up in the first half of a, along, down in the second half.
    turn = [
        ((b, w // 2, d), (0, 0, 0), (2, 1, 3)),
        ((w, h - b, d), (0, b, 0), (1, 2, 3)),
        ((b, w - w // 2, d), (w - 1, b - 1, 0), (-2, -1, 3)),
    ]
    # The same in 3-D: a corner, up through d, along, down through d, the other corner.
    five = [
        ((b, a, c), (0, 0, 0), (2, 1, 3)),
        ((d, a, h - b), (0, b, 0), (3, 1, 2)),
        ((w, b, d - c), (0, b - 1, d - 1), (1, -2, -3)),
        ((d, w - a, h - b), (w - 1, b, d - 1), (-3, -1, 2)),
        ((b, w - a, c), (w - 1, b - 1, 0), (-2, -1, 3)),
    ]
    if 2 * w > 3 * h:
        yield halves
    if d > 1 and 3 * h <= 4 * d:
        yield five
    yield turn
    yield halves


@dataclasses.dataclass(frozen=True)
class TokenOrder:
    """One order of the tokens of a grid, with its exact inverse; hashable.

    Args:
        grid: sizes (rows, columns) or (frames, rows, columns); T is their product.
        kind: "hilbert", "tile" or "row".
        tile: sizes of a tile, for kind "tile" only.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.

    Example:
        >>> order = TokenOrder((2, 3))
        >>> order.positions.tolist(), order.inverse.tolist()
        ([0, 3, 4, 1, 2, 5], [0, 3, 4, 1, 2, 5])
        >>> x = jnp.arange(6.0).reshape(1, 6)
        >>> bool((order.unpermute(order.permute(x)) == x).all())
        True
    """

    grid: tuple[int, ...]
    kind: str = "hilbert"
    tile: tuple[int, ...] | None = None

    def __post_init__(self):
        grid = _sizes("grid", self.grid, (2, 3))
        if self.kind not in KINDS:
            raise refuse("kind", f"one of {', '.join(KINDS)}", self.kind)
        if np.prod(grid, dtype=object) > _MOST_TOKENS:
            raise refuse("grid", f"at most {_MOST_TOKENS} tokens", self.grid)
        object.__setattr__(self, "grid", grid)
        if self.kind == "tile":
            object.__setattr__(self, "tile", _sizes("tile", self.tile, (len(grid),)))
        elif self.tile is not None:
            raise refuse("tile", f"None with kind {self.kind!r}", self.tile)

    def __len__(self) -> int:
        return len(self.positions)

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """int32 [T]: the original (row by row) position of the token that comes t-th."""
        if self.tile is not None:
            return tile_order(self.grid, self.tile)
        return (row_order if self.kind == "row" else hilbert_order)(self.grid)

    @functools.cached_property
    def inverse(self) -> np.ndarray:
        """int32 [T]: when the token comes whose original position is t."""
        inverse = np.empty_like(self.positions)
        inverse[self.positions] = np.arange(len(inverse), dtype=inverse.dtype)
        return inverse

    def permute(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """x, T long along `axis` and row by row, in this order; differentiable."""
        return self._take("x", x, self.positions, axis)

    def unpermute(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The inverse of `permute`, bit for bit."""
        return self._take("x", x, self.inverse, axis)

    def check_length(self, name: str, x: Any, axis: int = 1) -> None:
        """Refuse an array that does not have one token per cell of the grid."""
        shape = getattr(x, "shape", ())
        if not -len(shape) <= axis < len(shape) or shape[axis] != len(self):
            raise refuse(
                name, f"{len(self)} tokens, one per cell of {self.grid}, on axis {axis}", x
            )

    def _take(self, name: str, x: Any, index: np.ndarray, axis: int) -> jax.Array:
        self.check_length(name, x, axis)

        def take(x: Any) -> Any:
            return jnp.take(x, index, axis=axis, unique_indices=True, mode="clip")

        sharding: Any = jax.typeof(x).sharding
        if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
            inside: Any = jax.sharding.auto_axes(take, out_sharding=sharding)
            return inside(x)
        return take(x)


def window_blocks(order: TokenOrder, window: Sequence[int], block_size: int) -> np.ndarray:
    """bool [rows, rows]: the blocks of tokens, in this order, that share a pair within a window.

    Two cells are within a window of odd sizes if they differ by at most half of it along every
    axis. The blocks cover the window: fewer are needed the more compact the blocks are in space.
    `dilax.block_lists.from_mask` makes the lists of them that block-sparse attention takes.

    Raises:
        ValueError: the window is not one odd size per axis, or block_size is not positive.

    Example:
        >>> [int(window_blocks(TokenOrder((64, 64), kind), (9, 9), 64).sum())
        ...  for kind in ("row", "hilbert")]
        [556, 484]
    """
    window = _sizes("window", window, (len(order.grid),))
    if any(size % 2 == 0 for size in window):
        raise refuse("window", "odd sizes", window)
    (block_size,) = _sizes("block_size", (block_size,), (1,))
    rows = -(-len(order) // block_size)
    block_of = (order.inverse // block_size).reshape(order.grid)
    reach = np.array(window) // 2
    kept = np.zeros((rows, rows), bool)
    for row in range(rows):
        tokens = order.positions[row * block_size : (row + 1) * block_size]
        place = np.stack(np.unravel_index(tokens, order.grid))
        low = np.maximum(place.min(1) - reach, 0)
        box = tuple(map(slice, low, place.max(1) + reach + 1))
        near = np.zeros(block_of[box].shape, bool)
        near[tuple(place - low[:, None])] = True
        for axis, size in enumerate(reach):
            near = _widened(near, int(size), axis)
        kept[row, block_of[box][near]] = True
    return kept


def _widened(near: np.ndarray, reach: int, axis: int) -> np.ndarray:
    """True where `near` is within `reach` along an axis."""
    length = near.shape[axis]
    count = np.cumsum(near, axis=axis, dtype=np.int32)
    place = np.arange(length)
    upper = count.take(np.minimum(place + reach, length - 1), axis=axis)
    before = place - reach - 1
    lower = count.take(np.maximum(before, 0), axis=axis)
    shape = [-1 if i == axis else 1 for i in range(near.ndim)]
    return upper - np.where((before >= 0).reshape(shape), lower, 0) > 0
