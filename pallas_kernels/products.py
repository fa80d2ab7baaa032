"""Products of tiles that have more columns than a head: without those past its end.

Mosaic multiplies tiles whole. A kernel says at its start how many columns its heads have; of each
product that sums over columns, or gives some, only the steps and the columns that count are then
computed. The other columns of a sum keep what they held: the zeros that it started with.
"""

import contextvars
from typing import Any

import numpy as np

from pallas_kernels.compat import (
    instructions_of_products,
    lowering_rules,
    plgpu,
    product_primitive,
)

# Of the product that is lowered now, in this thread; None: all.
_COLUMNS: contextvars.ContextVar[int | None] = contextvars.ContextVar("columns", default=None)
_ATTRIBUTE = "dilax_columns"
# Of the elements that a tensor core instruction sums over, and of columns of its result.
STEP, GROUP = 16, 8


def multiply_columns(columns: int, interpret: bool) -> None:
    """Makes all products that follow in the kernel leave out columns of tiles past the first ones.

    columns: of heads. They lie along rows of the tiles: a product with one transposed sums over
    them, any other gives them.
    """
    if interpret:
        return

    @plgpu.inline_mgpu()
    def emit(context: Any) -> None:
        setattr(context, _ATTRIBUTE, columns)

    emit()


def _instructions(acc: Any, a: Any, b: Any, *, b_transpose: bool, **options: Any) -> Any:
    """Those of 64 rows, and of as many summands as a row of the swizzle has."""
    columns = _COLUMNS.get()
    if columns is None:
        return _whole(acc, a, b, b_transpose=b_transpose, **options)
    if not b_transpose:  # Pallas transposed it: what it sums over lies along rows
        row_bytes = min(options["swizzle"], -(-columns // STEP) * STEP * 2)
        return _whole(acc, a, b, b_transpose=False, **options | {"swizzle": row_bytes})
    n = min(options["n"], -(-columns // GROUP) * GROUP)
    done = _whole(acc[:, : n // GROUP], a, b, b_transpose=True, **options | {"n": n})
    return np.concatenate([done, acc[:, n // GROUP :]], axis=1)


def _lowered(context: Any, *args: Any, **options: Any) -> Any:
    """A product in a kernel."""
    token = _COLUMNS.set(getattr(context.launch_ctx, _ATTRIBUTE, None))
    try:
        return _rule(context, *args, **options)
    finally:
        _COLUMNS.reset(token)


_whole = instructions_of_products.wgmma_m64
setattr(instructions_of_products, "wgmma_m64", _instructions)  # noqa: B010  its own type is narrower
_rule = lowering_rules[product_primitive]
lowering_rules[product_primitive] = _lowered
