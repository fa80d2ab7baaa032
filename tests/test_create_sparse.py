"""The block-sparse names: each is block-sparse attention with the pattern that it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dilax
from dilax.pattern_config import PRESETS, SparsePatternConfig
from dilax.patterns import DilatedSparse, Hierarchical, LocalWindow

pytestmark = pytest.mark.newest

NAMED = {
    "block_sparse": LocalWindow(0.1),
    "block_sparse_ring": LocalWindow(0.1),
    "BlockSparseTorchSparse": LocalWindow(0.1),
    "hierarchical": Hierarchical(near_blocks=4, block_size=64),  # as the preset
    "hilbert_post_pattern": DilatedSparse(0.1),
    **{
        name: PRESETS[name]
        for name in ("local", "global_local", "ultra_sparse", "hilbert_standard", "hilbert_ultra",
                     "fine_grained", "long_range", "hierarchical_ultra_sparse")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_names_have_their_pattern(name):
    attention = dilax.create_block_sparse_attention(name)
    assert attention.pattern == NAMED[name]
    assert attention.segment_lengths is None
    assert attention.visiting_order == ("hilbert" if "hilbert" in name else "longest_first")
    assert dilax.create_dilated_attention(name) == attention
    layer = dilax.create_multihead_dilated_attention(name, 16, 2)
    assert layer.attention.pattern == NAMED[name]
    decision = dilax.explain(name, seq_len=4096, device_kind="cpu")
    assert "of the admissible blocks" in decision.variant


def test_hierarchical_is_its_preset_or_with_options_its_type():
    made = dilax.create_block_sparse_attention
    assert made("hierarchical") == made("block_sparse", pattern="hierarchical")
    typed = {"pattern_type": "hierarchical", "block_size": 64}
    assert made("hierarchical", block_size=64) == made("block_sparse", **typed)
    assert made("hierarchical", block_size=64).pattern == Hierarchical(0.1, block_size=64)
    other = Hierarchical(near_blocks=3)
    assert made("hierarchical", pattern=other).pattern == other


def test_every_preset_is_a_kind_of_block_sparse_attention():
    for name, pattern in PRESETS.items():
        attention = dilax.create_block_sparse_attention(name)
        assert (attention.pattern, attention.segment_lengths) == (pattern, None), name


def test_functions_compute_block_sparse_attention(x64):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 300, 2, 8), jnp.float64)
    config = SparsePatternConfig("dilated_sparse", 0.4, 64)
    found = dilax.create_block_sparse_attention(sparse_config=config)(q, k, v, is_causal=True)
    plain = dilax.block_sparse_attention(q, k, v, config, is_causal=True)
    assert (found == plain).all()
    options = {"sparsity_ratio": 0.4, "block_size": 64, "pattern_type": "dilated_sparse"}
    assert dilax.create_block_sparse_attention(**options).pattern == config.pattern()
    inside = dilax.create_dilated_attention("auto", [150, 300], [1, 2], sparsity_ratio=0.4)
    assert inside.segment_lengths == (150, 300)
    assert inside.pattern == LocalWindow(0.4)


def test_modules_project_around_it():
    layer = dilax.create_block_sparse_attention(
        "block_sparse_multihead", embed_dim=32, num_heads=4, sparsity_ratio=0.5, block_size=64,
        add_bias_kv=True,
    )  # fmt: skip
    same = dilax.MultiheadDilatedAttention(
        32, 4, None, pattern=LocalWindow(0.5, block_size=64), add_bias_kv=True, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(1), (1, 100, 32))

    @nnx.jit
    def loss_and_gradient(layer):
        return nnx.value_and_grad(lambda layer: layer(x, is_causal=True).var())(layer)

    loss, grads = loss_and_gradient(layer)
    assert loss == loss_and_gradient(same)[0]
    kernels = [g for g in jax.tree.leaves(grads) if g.ndim == 2]
    assert len(kernels) == 6
    assert all(np.abs(g).max() > 0 for g in kernels)


def test_visiting_orders_give_the_same_bits(rng):
    q, k, v = rng.normal(size=(3, 1, 300, 2, 8)).astype(np.float32)
    found = {}
    for order in ("longest_first", "row", "hilbert"):

        def loss(q, k, v, order=order):
            out = dilax.block_sparse_attention(q, k, v, "global_local", visiting_order=order)
            return (out**2).sum(), out

        found[order] = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    for order in ("row", "hilbert"):
        same = jax.tree.map(lambda a, b: (a == b).all(), found[order], found["longest_first"])
        assert jax.tree.all(same)
    with pytest.raises(ValueError, match="visiting_order: wanted 'longest_first' or 'row' or"):
        dilax.block_sparse_attention(q, k, v, "local", visiting_order="curve")


def test_hilbert_is_a_curve():
    x, y = (a.reshape(-1) for a in np.mgrid[:16, :16])
    along = np.argsort(dilax.block_loop._hilbert(np, x, y, 4))
    assert (np.abs(np.diff(x[along])) + np.abs(np.diff(y[along])) == 1).all()


@pytest.mark.parametrize(
    ("match", "kind", "options"),
    [
        ("sparsity_ratio: wanted None with kind 'dilated': 'block_sparse' takes it", "dilated",
         {"sparsity_ratio": 0.5}),
        ("need_speed: wanted False with kind 'improved'", "improved", {"need_speed": True}),
        ("block_size: wanted None with kind 'local', which has its own", "local",
         {"block_size": 64}),
        ("pattern_type: wanted None or 'hierarchical' with kind", "hierarchical",
         {"pattern_type": "local_window"}),
        ("pattern: wanted None or a hierarchical one with kind", "hierarchical",
         {"pattern": "local"}),
        ("sparsity_ratio: wanted None with a pattern", "block_sparse",
         {"sparsity_ratio": 0.1, "pattern": "local"}),
        ("ring_size: wanted None or 1", "block_sparse_ring", {"ring_size": 2}),
        ("combine: wanted 'lse' without segment_lengths", "block_sparse", {"combine": "heads"}),
        ("pad_mode: wanted 'mask' with a pattern", "block_sparse", {"pad_mode": "zeros"}),
        ("visiting_order: wanted its default without a pattern", "auto",
         {"visiting_order": "row"}),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(match, kind, options):
    with pytest.raises(ValueError, match=match):
        dilax.create_dilated_attention(kind, **options)


def test_block_sparse_factory_refuses_other_kinds():
    with pytest.raises(ValueError, match=r"kind: wanted one of block_sparse, .*got 'standard'"):
        dilax.create_block_sparse_attention("standard")
    with pytest.raises(ValueError, match="sparse_config: wanted None with kind 'dilated', a pres"):
        dilax.create_block_sparse_attention("dilated", sparse_config="local")
    with pytest.raises(ValueError, match="sparsity_ratio: wanted None with a pattern"):
        dilax.create_block_sparse_attention("dilated", sparsity_ratio=0.1)
    with pytest.raises(ValueError, match="embed_dim: wanted a positive int with kind"):
        dilax.create_block_sparse_attention("block_sparse_multihead")
    inside = dilax.explain(
        seq_len=64, pattern="local", dtype="bfloat16", device_kind="NVIDIA H100 80GB HBM3"
    )
    assert inside.variant.startswith("dilated_attention")
    assert inside.implementation == "xla"
    assert any("no block lists inside dilated branches" in why for _, _, why in inside.passed_over)
