"""Token orders: bijections of any grid, counts of blocks, and attention that honours positions."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dilax
from dilax import TokenOrder, reference, select
from dilax.block_lists import from_mask, token_mask
from dilax.order import hilbert_order, tile_order, window_blocks
from tests.compare import assert_exact

GRID = (3, 7)  # T = 21, not a power of two, prime sides
SPEC = ([8, 21], [1, 2])
KEY = jax.random.key(3)


@pytest.mark.parametrize("dims", [2, 3])
def test_hilbert_visits_every_cell_of_every_grid_by_single_steps(dims):
    sides = range(1, 18) if dims == 2 else range(1, 8)
    larger = ((37, 53), (127, 128), (101, 2)) if dims == 2 else ((13, 17, 31), (3, 32, 19))
    for grid in (*itertools.product(sides, repeat=dims), *larger):
        order = hilbert_order(grid)
        assert (np.sort(order) == np.arange(np.prod(grid))).all(), grid
        place = np.stack(np.unravel_index(order, grid))
        assert (np.abs(np.diff(place, axis=1)).sum(0) == 1).all(), grid


@pytest.mark.parametrize("grid", [(32, 32), (16, 16, 16)])
def test_aligned_runs_of_the_hilbert_curve_are_squares_and_cubes(grid):
    place = np.stack(np.unravel_index(hilbert_order(grid), grid), axis=1)
    for side in (2, 4, 8):
        runs = place.reshape(-1, side ** len(grid), len(grid))
        assert (np.ptp(runs, axis=1) == side - 1).all()


@pytest.mark.parametrize(
    ("grid", "tile"), [((6, 8), (3, 4)), ((5, 7), (2, 3)), ((3, 5, 4), (2, 2, 3))]
)
def test_tiles_follow_each_other_row_by_row(grid, tile):
    wanted = []
    for corner in itertools.product(*(range(0, n, t) for n, t in zip(grid, tile, strict=True))):
        inside = (range(c, min(c + t, n)) for c, t, n in zip(corner, tile, grid, strict=True))
        wanted += [np.ravel_multi_index(cell, grid) for cell in itertools.product(*inside)]
    assert tile_order(grid, tile).tolist() == wanted


def test_window_blocks_are_those_of_all_pairs(rng):
    for grid, window, size in (((5, 9), (3, 5), 4), ((3, 4, 5), (1, 3, 3), 7), ((2, 3), (9, 9), 4)):
        place = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid))
        apart = np.abs(place[:, :, None] - place[:, None])
        near = (apart <= np.array(window).reshape(-1, 1, 1) // 2).all(0)
        for order in (
            TokenOrder(grid),
            TokenOrder(grid, "row"),
            TokenOrder(grid, "tile", (2,) * len(grid)),
        ):
            rows = -(-len(order) // size)
            wanted = np.zeros((rows, rows), bool)
            i, j = np.nonzero(near[order.positions][:, order.positions])
            wanted[i // size, j // size] = True
            assert (window_blocks(order, window, size) == wanted).all()


@pytest.mark.parametrize(
    ("window", "size", "row", "tile", "hilbert"),
    [(17, 64, 8416, 3388, 2116), (17, 128, 2104, 1012, 966), (33, 128, 3952, 1628, 1790)],
)
def test_a_window_of_an_image_needs_2_to_4_times_fewer_blocks(window, size, row, tile, hilbert):
    grid = (128, 128)
    orders = TokenOrder(grid, "row"), TokenOrder(grid, "tile", (8, 16)), TokenOrder(grid)
    counts = [int(window_blocks(order, (window, window), size).sum()) for order in orders]
    assert counts == [row, tile, hilbert]
    assert 2 < row / hilbert < 8


def heads(N=4, K=2):
    shapes = (N, K, K)
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, (2, 21, n, 8), jnp.float64)
        for key, n in zip(keys, shapes, strict=True)
    )


def test_attention_in_an_order_equals_the_oracle_on_permuted_tokens(x64, rng):
    """Causal, with dropout, masks and a key for all."""
    order, (q, k, v) = TokenOrder(GRID), heads()
    bias = dict(zip(("bias_k", "bias_v"), jnp.asarray(rng.normal(size=(2, 2, 8))), strict=True))
    extra = {"dropout_key": KEY, "deterministic": False, "is_causal": True, **bias}
    masks = {
        "q_segment_ids": jnp.asarray(rng.integers(0, 3, (2, 21)), jnp.int32),
        "key_padding_mask": jnp.asarray(rng.random((2, 21)) < 0.8),
    }
    weights = jnp.asarray(rng.normal(size=q.shape)), jnp.asarray(rng.normal(size=q.shape[:3]))
    attention = dilax.create_dilated_attention("hilbert", *SPEC, grid=GRID, dropout=0.3)

    def ours(q, k, v):
        return attention(q, k, v, return_lse=True, **masks, **extra)

    def exact(q, k, v):
        p = order.positions
        out, lse = reference.dilated_attention(
            q[:, p], k[:, p], v[:, p], *SPEC, q_positions=p, dropout_rate=0.3,
            **{name: x[:, p] for name, x in masks.items()}, **extra,
        )  # fmt: skip
        return out[:, order.inverse], lse[:, order.inverse]

    def gradients(attend):
        def total(q, k, v):
            out, lse = attend(q, k, v)
            seen = jnp.where(lse == -jnp.inf, 0, lse * weights[1])
            return (out * weights[0]).sum() + seen.sum(), (out, lse)

        (_, both), found = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
        return both, found

    assert_exact(gradients(ours), gradients(exact))


def test_an_order_changes_nothing_of_dense_attention_and_its_dropout(x64):
    q, k, v = heads()
    options = {"is_causal": True, "dropout_key": KEY}
    orders = (None, TokenOrder(GRID), TokenOrder(GRID, "tile", (2, 3)), TokenOrder(GRID, "row"))
    attentions = [
        dilax.create_dilated_attention("dilated", [21], [1], dropout=0.4, order=order)
        for order in orders
    ]
    plain, *ordered = jax.jit(lambda *x: [attend(*x, **options) for attend in attentions])(q, k, v)
    for out in ordered:
        assert_exact(out, plain)


def test_a_window_of_a_grid_by_block_lists_is_causal_by_positions(x64):
    order, (q, k, v) = TokenOrder(GRID), heads(K=4)
    lists = from_mask(window_blocks(order, (3, 3), 4), 4)
    p = order.positions
    out = jax.jit(
        lambda *x: dilax.block_sparse_attention(
            *x, lists, is_causal=True, q_positions=p, implementation="xla"
        )
    )(q[:, p], k[:, p], v[:, p])
    mask = np.asarray(token_mask(lists, 21, 21))[0, 0] & (p[:, None] >= p)
    logits = jnp.einsum("BTNH,BSNH->BNTS", q[:, p], k[:, p]) * 8**-0.5
    shares = jax.nn.softmax(jnp.where(mask[None, None], logits, -jnp.inf), axis=-1)
    assert_exact(out, jnp.einsum("BNTS,BSNH->BTNH", shares, v[:, p]))


def test_the_future_changes_nothing_in_a_causal_order(x64):
    attention = jax.jit(lambda *x: dilax.create_dilated_attention("hilbert", *SPEC, grid=GRID)(
        *x, is_causal=True, deterministic=True))  # fmt: skip
    q, k, v = heads()
    base = attention(q, k, v)
    for t in (1, 4, 13, 20):
        changed = attention(*(x.at[:, t:].add(1.0) for x in (q, k, v)))
        assert (changed[:, :t] == base[:, :t]).all()
        assert (changed[:, t:] != base[:, t:]).any(axis=(0, 2, 3)).all()


def test_a_module_and_a_model_permute_once_and_keep_positions(x64):
    x = jax.random.normal(jax.random.key(1), (2, 21, 32), jnp.float64)
    order, options = TokenOrder(GRID), {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    rope = dilax.RotaryPosition()
    around = dilax.create_multihead_dilated_attention(
        "hilbert", 32, 4, *SPEC, grid=GRID, position=rope, **options
    )
    inside = dilax.MultiheadDilatedAttention(32, 4, *SPEC, position=rope, **options)
    nnx.update(inside, nnx.state(around))

    @jax.jit
    def all_three(x):
        return (
            around(x, is_causal=True),
            order.unpermute(inside(order.permute(x), is_causal=True, order=order)),
            inside(x, is_causal=True),
        )

    outer, inner, without = all_three(x)
    assert_exact(inner, outer)
    assert float(jnp.abs(without - outer).max()) > 1e-3  # it is another function

    config = dilax.LongNetConfig(32, 4, 2, 48, (21,), (1,), position="rope", param_dtype="float64")
    model = dilax.LongNetDecoder(config, rngs=nnx.Rngs(0))
    ids = jnp.asarray(np.arange(42).reshape(2, 21) % 3, jnp.int32)
    ordered, plain = jax.jit(
        lambda x: [model(x, segment_ids=ids, order=one) for one in (order, None)]
    )(x)
    assert_exact(ordered, plain)


def test_permuting_is_exact_and_differentiable(rng):
    order, x = TokenOrder((5, 7)), jnp.asarray(rng.normal(size=(2, 35, 3)), jnp.float32)
    assert (order.unpermute(order.permute(x)) == x).all()
    assert (order.permute(x)[:, order.inverse] == x).all()
    gradient = jax.grad(lambda x: (order.permute(x) * x).sum())(x)
    assert (gradient == order.permute(x) + order.unpermute(x)).all()
    assert hash(order) == hash(TokenOrder([5, 7]))


WINDOW = dilax.SparsePatternConfig(window_size=64, block_size=64)


@pytest.mark.parametrize("kind", ["hilbert", "hilbert_pallas", "window"])
def test_kernels_take_positions(kind, monkeypatch):
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(select, "device_of", lambda x: device)
    if kind == "window":
        order = TokenOrder(GRID)
        attention = dilax.DilatedAttention(pattern=WINDOW, segment_lengths=None, order=order)
    else:
        attention = dilax.create_dilated_attention(kind, *SPEC, grid=GRID, dropout=0.2)
        options = dict(seq_len=21, is_causal=True, dropout=0.2, dtype="bfloat16")
        decision = dilax.explain(kind, device_kind=device.device_kind, **options)
        assert decision.implementation == "pallas"
    drops = {} if kind == "window" else {"dropout_key": KEY}
    q = jax.ShapeDtypeStruct((2, 21, 4, 64), jnp.bfloat16)
    traced = jax.jit(lambda q: attention(q, q, q, is_causal=True, **drops)).trace(q)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("block_forward" if kind == "window" else "dilated_forward") in text


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("grid", lambda: TokenOrder((4,))),
        ("grid", lambda: TokenOrder((4, 0))),
        ("grid", lambda: hilbert_order((2, 2, 2, 2))),
        ("grid", lambda: TokenOrder((2**16, 2**16))),
        ("kind", lambda: TokenOrder((4, 4), "morton")),
        ("tile", lambda: TokenOrder((4, 4), "tile")),
        ("tile", lambda: TokenOrder((4, 4), "hilbert", (2, 2))),
        ("window", lambda: window_blocks(TokenOrder((4, 4)), (2, 3), 4)),
        ("block_size", lambda: window_blocks(TokenOrder((4, 4)), (3, 3), 0)),
        ("x", lambda: TokenOrder((4, 4)).permute(jnp.ones((1, 15)))),
        ("grid", lambda: dilax.create_dilated_attention("hilbert", *SPEC)),
        ("grid", lambda: dilax.create_dilated_attention("dilated", *SPEC, grid=GRID)),
        ("order", lambda: dilax.create_dilated_attention("dilated", *SPEC, order="hilbert")),
        (
            "order",
            lambda: dilax.create_dilated_attention("hilbert", *SPEC, grid=GRID, order=GRID),
        ),
        (
            "query",
            lambda: dilax.create_dilated_attention("hilbert", *SPEC, grid=(4, 4))(
                *(jnp.ones((1, 21, 4, 8)),) * 3
            ),
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: wanted"):
        call()
