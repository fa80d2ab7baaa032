"""The plan of a call on a mesh that need not exist: who would send what to whom."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dilax._types import refuse
from dilax.checks import check_index
from dilax.kind_options import sharding_of
from dilax.names import Kind
from dilax.on_mesh import AttentionSharding, kv_heads_of_a_device, parse_axes
from dilax.plan_table import block_plan_table, placement, plan_table
from dilax.sharded import chunk_length, link_of, plan_of
from dilax.sharded_blocks import block_plan_of, block_reasons
from dilax.sharded_local import local_reasons
from dilax.spec import within


@dataclasses.dataclass(frozen=True)
class PlacedCall:
    """Where a call lies, its plan as text, and what was passed over.

    reasons_of: (implementation, *arrays) -> the reasons against it on one device.
    """

    placement: str
    table: str
    passed_over: tuple[tuple[str, str, str], ...]
    reasons_of: Callable[..., tuple[str, ...]]


def sharding_on(
    kind: str, row: Kind, devices: Any, mesh: Any, ring_size: Any, **said: Any
) -> AttentionSharding | None:
    """What a kind and a call say of axes, on the mesh that is described; None: one device.

    Raises:
        ValueError: the kind lies on no mesh, or what was said does not fit; the message says which.
    """
    if check_index("devices", devices) == 0:
        raise refuse("devices", "a positive int", devices)
    if devices > 1 and mesh is not None:
        raise refuse("devices", "1 with a mesh, which says it", devices)
    if devices > 1 and not row.mesh:
        raise refuse("devices", f"1 with kind {kind!r}: 'ring' takes a mesh", devices)
    found = _abstract_mesh(mesh)
    sharding = sharding_of(kind, row, ring_size, mesh=found, **said)
    if sharding is None:
        return None
    if devices > 1:
        if not isinstance(sharding.sequence, str):
            axes = "no mesh axis" if sharding.sequence is None else "several mesh axes"
            wanted = f"1 with kind {kind!r}, whose tokens lie on {axes}: describe it as a mesh"
            raise refuse("devices", wanted, devices)
        others = {x: 1 for x in (sharding.batch, sharding.heads) if isinstance(x, str)}
        found = _abstract_mesh(others | {sharding.sequence: devices})
    if found is None:
        for name, x in {**said, "ring_size": ring_size}.items():
            if x is not None:
                raise refuse(name, "None without a mesh, or devices", x)
        return None
    return dataclasses.replace(sharding, mesh=found)


def _abstract_mesh(mesh: Any) -> Any:
    if mesh is None or isinstance(mesh, jax.sharding.AbstractMesh):
        return mesh
    if isinstance(mesh, jax.sharding.Mesh):
        return mesh.abstract_mesh
    wanted = "axes with sizes, such as data=2,sequence=4, or a jax.sharding.Mesh"
    sizes = mesh
    if not isinstance(mesh, dict):
        sizes = parse_axes(mesh, wanted)
    for name, size in sizes.items():
        if not isinstance(name, str) or check_index("mesh", size) == 0:
            raise refuse("mesh", wanted, mesh)
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def placed_call(
    sharding: AttentionSharding,
    pattern: Any,
    arrays: tuple,
    options: dict[str, Any],
    *,
    ordered: bool,
    gigabytes_per_second: Any,
    device_kind: str | None,
) -> PlacedCall:
    """The call of whole query, key and value with the primitive's options, on a mesh.

    ordered: the tokens have positions of their own, which change something.

    Raises:
        ValueError: an axis or a length does not fit; the message says which.
    """
    query, key = arrays[:2]
    (B, T, N, H), S = query.shape, key.shape[1]
    if T != S:
        raise refuse("kv_seq_len", f"None or {T} on a mesh", S)
    sharding = sharding.on(query)
    parts = {name: math.prod(sharding.sizes(name)) for name in ("sequence", "batch", "heads")}
    devices, layout = parts["sequence"], sharding.layout
    B, N, K = B // parts["batch"], N // parts["heads"], kv_heads_of_a_device(key, sharding)
    part = chunk_length(T, devices, "contiguous")
    q, k, v = (jax.ShapeDtypeStruct((B, part, n, H), query.dtype) for n in (N, K, K))
    packed = options["q_segment_ids"] is not None
    ids = (jax.ShapeDtypeStruct((B, part), jnp.int32) if packed else None,) * 2
    where: dict[str, Any] = {
        "devices": devices,
        "layout": layout,
        "is_causal": options["is_causal"] and not ordered,
        "packed": packed,
        "ordered": ordered,
        "link": link_of(sharding.sizes("sequence"), gigabytes_per_second),
    }
    scale, rate = H**-0.5, options["dropout_rate"]
    if pattern is None:
        plan: Any = plan_of(
            tuple(within(branch, T) for branch in options["branches"]),
            (B, T, N, K, H),
            query.dtype,
            head_parts=parts["heads"],
            method=sharding.method,
            **where,
        )
        table = plan_table(plan)
    else:
        if sharding.method is not None:
            raise refuse("method", "None with a block pattern", sharding.method)
        plan, make = block_plan_of(pattern, q, k, one_for_all=sharding.heads is not None, **where)
        table = block_plan_table(plan)

    def reasons_of(name: str, *_: Any) -> tuple[str, ...]:
        if name == "xla":
            return ()
        if pattern is None:
            return local_reasons(name, q, k, v, plan, scale, ids, rate, device_kind)
        marks = ids[0], jax.ShapeDtypeStruct((B, part), jnp.int32) if ordered else None
        drops = rate, sharding.heads is not None
        return block_reasons(name, q, k, v, plan, make, marks, scale, drops, device_kind)

    return PlacedCall(
        placement(plan, parts["batch"], parts["heads"]), table, _unused(sharding), reasons_of
    )


def _unused(sharding: AttentionSharding) -> tuple[tuple[str, str, str], ...]:
    """The axes of the mesh that the call does not use."""
    used = set()
    for axis in (sharding.sequence, sharding.batch, sharding.heads):
        used |= {axis} if isinstance(axis, str) else set(axis or ())
    why = "left to XLA: the call names it for neither tokens, examples nor heads"
    return tuple(("placement", x, why) for x in sharding.mesh.axis_names if x not in used)
