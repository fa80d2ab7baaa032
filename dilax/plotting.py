"""Pictures: which keys each query of each head sees, which blocks, how a training run went."""

import colorsys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dilax._types import refuse
from dilax.block_lists import admissible, partial_blocks
from dilax.dilated import dilated_attention
from dilax.order import TokenOrder, window_blocks
from dilax.pattern_config import as_pattern
from dilax.spec import Combine, DilatedSpec, HeadOffset, as_spec, branches_of

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
GREY = "#4d4d4d"
LONGEST_EXACT = 1024  # tokens: `pattern` has a number for every pair of them
LONGEST = 65536  # tokens of a picture
CELLS = 256  # rows and columns of a panel: what more tokens there are share them
MOST_HEADS = 16  # panels; further heads are counted, not drawn
_COLUMNS = 256  # the largest head dim
_NUMBERS = 2**24  # of one call's values


def _seen(spec: DilatedSpec, length: int, num_heads: int, cell: int, options: Mapping[str, Any]):
    """Does a query in a cell of cell x cell tokens see a key in it: bool [N, P, P]; and which
    queries see any key: bool [N, T].

    With queries and keys of 0 every visible key has logit 0, so exp(lse) is the number of keys and
    the output on one-hot values times that is how often each one counts. So the picture shows what
    the attention function does, not what this file believes. Keys of one cell share a value.
    """
    panel = -(-length // cell)
    width = min(-(-panel // 8) * 8, _COLUMNS, max(8, _NUMBERS // (length * num_heads) // 8 * 8))

    @jax.jit
    def cells(first):
        zeros = jnp.zeros((1, length, num_heads, width), jnp.float32)
        columns = jnp.arange(length)[:, None] // cell == first + jnp.arange(width)[None]
        value = jnp.broadcast_to(columns[None, :, None].astype(jnp.float32), zeros.shape)
        out, lse = dilated_attention(
            zeros,
            zeros,
            value,
            spec,
            average_branches=False,
            implementation="xla",
            return_lse=True,
            **options,
        )
        counted = (out * jnp.exp(lse)[..., None])[0] > 0.5
        padded = jnp.pad(counted, ((0, panel * cell - length), (0, 0), (0, 0)))
        rows = padded.reshape(panel, cell, num_heads, width).any(axis=1)
        return rows.swapaxes(0, 1), jnp.isfinite(lse[0]).T

    parts, awake = [], None
    for first in range(0, panel, width):
        part, awake = cells(first)
        parts.append(np.asarray(part))
    return np.concatenate(parts, axis=-1)[..., :panel], np.asarray(awake)


def _cells(
    spec: DilatedSpec, length: int, num_heads: int, cell: int, options: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """As `_seen`, per branch: bool [branches, N, P, P]; and which queries any branch sees."""
    branches = branches_of(spec, num_heads, options["combine"], options["head_offset"])
    if options["combine"] == "heads":  # each head has one branch, so one call shows them all
        seen, awake = _seen(spec, length, num_heads, cell, options)
        own = np.zeros((len(branches), num_heads, 1, 1), bool)
        for i, branch in enumerate(branches):
            own[i, branch.first_head : branch.first_head + len(branch.offsets)] = True
        return own & seen, awake
    alone = (DilatedSpec((w,), (r,)) for w, r, *_ in branches)
    parts = [_seen(one, length, num_heads, cell, options) for one in alone]
    return np.stack([seen for seen, _ in parts]), np.any([awake for _, awake in parts], axis=0)


def pattern(
    segment_lengths: Any,
    dilation_rates: Any = None,
    *,
    length: int,
    num_heads: int,
    combine: Combine = "lse",
    head_offset: HeadOffset = "interleaved",
    is_causal: bool = False,
) -> np.ndarray:
    """Who sees whom: bool [branches, N, T, S], read off `dilax.dilated_attention` itself.

    Raises:
        ValueError: an argument is wrong, or length is not between 1 and 1024.

    Example:
        >>> seen = pattern([4, 8], [1, 2], length=8, num_heads=2, is_causal=True)
        >>> seen[1, 1].astype(int)[7].tolist()  # branch (8, 2), head 1, the last query
        [0, 1, 0, 1, 0, 1, 0, 1]
    """
    spec = as_spec(segment_lengths, dilation_rates)
    _check_sizes(length, num_heads, LONGEST_EXACT)
    options = dict(combine=combine, head_offset=head_offset, is_causal=is_causal)
    return _cells(spec, length, num_heads, 1, options)[0]


def _check_sizes(length: int, num_heads: int, longest: int) -> None:
    if not 1 <= length <= longest:
        raise refuse("length", f"1 to {longest} tokens", length)
    if num_heads < 1:
        raise refuse("num_heads", "a positive int", num_heads)


def _distinct_heads(
    spec: DilatedSpec, num_heads: int, combine: Combine, head_offset: HeadOffset
) -> list[int]:
    """The first heads that differ in branches or offsets from every head before them."""
    first: dict[Any, int] = {}
    branches = branches_of(spec, num_heads, combine, head_offset)
    for head in range(num_heads):
        mine = tuple(
            (i, b.offsets[head - b.first_head])
            for i, b in enumerate(branches)
            if 0 <= head - b.first_head < len(b.offsets)
        )
        first.setdefault(mine, head)
    return list(first.values())


def draw_pattern(
    segment_lengths: Any,
    dilation_rates: Any = None,
    *,
    length: int,
    num_heads: int,
    combine: Combine = "lse",
    head_offset: HeadOffset = "interleaved",
    is_causal: bool = False,
) -> Figure:
    """A figure of the pattern: one panel per head, and one that counts the heads.

    A row of a panel is a query, a column a key. Of more than 256 tokens a panel's cell stands for
    several queries and keys; it is coloured where any of these queries sees any of these keys. Of
    more than 16 heads the first 16 that differ are drawn; the last panel counts all.

    Arguments as `pattern`, with a length up to 65536.

    Example:
        >>> figure = draw_pattern([8, 16], [1, 2], length=16, num_heads=2)
        >>> len(figure.axes)  # two heads, all heads
        3
    """
    spec = as_spec(segment_lengths, dilation_rates)
    _check_sizes(length, num_heads, LONGEST)
    heads, cell = list(range(num_heads)), -(-length // CELLS)
    if num_heads > MOST_HEADS:
        heads = _distinct_heads(spec, num_heads, combine, head_offset)[:MOST_HEADS]
    options = dict(combine=combine, head_offset=head_offset, is_causal=is_causal)
    seen, awake = _cells(spec, length, num_heads, cell, options)
    columns = min(len(heads) + 1, 5)
    rows = -(-(len(heads) + 1) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.45 * rows + 0.9), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for head, panel in zip(heads, panels, strict=False):
        _draw_head(panel, seen[:, head], cell)
        panel.set_title(f"head {head}", fontsize=9)
    blind = length - int(awake.any(axis=0).sum())
    _draw_union(panels[len(heads)], seen.any(axis=0).sum(axis=0), num_heads, blind, cell)
    for panel in panels[len(heads) + 1 :]:
        figure.delaxes(panel)
    panels[0].set_ylabel("query", fontsize=9)
    names = [
        f"segment {w}, rate {r}"
        for w, r in zip(spec.segment_lengths, spec.dilation_rates, strict=True)
    ]
    names += [f"{m} branches" for m in range(2, int(seen[:, heads].sum(axis=0).max()) + 1)]
    colours = _colours(len(spec))
    handles = [Patch(color=c, label=n) for c, n in zip(colours, names, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    causal = "causal" if is_causal else "not causal"
    offset = f", {head_offset} offsets" if combine == "lse" else ""
    title = f'{length} tokens, combine="{combine}"{offset}, {causal}'
    notes = []
    if len(heads) < num_heads:
        notes.append(f"{len(heads)} of {num_heads} heads")
    if cell > 1:
        notes.append(f"a cell: any of {cell} queries sees any of {cell} keys")
    figure.suptitle("\n".join([title, *([", ".join(notes)] if notes else [])]), fontsize=10)
    return figure


def _colours(branches: int) -> list[str]:
    """One colour per branch, then one per number of branches from 2 on."""
    hues = (i * 0.618 % 1 for i in range(branches - len(COLOURS)))
    more = [to_hex(colorsys.hsv_to_rgb(hue, 0.6, 0.7)) for hue in hues]
    greys = [to_hex(str(x)) for x in np.linspace(0.7, 0, branches - 1)]
    return [*COLOURS[:branches], *more, *greys]


def _draw_head(panel: Any, seen: np.ndarray, cell: int) -> None:
    """seen [branches, P, P]: a cell has the colour of its branch, or of how many there are."""
    number = seen.sum(axis=0)
    alone = np.where(seen, np.arange(1, len(seen) + 1)[:, None, None], 0).sum(axis=0)
    cells = np.where(number > 1, len(seen) + number - 1, alone)
    colours = _colours(len(seen))
    _image(panel, cells, ListedColormap(["white", *colours]), len(colours), cell)


def _draw_union(panel: Any, heads: np.ndarray, num_heads: int, blind: int, cell: int) -> None:
    """heads [P, P]: how many heads see the key; darker is more."""
    _image(panel, heads, "Greys", num_heads, cell)
    note = f"\n{blind} queries see nothing" if blind else ""
    panel.set_title(f"all heads, darker is more{note}", fontsize=9)


def _image(panel: Any, cells: np.ndarray, colormap: Any, most: int, cell: int) -> None:
    end = len(cells) * cell - 0.5
    panel.imshow(
        cells,
        cmap=colormap,
        vmin=0,
        vmax=most,
        interpolation="nearest",
        extent=(-0.5, end, end, -0.5),
    )
    panel.set_xlabel("key", fontsize=9)
    panel.tick_params(labelsize=7, length=2)
    ticks = np.unique(np.linspace(0, len(cells) * cell - 1, 5).astype(int))
    panel.set_xticks(ticks)
    panel.set_yticks(ticks)


def draw_orders(orders: Sequence[TokenOrder], window: Sequence[int], block_size: int) -> Figure:
    """Token orders of one 2-D grid, and the blocks that a window keeps in each.

    Above, the grid in the colours of the order, from dark to light; below, the kept blocks, a row
    of blocks of queries and a column of keys.

    Raises:
        ValueError: there is no order, or a grid is not 2-D.

    Example:
        >>> figure = draw_orders([TokenOrder((64, 64), "row"), TokenOrder((64, 64))], (9, 9), 64)
        >>> [panel.get_title() for panel in figure.axes[2:]]
        ['556 of 4096 blocks', '484 of 4096 blocks']
    """
    if not orders or any(len(order.grid) != 2 for order in orders):
        raise refuse("orders", "at least one order of a 2-D grid", orders)
    count = len(orders)
    figure = Figure(figsize=(2.5 * count, 5.4), dpi=150, layout="constrained")
    panels = figure.subplots(2, count, squeeze=False)
    for order, (above, below) in zip(orders, panels.T, strict=True):
        above.imshow(order.inverse.reshape(order.grid), cmap="viridis", interpolation="nearest")
        tile = "" if order.tile is None else " " + " x ".join(map(str, order.tile))
        above.set_title(f"{order.kind}{tile}", fontsize=9)
        kept = window_blocks(order, window, block_size)
        below.imshow(kept, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        below.set_title(f"{kept.sum()} of {kept.size} blocks", fontsize=9)
        below.set_xlabel("key block", fontsize=9)
        for panel in (above, below):
            panel.tick_params(labelsize=7, length=2)
    panels[1, 0].set_ylabel("query block", fontsize=9)
    grid, sides = (" x ".join(map(str, x)) for x in (orders[0].grid, window))
    figure.suptitle(f"grid {grid}, window {sides}, blocks of {block_size} tokens", fontsize=10)
    return figure


def draw_blocks(
    pattern: Any, *, length: int, num_heads: int = 1, is_causal: bool = False
) -> Figure:
    """A figure of a block pattern: one panel per group of heads that has a pattern of its own.

    A row of a panel is a block of queries, a column one of keys, shaded where causality leaves
    nothing. pattern: as in `dilax.block_sparse_attention`.

    Example:
        >>> figure = draw_blocks("local", length=1024, is_causal=True)
        >>> figure.axes[0].get_title()
        '70 of 136 blocks'
    """
    _check_sizes(length, num_heads, LONGEST)
    made = as_pattern("pattern", pattern)
    lists = made.lists(length, num_heads=num_heads, is_causal=is_causal)
    kept, cut = lists.kept(), partial_blocks(lists, length, length, is_causal)
    limit = admissible(length, length, lists.block_size, is_causal)
    groups = made.head_groups()
    shown = [i * lists.counts.shape[1] // groups for i in range(groups)][:MOST_HEADS]
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3 * columns + 1, 3 * rows + 1.2), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    colours = ["white", "#e6e6e6", COLOURS[0], COLOURS[4]]
    for panel, n in zip(panels, shown, strict=False):
        cells = (np.arange(len(limit)) >= limit[:, None]).astype(int)
        mine = kept.head == n
        cells[kept.row[mine], kept.column[mine]] = 2 + cut[mine]
        _image(panel, cells, ListedColormap(colours), len(colours) - 1, lists.block_size)
        panel.set_title(f"{mine.sum()} of {limit.sum()} blocks", fontsize=9)
    for panel in panels[len(shown) :]:
        figure.delaxes(panel)
    panels[0].set_ylabel("query", fontsize=9)
    names = ("kept", "kept, masked in part", *(("in the future",) if is_causal else ()))
    handles = [
        Patch(color=c, label=n) for c, n in zip(colours[2:] + colours[1:2], names, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    density = made.density(length, is_causal=is_causal)
    causal = "causal" if is_causal else "not causal"
    size = lists.block_size
    figure.suptitle(
        "\n".join(
            [
                *textwrap.wrap(str(made), 48 * columns),
                f"{length} tokens in blocks of {size}, {causal}, {density:.1%} kept",
            ]
        ),
        fontsize=8,
    )
    return figure


def draw_training(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Bits per byte against steps: curves of (steps, values), and level lines to compare with.

    Example:
        >>> figure = draw_training({"training": ([1, 2], [8.0, 4.0])}, {"byte bigrams": 3.9})
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['training', 'byte bigrams: 3.900']
    """
    figure = Figure(figsize=(6, 3.4), dpi=150, layout="constrained")
    panel = figure.subplots()
    for (name, (steps, values)), colour in zip(curves.items(), COLOURS, strict=False):
        marker = "o" if len(steps) < 30 else None
        panel.plot(steps, values, label=name, color=colour, marker=marker, markersize=3)
    for (name, value), style in zip((levels or {}).items(), ("--", ":", "-."), strict=False):
        panel.axhline(value, label=f"{name}: {value:.3f}", color=GREY, linestyle=style)
    panel.set_xlabel("step")
    panel.set_ylabel("bits per byte")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure
