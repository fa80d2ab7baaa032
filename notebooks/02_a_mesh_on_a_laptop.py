# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A mesh on a laptop
#
# One sequence on eight devices: which branch moves what, a picture of who sends to whom, the same
# numbers as one device, and the messages in the compiled program. The eight devices are emulated
# on the CPU, so this runs anywhere; on eight GPUs the code is the same.

# %%
# %matplotlib inline
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import dilax
from dilax import sharded
from dilax.spec import as_spec, branches_of
from sharding.mesh import from_layout, to_layout

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device
DEVICES = jax.device_count()
mesh = jax.make_mesh((DEVICES,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
DEVICES

# %% [markdown]
# ## The plan
#
# 256 tokens, 32 on each device, and four branches `(W, R)`. A segment of 16 lies on one device:
# nothing moves. A longer one spans `W / 32` devices, and only the kept `1 / R` of its rows has to
# travel. How is chosen per branch, by the time that it is expected to take on GPUs: around a
# *ring*, keys and values of one device after the other; *all to all*, each device gets whole
# segments of some of the heads; or *all-gather*, all in one message. Here the choice is forced, to
# see each of them.

# %%
B, T, N, H = 1, 256, 8, 16
segment_lengths, dilation_rates = (16, 64, 128, 256), (1, 2, 4, 1)
method = (None, "all_gather", "all_to_all", "ring")


def planned(layout="contiguous", is_causal=True):
    branches = branches_of(as_spec(segment_lengths, dilation_rates), N, "lse", "interleaved")
    sizes, options = (B, T, N, N, H), dict(devices=DEVICES, is_causal=is_causal, method=method)
    return sharded.plan_of(branches, sizes, "float32", layout=layout, **options)


plan = planned()
print("branch    method      devices   bytes received   messages")
for branch in plan.branches:
    w, r = branch.branch[:2]
    row = f"{w}/{r}".ljust(10) + branch.method.ljust(12)
    print(f"{row}{branch.group:7}{branch.bytes:17,}{branch.messages:11}")

# %% [markdown]
# ## Who sends to whom
#
# A row is a device that receives, a column one that sends. Under causality a device needs nothing
# from those after it: the ring's messages go only that way.


# %%
def senders(branch):
    """[receiver, sender]: does anything go from one to the other?"""
    sends = np.zeros((DEVICES, DEVICES), bool)
    for hop in branch.hops[1:]:
        for source, destination in hop.pairs:
            sends[destination, source] = True
    together = branch.group if branch.method == "all_gather" else branch.spread
    for first in range(0, DEVICES, together):
        sends[first : first + together, first : first + together] = True
    return sends & ~np.eye(DEVICES, dtype=bool)


figure, panels = plt.subplots(1, len(plan.branches), figsize=(11, 3.1), layout="constrained")
for panel, branch in zip(panels, plan.branches, strict=True):
    panel.imshow(senders(branch), cmap="Blues", vmin=0, vmax=1.4)
    panel.set_title(f"W={branch.branch[0]}, R={branch.branch[1]}: {branch.method}", fontsize=10)
    panel.set_xlabel("from device")
    panel.set_xticks(range(DEVICES))
    panel.set_yticks(range(DEVICES))
panels[0].set_ylabel("to device")
figure

# %% [markdown]
# ## The same numbers
#
# `dilax.sharded_dilated_attention` runs inside a `jax.shard_map` and sees this device's part. Its
# output and its gradients are those of `dilax.dilated_attention` on one device with everything.

# %%
q, k, v = jax.random.normal(jax.random.key(0), (3, B, T, N, H))
branches = dict(segment_lengths=segment_lengths, dilation_rates=dilation_rates, is_causal=True)


def on_mesh(layout, method):
    attend = functools.partial(
        dilax.sharded_dilated_attention,
        **branches,
        axis_name="sequence",
        layout=layout,
        method=method,
    )
    part = jax.P(None, "sequence")
    return jax.shard_map(attend, mesh=mesh, in_specs=(part,) * 3, out_specs=part)


def with_gradients(attend):
    def run(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(jnp.cos(out))

    return jax.jit(run)


alone = with_gradients(functools.partial(dilax.dilated_attention, **branches))(q, k, v)
spread = jax.NamedSharding(mesh, jax.P(None, "sequence"))
run = with_gradients(on_mesh("contiguous", method)).lower(
    *(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread) for x in (q, k, v))
)
program = run.compile()
placed = program(*(jax.device_put(x, spread) for x in (q, k, v)))
differences = [float(jnp.abs(a - np.asarray(b)).max()) for a, b in zip(alone, placed, strict=True)]
assert max(differences) < 1e-4
dict(zip(("out", "dq", "dk", "dv"), differences, strict=True))

# %% [markdown]
# The output stays where it is: each device holds its 32 rows.

# %%
assert placed[0].sharding.is_equivalent_to(spread, 4)
[shard.data.shape for shard in placed[0].addressable_shards][:2]

# %% [markdown]
# The messages are in the compiled program, forward and backward, one kind for each method.

# %%
text = program.as_text()
kinds = {"collective-permute": "ring", "all-to-all": "all_to_all", "all-gather": "all_gather"}
found = {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in kinds}
assert all(found.values())
found

# %% [markdown]
# ## Causality and balance
#
# With the tokens in order the last device sees the most keys, and all wait for it. In the layout
# `"zigzag"` device `d` holds chunks `d` and `15 - d` of 16, which evens that out.
# Data, labels and positions go there and back with two functions.

# %%
for layout in ("contiguous", "zigzag"):
    print(f"{layout:11} busiest device: {planned(layout).balance:.2f} times the mean work")
assert planned("zigzag").balance < 1.05 < planned("contiguous").balance

attend = jax.jit(on_mesh("zigzag", "all_gather"))
out = attend(*(to_layout(x, DEVICES, "zigzag") for x in (q, k, v)))
difference = float(jnp.abs(from_layout(out, DEVICES, "zigzag") - alone[0]).max())
assert difference < 1e-5
difference

# %% [markdown]
# ## Training
#
# `dilax train --mesh data=2,sequence=4` trains on eight devices, with two examples of a batch side
# by side and four parts of each sequence; the losses are those of one device. Several processes are
# started with `--coordinator`, `--num-processes` and `--process-id`, and a checkpoint of one mesh
# goes on on any other.
