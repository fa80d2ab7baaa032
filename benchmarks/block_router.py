"""What the adaptive variant takes: choosing blocks, planning visits, attending, learning."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import block_peers as peers
from benchmarks.block_timing import Row
from benchmarks.turns import in_turns
from pallas_kernels import blocks

T, N, H, RATIO, SIZE = 32768, 16, 128, 0.1, 128
SELECTION = "selection"
STEPS = {
    "schedule, attention": ("attend",),
    "selection, schedule, attention": ("route", "attend"),
    "the same with gradients": ("route", "attend", "gradients"),
    "the same, and the router learns": ("route", "attend", "gradients", "loss"),
}


def functions() -> dict[str, Callable]:
    """Functions of query, key, value, weight `[N, H, H]` and lists, which are used or chosen."""
    router, signal = peers.library("router"), peers.library("router_signal")
    routing = router.Routing(RATIO, SIZE, "mean", False)

    def route(q: Any, k: Any, weight: Any) -> Any:
        return router.route(q, k, weight, weight, routing)

    def attention(steps: tuple[str, ...]) -> Callable:
        def run(q: Any, k: Any, v: Any, weight: Any, lists: Any) -> Any:
            found = route(q, k, weight) if "route" in steps else None
            out, lse = blocks.attend(q, k, v, blocks=found.lists if found else lists)
            loss = jnp.float32(0)
            if "loss" in steps:
                said: dict[str, Any] = {"scale": H**-0.5, "is_causal": False, "target": "max"}
                loss = signal.kl_loss(found, signal.kept_mass(q, k, lse, found.lists, **said))
            return out, loss

        if "gradients" not in steps:
            return run

        def gradients(q: Any, k: Any, v: Any, weight: Any, lists: Any) -> Any:
            result, pull = jax.vjp(lambda *x: run(x[0], x[1], x[2], x[3], lists), q, k, v, weight)
            return pull((jnp.ones_like(result[0]), jnp.float32(1)))

        return gradients

    found = {name: attention(steps) for name, steps in STEPS.items()}
    return {SELECTION: lambda q, k, v, weight, lists: route(q, k, weight).lists, **found}


def arguments() -> tuple[Any, ...]:
    """Shapes of query, key, value, weight and lists."""
    x = jax.ShapeDtypeStruct((1, T, N, H), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((N, H, H), jnp.float32)
    lists = jax.eval_shape(functions()[SELECTION], x, x, x, weight, None)
    return x, x, x, weight, lists


def measure(compiled: dict[str, Callable], add: Callable[[Row], None]) -> None:
    """Times of every step, in turns; rates are those of the kept blocks."""
    keys = jax.random.split(jax.random.key(5), 3)
    q, k, v = (jax.random.normal(key, (1, T, N, H), jnp.bfloat16) for key in keys)
    weight = jnp.broadcast_to(jnp.eye(H), (N, H, H))
    lists = jax.jit(functions()[SELECTION])(q, k, v, weight, None)
    arrays = (q, k, v, weight, lists)
    runs = {who: (lambda f=f: f(*arrays), jax.block_until_ready) for who, f in compiled.items()}
    kept = float(lists.counts.sum()) * SIZE**2
    kept *= N / lists.counts.shape[1]
    name = f"adaptive {RATIO:.0%} T={T}"
    for who, seconds in in_turns(runs).items():
        row = Row(name, who, H, kept / (N * T**2))
        factor = 3.5 if "gradients" in who or "learns" in who else 1.0
        rate = factor * 4 * H * kept / seconds / 1e12
        if factor > 1:
            row.both, row.both_rate = seconds * 1e3, rate
        else:
            row.forward, row.forward_rate = seconds * 1e3, None if who == SELECTION else rate
        add(row)
