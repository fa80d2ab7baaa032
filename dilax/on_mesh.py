"""Dilated attention of arrays on a mesh: `jax.shard_map` around `sharded_dilated_attention`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dilax._types import refuse
from dilax.checks import check_array, check_choice, check_qkv
from dilax.sharded import (
    LAYOUTS,
    check_ring_size,
    chunk_length,
    layout_positions,
    local_positions,
    refuse_without_sequence,
    sharded_dilated_attention,
)
from dilax.sharded_blocks import sharded_block_sparse_attention
from dilax.union import positions_of

_ROWS = ("q_segment_ids", "kv_segment_ids", "key_padding_mask", "q_positions", "kv_positions")
_HEADS = ("bias_k", "bias_v")
# What block lists on a mesh do not have, and its default.
_ABSENT_WITH_A_PATTERN = {
    "segment_lengths": None,
    "dilation_rates": None,
    "combine": "lse",
    "head_offset": "interleaved",
    "average_branches": None,
    "pad_mode": "mask",
    "method": None,
    "bias_k": None,
    "bias_v": None,
    "zero_attn": False,
    "visiting_order": "longest_first",
}


@dataclasses.dataclass(frozen=True)
class AttentionSharding:
    """Where the queries, keys and values of an attention lie on a mesh; hashable.

    Args:
        sequence: mesh axis that the tokens are sharded over, or a tuple of several in the mesh's
            order; None: every device has all tokens.
        batch, heads: mesh axes of examples and of heads. None follows the sharding of the query
            where that is known (outside jit, or on Explicit axes), and else leaves it to XLA.
        layout, method, ring_size: as in `dilax.sharded_dilated_attention`; "contiguous" and None
            without a mesh axis of the tokens.
        mesh: None for the mesh of the query, or else that of `jax.set_mesh`.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.

    Example:
        >>> AttentionSharding(layout="zigzag").sequence
        'sequence'
    """

    sequence: Any = "sequence"
    batch: Any = None
    heads: Any = None
    layout: str = "contiguous"
    method: Any = None
    ring_size: int | None = None
    mesh: Any = None

    def __post_init__(self):
        for name in ("sequence", "batch", "heads"):
            if not all(isinstance(x, str) for x in _names(getattr(self, name))):
                wanted = "None, the name of a mesh axis, or a tuple of names"
                raise refuse(name, wanted, getattr(self, name))
        axes = [x for name in ("sequence", "batch", "heads") for x in _names(getattr(self, name))]
        if len(set(axes)) < len(axes):
            raise refuse("axis_name, batch_axis, head_axis", "different axes", axes)
        check_choice("layout", self.layout, LAYOUTS)
        if self.sequence is None:
            refuse_without_sequence(self.layout, self.method)
        if isinstance(self.method, list):
            object.__setattr__(self, "method", tuple(self.method))
        methods = self.method if isinstance(self.method, tuple) else (self.method,)
        if not all(x is None or isinstance(x, str) for x in methods):
            raise refuse("method", "None, a name, or one for each branch", self.method)
        if not isinstance(self.mesh, None | jax.sharding.Mesh | jax.sharding.AbstractMesh):
            raise refuse("mesh", "None or a jax.sharding.Mesh", self.mesh)

    def on(self, query: Any) -> "AttentionSharding":
        """The same with the mesh and the axes that a call with this query has.

        Raises:
            ValueError: there is no mesh, it lacks an axis, or one does not divide its dimension.
        """
        mesh, spec = self._mesh_and_spec(query)
        spec = (*spec, None, None, None, None)[:4]
        own = set(_names(self.sequence))
        batch = self.batch or (spec[0] if not own & set(_names(spec[0])) else None)
        heads = self.heads or (spec[2] if not own & set(_names(spec[2])) else None)
        return dataclasses.replace(self, mesh=mesh, batch=batch, heads=heads)._checked(query)

    def _mesh_and_spec(self, x: Any) -> tuple[Any, tuple]:
        mesh, spec = self.mesh, ()
        found = _sharding_of(x)
        if isinstance(found, jax.NamedSharding) and not found.mesh.empty:
            mesh, spec = self.mesh or found.mesh, tuple(found.spec)
        if mesh is None:
            mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            wanted = "a mesh: arrays on one, jax.set_mesh, or this argument"
            raise refuse("mesh", wanted, self.mesh)
        return mesh, spec

    def positions(self, x: Any) -> jax.Array:
        """int32 [T]: the places in the sequence of tokens x [B, T, ...], as they lie.

        Example:
            >>> auto = jax.sharding.AxisType.Auto
            >>> mesh = jax.sharding.AbstractMesh((2,), ("sequence",), axis_types=(auto,))
            >>> x = jax.numpy.ones((1, 8, 4))
            >>> AttentionSharding(layout="zigzag", mesh=mesh).positions(x).tolist()
            [0, 1, 6, 7, 2, 3, 4, 5]
        """
        length = x.shape[1]
        if self.sequence is not None and self.inside_shard_map():
            return local_positions(length, self.sequence, self.layout)
        if self.layout == "contiguous":
            return jnp.arange(length, dtype=jnp.int32)
        mesh, _ = self._mesh_and_spec(x)
        devices = math.prod(dataclasses.replace(self, mesh=mesh).sizes("sequence"))
        return jnp.asarray(layout_positions(length, devices, self.layout))

    def inside_shard_map(self) -> bool:
        """Is there a shard_map around this call, over the axes of the tokens?"""
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        return bool(manual) and set(_names(self.sequence)) <= manual

    def sizes(self, name: str) -> tuple[int, ...]:
        """Devices along the mesh axes of "sequence", "batch" or "heads"."""
        every = dict(zip(self.mesh.axis_names, self.mesh.axis_sizes, strict=True))
        return tuple(every[axis] for axis in _names(getattr(self, name)))

    def _checked(self, query: Any) -> "AttentionSharding":
        sizes = dict(zip(self.mesh.axis_names, self.mesh.axis_sizes, strict=True))
        counts = {}
        for name in ("sequence", "batch", "heads"):
            for axis in _names(getattr(self, name)):
                if axis not in sizes:
                    argument = {"sequence": "axis_name", "heads": "head_axis"}.get(
                        name, "batch_axis"
                    )
                    wanted = f"an axis of the mesh, which has {', '.join(sizes)}"
                    raise refuse(f"{argument} (AttentionSharding.{name})", wanted, axis)
            counts[name] = math.prod(self.sizes(name))
        order = [axis for axis in sizes if axis in _names(self.sequence)]
        if order != list(_names(self.sequence)):
            raise refuse("axis_name", f"axes in the order of the mesh, {order}", self.sequence)
        check_ring_size(self.ring_size, counts["sequence"])
        for name, dimension in (("batch", 0), ("heads", 2)):
            if query.shape[dimension] % counts[name]:
                what = f"{counts[name]} devices along {getattr(self, name)!r}"
                wanted = f"axes that divide {name} of the query; {what} do not"
                raise refuse(name, wanted, query)
        if counts["sequence"] > 1:
            chunk_length(query.shape[1], counts["sequence"], self.layout)
        return self


def parse_axes(mesh: Any, wanted: str) -> dict[str, int]:
    """Sizes of the axes of a mesh that is written "data=2,sequence=4", in its order.

    Raises:
        ValueError: the text is not axes and sizes; `wanted` says what would be.

    Example:
        >>> parse_axes("data=2,sequence=4", "a mesh")
        {'data': 2, 'sequence': 4}
    """
    if not isinstance(mesh, str):
        raise refuse("mesh", wanted, mesh)
    pairs = [part.partition("=") for part in mesh.replace(" ", "").split(",")]
    sizes = {name: size for name, _, size in pairs}
    real = all(size.isascii() and size.isdigit() and int(size) for size in sizes.values())
    if len(sizes) != len(pairs) or "" in sizes or not real:
        raise refuse("mesh", wanted, mesh)
    return {name: int(size) for name, size in sizes.items()}


def kv_heads_of_a_device(key: Any, sharding: AttentionSharding) -> int:
    """Of key [B, S, K, H]: K over the devices along the heads, or one that all of them have."""
    heads, parts = key.shape[2], math.prod(sharding.sizes("heads"))
    if heads % parts and heads > 1:
        wanted = f"one kv head, or a multiple of the {parts} devices along {sharding.heads!r}"
        raise refuse("key", wanted, key)
    return max(1, heads // parts)


def _only(axes: set[str], spec: Any) -> Any:
    """A partition spec without the axes that are not among `axes`."""
    kept = (tuple(x for x in _names(entry) if x in axes) for entry in spec)
    return jax.P(*(names or None for names in kept))


def _names(axis: Any) -> tuple:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _sharding_of(x: Any) -> Any:
    """The sharding that is known of x; of a tracer that is the one of Explicit axes."""
    if isinstance(x, Tracer):
        return jax.typeof(x).sharding
    return getattr(x, "sharding", None)


def dilated_attention_on_mesh(
    sharding: AttentionSharding,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_lengths: Any = None,
    dilation_rates: Any = None,
    *,
    pattern: Any = None,
    is_causal: bool = False,
    q_start: int = 0,
    k_start: int = 0,
    q_positions: Any = None,
    kv_positions: Any = None,
    **options: Any,
) -> Any:
    """`dilax.dilated_attention` of arrays [B, T, N, H] that lie on a mesh, and so does the result.

    Inside a shard_map over the axes of `sharding` the arrays are this device's part; elsewhere they
    are whole, in `sharding.layout`, and this wraps the shard_map. Arguments and errors as
    `dilax.dilated_attention` and `dilax.sharded_dilated_attention`; with a pattern as
    `dilax.sharded_block_sparse_attention`.

    Example:
        >>> import jax, dilax
        >>> auto = jax.sharding.AxisType.Auto
        >>> mesh = jax.make_mesh((1,), ("sequence",), axis_types=(auto,))
        >>> q = jax.numpy.ones((1, 32, 4, 8))
        >>> with jax.set_mesh(mesh):
        ...     dilated_attention_on_mesh(AttentionSharding(), q, q, q, [8, 32], [1, 2]).shape
        (1, 32, 4, 8)
    """
    check_qkv(query, key, value)
    for name, x in (("q_start", q_start), ("k_start", k_start)):
        if x != 0:
            raise refuse(name, "0 on a mesh", x)
    places = positions_of(query, key, q_positions, kv_positions)
    if places is not None:
        options |= {"q_positions": places[0], "kv_positions": places[1]}
    options |= {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
    options |= {"layout": sharding.layout, "method": sharding.method}
    if pattern is not None:
        options = {"pattern": pattern} | _without_branches(options)
    options |= {"is_causal": is_causal}
    arrays = {"query": query, "key": key, "value": value}
    for name in (*_ROWS, *_HEADS, "dropout_key"):
        if options.get(name) is not None:
            arrays[name] = options.pop(name)
    if sharding.inside_shard_map():
        return _call(sharding, arrays, options)
    (B, T), S = query.shape[:2], key.shape[1]
    if T != S:
        raise refuse("key", f"the {T} rows of the query on a mesh", key)
    for name in _ROWS:
        if name in arrays:
            kind = "bool" if name == "key_padding_mask" else "int32"
            check_array(name, arrays[name], (B, T), (kind,))
    return _mapped(sharding.on(query), arrays, options)


def _without_branches(options: dict) -> dict:
    """The options of block lists on a mesh, refusing what those do not have."""
    for name, default in _ABSENT_WITH_A_PATTERN.items():
        x = options.get(name, default)
        if not isinstance(x, type(default)) or x != default:
            raise refuse(name, f"{default!r} with a pattern on a mesh", x)
    return {name: x for name, x in options.items() if name not in _ABSENT_WITH_A_PATTERN}


def _call(sharding: AttentionSharding, arrays: dict, options: dict) -> Any:
    run = sharded_block_sparse_attention if "pattern" in options else sharded_dilated_attention
    return run(
        **arrays,
        **options,
        axis_name=sharding.sequence,
        head_axis=sharding.heads,
        batch_axis=sharding.batch,
        ring_size=sharding.ring_size,
    )


def _mapped(sharding: AttentionSharding, arrays: dict, options: dict) -> Any:
    """The call under shard_map over the axes that it names; others stay with XLA."""
    sequence, batch, heads = sharding.sequence, sharding.batch, sharding.heads
    key = arrays["key"]
    specs = {name: jax.P(batch, sequence, heads, None) for name in ("query", "key", "value")}
    specs |= dict.fromkeys(_ROWS, jax.P(batch, sequence))
    specs |= dict.fromkeys(_HEADS, jax.P(heads, None))
    specs["dropout_key"] = jax.P()
    if kv_heads_of_a_device(key, sharding) * math.prod(sharding.sizes("heads")) != key.shape[2]:
        specs |= dict.fromkeys(("key", "value"), jax.P(batch, sequence, None, None))
        specs |= dict.fromkeys(_HEADS, jax.P())
    specs = {name: specs[name] for name in arrays}
    out = jax.P(batch, sequence, heads, None)
    if options.get("return_lse"):
        out = (out, jax.P(batch, sequence, heads))
    used = {*_names(sequence), *_names(batch), *_names(heads)}
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    explicit = {axis for axis in used if kinds[axis] == jax.sharding.AxisType.Explicit}
    if explicit:
        arrays = {
            name: jax.reshard(x, jax.NamedSharding(sharding.mesh, _only(explicit, specs[name])))
            for name, x in arrays.items()
        }
    # Kernels cannot say what their results vary over, so nothing checks it.
    mapped = jax.shard_map(
        lambda part: _call(sharding, part, options),
        mesh=sharding.mesh,
        in_specs=(specs,),
        out_specs=out,
        axis_names=used,
        check_vma=False,
    )
    return mapped(arrays)
