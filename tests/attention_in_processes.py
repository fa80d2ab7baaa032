"""One process of several: attention of a sequence over all their devices equals one device.

python -m tests.attention_in_processes PORT PROCESSES NUMBER
"""

import functools
import sys

import jax
import numpy as np

import dilax
from dilax import reference, sharded_local
from dilax.distributed import start_processes
from tests.compare import error
from tests.dense_local import DENSE

AXES = ("host", "device")


def main(port: int, count: int, number: int) -> None:
    """Compare out, lse and the gradients that lie on this process's devices."""
    start_processes(f"127.0.0.1:{port}", count, number)
    jax.config.update("jax_enable_x64", True)
    sharded_local.XLA = DENSE
    mesh = jax.make_mesh((count, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng, T = np.random.default_rng(0), 32
    q, do = rng.normal(size=(2, 1, T, 4, 8))
    k, v = rng.normal(size=(2, 1, T, 2, 8))
    arrays = q, k, v, do, rng.normal(size=(1, T, 4))
    options = {"segment_lengths": (16, T), "dilation_rates": (1, 4), "is_causal": True}

    def with_gradients(attend):
        def run(q, k, v, do, dl):
            result, vjp = jax.vjp(attend, q, k, v)
            return *result, *vjp((do, dl))

        return jax.jit(run)

    part = jax.P(None, AXES)
    attend = functools.partial(
        dilax.sharded_dilated_attention, **options, axis_name=AXES, return_lse=True
    )
    attend = jax.shard_map(attend, mesh=mesh, in_specs=(part,) * 3, out_specs=(part, part))
    where = jax.NamedSharding(mesh, part)
    placed = [jax.make_array_from_callback(x.shape, where, lambda i, x=x: x[i]) for x in arrays]
    found = with_gradients(attend)(*placed)
    wanted = with_gradients(functools.partial(reference.dilated_attention, **options))(*arrays)
    errors = [
        error(shard.data, np.asarray(x)[shard.index])
        for x, y in zip(wanted, found, strict=True)
        for shard in y.addressable_shards
    ]
    assert len(errors) == 10
    print(f"process {number} of {count}: {max(errors):.1e}")
    assert max(errors) <= 1e-12


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
