"""Pictures: which keys each query of each head sees, and how a training run went."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dilax._types import refuse
from dilax.dilated import dilated_attention
from dilax.spec import Combine, DilatedSpec, HeadOffset, as_spec, branches_of

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
SHARED = ("#8c8c8c", "#4d4d4d", "#000000")  # a key that 2, 3, more branches of one head see
LONGEST = 1024  # more tokens than this have no picture that can be read
MOST_HEADS = 16
COLUMNS = 256  # the largest head dim


def _counts(spec: DilatedSpec, length: int, num_heads: int, options: Mapping[str, Any]):
    """[N, T, S]: how often each head's softmax counts each key.

    With queries and keys of 0 every visible key has logit 0, so exp(lse) is the number of keys and
    the output on one-hot values times that is how often each one counts. So the picture shows what
    the attention function does, not what this file believes.
    """
    width = min(-(-length // 8) * 8, COLUMNS)
    zeros = jnp.zeros((1, length, num_heads, width), jnp.float32)

    @jax.jit
    def weights(value):
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
        return out * jnp.exp(lse)[..., None]

    parts = []
    for first in range(0, length, width):
        one_hot = np.eye(length, width, -first, np.float32)[None, :, None]
        parts.append(np.asarray(weights(jnp.broadcast_to(one_hot, zeros.shape)))[0])
    counts = np.concatenate(parts, axis=-1)[..., :length]
    return np.rint(counts).astype(int).swapaxes(0, 1)


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
    if not 1 <= length <= LONGEST:
        raise refuse("length", f"1 to {LONGEST} tokens", length)
    if not 1 <= num_heads <= MOST_HEADS:
        raise refuse("num_heads", f"1 to {MOST_HEADS} heads", num_heads)
    branches = branches_of(spec, num_heads, combine, head_offset)
    options = dict(combine=combine, head_offset=head_offset, is_causal=is_causal)
    if combine == "heads":  # each head has one branch, so one call shows them all
        counts = _counts(spec, length, num_heads, options)
        own = np.zeros((len(branches), num_heads, 1, 1), bool)
        for i, branch in enumerate(branches):
            own[i, branch.first_head : branch.first_head + len(branch.offsets)] = True
        return own & (counts > 0)
    alone = (DilatedSpec((w,), (r,)) for w, r, *_ in branches)
    return np.stack([_counts(one, length, num_heads, options) > 0 for one in alone])


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

    A row of a panel is a query, a column a key. Arguments as `pattern`.

    Example:
        >>> figure = draw_pattern([8, 16], [1, 2], length=16, num_heads=2)
        >>> len(figure.axes)  # two heads, all heads
        3
    """
    spec = as_spec(segment_lengths, dilation_rates)
    seen = pattern(
        spec,
        length=length,
        num_heads=num_heads,
        combine=combine,
        head_offset=head_offset,
        is_causal=is_causal,
    )
    columns = min(num_heads + 1, 5)
    rows = -(-(num_heads + 1) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.45 * rows + 0.9), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for head, panel in enumerate(panels[:num_heads]):
        _draw_head(panel, seen[:, head])
        panel.set_title(f"head {head}", fontsize=9)
    _draw_union(panels[num_heads], seen.any(axis=0).sum(axis=0), num_heads)
    for panel in panels[num_heads + 1 :]:
        figure.delaxes(panel)
    panels[0].set_ylabel("query", fontsize=9)
    names = [
        f"segment {w}, rate {r}"
        for w, r in zip(spec.segment_lengths, spec.dilation_rates, strict=True)
    ]
    names += [f"{m} branches" for m in range(2, int(seen.sum(axis=0).max()) + 1)]
    colours = _colours(len(spec))
    handles = [Patch(color=c, label=n) for c, n in zip(colours, names, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    causal = "causal" if is_causal else "not causal"
    offset = f", {head_offset} offsets" if combine == "lse" else ""
    figure.suptitle(f'{length} tokens, combine="{combine}"{offset}, {causal}', fontsize=10)
    return figure


def _colours(branches: int) -> list[str]:
    """One colour per branch, then one per number of branches from 2 on."""
    alone = [COLOURS[i % len(COLOURS)] for i in range(branches)]
    return alone + [SHARED[min(m, len(SHARED) - 1)] for m in range(branches - 1)]


def _draw_head(panel: Any, seen: np.ndarray) -> None:
    """seen [branches, T, S]: a cell has the colour of its branch, or of how many there are."""
    number = seen.sum(axis=0)
    alone = np.where(seen, np.arange(1, len(seen) + 1)[:, None, None], 0).sum(axis=0)
    cells = np.where(number > 1, len(seen) + number - 1, alone)
    colours = _colours(len(seen))
    _image(panel, cells, ListedColormap(["white", *colours]), len(colours))


def _draw_union(panel: Any, heads: np.ndarray, num_heads: int) -> None:
    """heads [T, S]: how many heads see the key; darker is more."""
    _image(panel, heads, "Greys", num_heads)
    blind = int((heads == 0).all(axis=1).sum())
    note = f"\n{blind} queries see nothing" if blind else ""
    panel.set_title(f"all heads, darker is more{note}", fontsize=9)


def _image(panel: Any, cells: np.ndarray, colormap: Any, most: int) -> None:
    panel.imshow(cells, cmap=colormap, vmin=0, vmax=most, interpolation="nearest")
    panel.set_xlabel("key", fontsize=9)
    panel.tick_params(labelsize=7, length=2)
    ticks = np.unique(np.linspace(0, len(cells) - 1, 5).astype(int))
    panel.set_xticks(ticks)
    panel.set_yticks(ticks)


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
        panel.axhline(value, label=f"{name}: {value:.3f}", color=SHARED[1], linestyle=style)
    panel.set_xlabel("step")
    panel.set_ylabel("bits per byte")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure
