"""Adaptive attention: the router's choice, what it learns from, and what it may not know."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dilax
from dilax import reference
from dilax.block_lists import token_mask
from dilax.router import Routing, budgets, route
from dilax.router_signal import kept_mass
from tests.compare import assert_exact

B, T, N, K, H, SIZE = 2, 90, 4, 2, 8, 16
ROWS = -(-T // SIZE)
# No kernel takes blocks as small as these.
adaptive = functools.partial(dilax.AdaptiveAttention, implementation="xla")


def heads(rng, t=T):
    shapes = ((B, t, N, H), (B, t, K, H), (B, t, K, H))
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


def packed(rng):
    """Two documents and padding, different in each example."""
    ids = np.ones((B, T), np.int32)
    ids[0, 37:], ids[1, 50:], ids[:, 84:] = 2, 2, 0
    return jnp.asarray(ids)


@functools.partial(jax.jit, static_argnames="zero_attn")
def dense(q, k, v, zero_attn=False):
    """Causal attention of all pairs."""
    return reference.dilated_attention(q, k, v, [T], [1], is_causal=True, zero_attn=zero_attn)


def made(rng, **options):
    """A router whose projections are no identities."""
    options = {"sparsity_ratio": 0.5, "block_size": SIZE, "num_kv_heads": K} | options
    router = adaptive(N, H, param_dtype=jnp.float64, **options)
    for weight in (router.q_weight, router.k_weight):
        weight[...] = jnp.asarray(rng.normal(size=weight.shape))
    return router


def feature(x, name, row):
    if name == "first" or (name == "previous" and row == 0):
        return x[row * SIZE]
    row -= name == "previous"
    return x[row * SIZE : (row + 1) * SIZE].mean(0)


@pytest.mark.parametrize(
    ("name", "causal", "ratio"),
    [("first", True, 0.5), ("previous", True, 0.3), ("mean", False, 0.3), ("first", False, 1.0)],
)
def test_a_row_keeps_its_own_block_the_first_and_the_best(name, causal, ratio, rng, x64):
    q, k, _ = (np.asarray(x) for x in heads(rng))
    q_weight, k_weight = rng.normal(size=(N, H, H)), rng.normal(size=(K, H, H))
    routing = Routing(ratio, SIZE, name, causal)
    found = jax.jit(lambda *x: route(*x, routing))(q, k, q_weight, k_weight)
    assert found.lists.capacity == budgets(T, T, routing).max()
    for b in range(B):
        for head in range(K):
            group = range(head * N // K, (head + 1) * N // K)
            for row in range(ROWS):
                limit = row + 1 if causal else ROWS
                mine = np.mean([feature(q[b, :, n], name, row) @ q_weight[n] for n in group], 0)
                scores = [
                    mine @ (feature(k[b, :, head], "mean", c) @ k_weight[head]) / np.sqrt(H)
                    for c in range(limit)
                ]
                count = int(np.clip(np.floor(ratio * limit + 0.5), 1, limit))
                rank = sorted(range(limit), key=lambda c: (c != row, c != 0, -scores[c]))
                kept = sorted(rank[:count])
                assert int(found.lists.counts[b, head, row]) == count
                assert found.lists.columns[b, head, row, :count].tolist() == kept
                ours = np.asarray(found.scores[b, head, row, :count])
                assert np.abs(ours - np.array(scores)[kept]).max() < 1e-10


def dense_probabilities(q, k, v, lists, causal, ids, bias):
    """Probabilities, out and lse of one masked softmax; bias [B, K, rows, rows] on the logits."""
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    mask = jnp.repeat(token_mask(lists, T, T), N // K, axis=1)
    if causal:
        mask &= jnp.tri(T, dtype=bool)[None, None]
    if ids is not None:
        mask &= ((ids[:, :, None] == ids[:, None]) & (ids != 0)[:, None])[:, None]
    bias = jnp.repeat(jnp.repeat(jnp.repeat(bias, SIZE, -1), SIZE, -2)[..., :T, :T], N // K, 1)
    s = jnp.where(mask, jnp.einsum("BTNH,BSNH->BNTS", q, k) * H**-0.5 + bias, -jnp.inf)
    seen = mask.any(-1, keepdims=True)
    top = jnp.where(seen, s.max(-1, keepdims=True), 0)
    p = jnp.where(mask, jnp.exp(jnp.where(mask, s - top, 0)), 0)
    total = jnp.where(seen, p.sum(-1, keepdims=True), 1)
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)[..., 0].swapaxes(1, 2)
    return p / total, jnp.einsum("BNTS,BSNH->BTNH", p / total, v), lse


@pytest.mark.parametrize("causal", [True, False])
def test_signals_equal_those_of_a_dense_softmax(causal, rng, x64):
    """The result, the mass of each kept block, the loss and its gradient, the bias's gradient."""
    arrays, ids = heads(rng), packed(rng)
    graph, state = nnx.split(made(rng, straight_through=True, loss_target="mean"))
    weights = jnp.asarray(rng.normal(size=(B, T, N, H))), jnp.asarray(rng.normal(size=(B, T, N)))
    said = {"is_causal": causal, "q_segment_ids": ids}

    def total(out, lse):
        return (out * weights[0]).sum() + jnp.where(lse == -jnp.inf, 0, lse * weights[1]).sum()

    def scores(state):
        return nnx.merge(graph, state).route(*arrays[:2], **said).scores

    @jax.jit
    def ours(state):
        def call(state):
            out, lse, loss = nnx.merge(graph, state)(
                *arrays, return_lse=True, return_loss=True, **said
            )
            return (total(out, lse), loss), (out, lse)

        (_, loss), pull, (out, lse) = jax.vjp(call, state, has_aux=True)
        one, none = jnp.ones(()), jnp.zeros(())
        gradients = pull((one, none))[0], pull((none, one))[0]
        lists = nnx.merge(graph, state).route(*arrays[:2], **said).lists
        more = {"scale": H**-0.5, "is_causal": causal, "segment_ids": (ids, ids)}
        masses = [kept_mass(*arrays[:2], lse, lists, target=x, **more) for x in ("mean", "max")]
        return (out, lse, masses, loss, *gradients), lists

    @jax.jit
    def exact(state, lists):
        def biased(bias):
            p, out, lse = dense_probabilities(*arrays, lists, causal, ids, bias)
            return total(out, lse), (p, out, lse)

        zero = jnp.zeros((B, K, ROWS, ROWS))
        (_, (p, out, lse)), d_bias = jax.value_and_grad(biased, has_aux=True)(zero)
        p = jnp.pad(p, [(0, 0), (0, 0), (0, ROWS * SIZE - T), (0, ROWS * SIZE - T)])
        blocks = p.reshape(B, K, N // K, ROWS, SIZE, ROWS, SIZE).sum(-1)
        masses = []
        for mass in (blocks.sum((2, 4)), blocks.max((2, 4))):
            mass = mass / jnp.maximum(mass.sum(-1, keepdims=True), 1e-300)
            mass = jnp.take_along_axis(mass, lists.columns, -1)
            masses.append(jnp.where(lists.valid, mass, 0))
        taken = masses[0] > 0

        def kl(state):
            share = jax.nn.softmax(scores(state), axis=-1, where=lists.valid)
            ratio = masses[0] / jnp.where(taken, share, 1)
            terms = jnp.where(taken, masses[0] * jnp.log(jnp.where(taken, ratio, 1)), 0)
            return terms.sum() / (masses[0].sum(-1) > 0).sum()

        d_scores = jnp.take_along_axis(d_bias, lists.columns, -1) * lists.valid
        by_bias = jax.grad(lambda state: (scores(state) * d_scores).sum())(state)
        loss, by_loss = jax.value_and_grad(kl)(state)
        return out, lse, masses, loss, by_bias, by_loss

    found, lists = ours(state)
    assert_exact(found, exact(state, lists))
    for gradient in jax.tree.leaves(found[-2:]):  # of every weight of every head, by either signal
        assert (jnp.abs(gradient) > 0).all()


@pytest.mark.parametrize("name", ["first", "previous"])
def test_the_future_changes_nothing_also_through_the_router(name, rng, x64):
    router = made(rng, query_feature=name)
    attend = jax.jit(lambda q, k, v: router(q, k, v, is_causal=True))
    arrays = heads(rng)
    base = attend(*arrays)
    for t in (1, 15, 16, 17, 40, 64, 89):
        changed = attend(*(x.at[:, t:].add(rng.normal(size=x[:, t:].shape)) for x in arrays))
        assert (changed[:, :t] == base[:, :t]).all()
        assert (changed[:, t:] != base[:, t:]).any()


def test_causality_goes_by_the_original_positions_in_an_order(rng, x64):
    """Those of another kind of order: `test_inside_branches_along_an_order`."""
    order = dilax.TokenOrder((9, 10), "tile", (4, 4))
    router, ids = made(rng, order=order, sparsity_ratio=0.6), packed(rng)
    arrays, said = heads(rng), {"is_causal": True, "return_loss": True}
    attend = jax.jit(lambda ids, *arrays: router(*arrays, q_segment_ids=ids, **said))
    base, loss = attend(ids, *arrays)
    for t in (1, 23, 50, 89):
        changed = (x.at[:, t:].add(rng.normal(size=x[:, t:].shape)) for x in arrays)
        out, _ = attend(ids.at[:, t:].set(3), *changed)
        assert (out[:, :t] == base[:, :t]).all()
        assert (out[:, t:] != base[:, t:]).any()

    # Tokens that lie in the order already, what a row keeps, and the loss from a dense softmax.
    inside = made(np.random.default_rng(0), sparsity_ratio=0.6)
    inside.q_weight[...], inside.k_weight[...] = router.q_weight[...], router.k_weight[...]
    moved, ids = [order.permute(x) for x in arrays], order.permute(ids)
    again = jax.jit(lambda *x: inside(*x, q_segment_ids=ids, order=order, **said))(*moved)
    assert (order.unpermute(again[0]) == base).all()
    said = {"is_causal": True, "order": order, "q_segment_ids": ids, "kv_segment_ids": ids}
    found = jax.jit(lambda *x: inside.route(*x, **said))(*moved[:2])
    place = order.positions
    low = np.minimum.reduceat(place, np.arange(0, T, SIZE))
    high = np.maximum.reduceat(place, np.arange(0, T, SIZE))
    reached = (low <= high[:, None]).sum(1)
    counts = np.clip(np.floor(0.6 * reached + 0.5), 1, reached)
    assert (np.asarray(found.lists.counts) == counts).all()

    @jax.jit
    def exactly(found, ids, q, k, v):
        mask = jnp.repeat(token_mask(found.lists, T, T), N // K, 1)
        mask &= (place <= place[:, None])[None, None]
        mask &= ((ids[:, :, None] == ids[:, None]) & (ids != 0)[:, None])[:, None]
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        p = jnp.exp(jnp.where(mask, jnp.einsum("BTNH,BSNH->BNTS", q, k) * H**-0.5, -jnp.inf))
        p = p / jnp.where(mask.any(-1, keepdims=True), p.sum(-1, keepdims=True), 1)
        out = jnp.einsum("BNTS,BSNH->BTNH", p, v)
        p = jnp.pad(p, [(0, 0), (0, 0), *[(0, ROWS * SIZE - T)] * 2])
        mass = p.reshape(B, K, N // K, ROWS, SIZE, ROWS, SIZE).sum(-1).max((2, 4))
        mass = jnp.take_along_axis(mass, found.lists.columns, -1) * found.lists.valid
        seen = mass.sum(-1, keepdims=True) > 0
        mass = mass / jnp.where(seen, mass.sum(-1, keepdims=True), 1)
        share = jax.nn.softmax(found.scores, axis=-1, where=found.lists.valid)
        terms = jnp.where(mass > 0, mass * jnp.log(jnp.where(mass > 0, mass / share, 1)), 0)
        return out, terms.sum() / seen.sum()

    assert_exact((again[0], loss), exactly(found, ids, *moved))
    whole, _ = dense(*arrays)
    router.sparsity_ratio = 1.0
    assert_exact(jax.jit(lambda *x: router(*x, is_causal=True))(*arrays), whole)


def test_ids_that_come_later_do_not_choose_a_block(x64):
    """Row 2 begins before the last tokens of block 0, whose first ones are another document."""
    places = np.array([[0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]])
    x, eye = jnp.ones((1, 12, 1, H)), jnp.eye(H)[None]
    routing = Routing(0.67, 4, "first", True, places)
    run = jax.jit(lambda ids: route(x, x, eye, eye, routing, ids, ids).lists.columns[0, 0, 2])
    for later in (1, 2):
        ids = np.where(places < 2, 1, np.where(places < 10, 2, later)).astype(np.int32)
        assert run(ids).tolist() == [1, 2]


def test_inside_branches_each_segment_is_routed_for_itself(rng, x64):
    t, said = 24, {"is_causal": True, "return_lse": True, "return_loss": True}
    ids = packed(rng)[:, 26 : 26 + t]
    router = made(rng, segment_lengths=(8, 48), dilation_rates=(1, 2), block_size=4)
    arrays = heads(rng, t)
    attend = nnx.jit(lambda router, ids, *x: router(*x, q_segment_ids=ids, **said))

    @nnx.jit
    def with_gradients(router, *x):
        def loss(router):
            out, lse, loss = router(*x, q_segment_ids=ids, **said)
            return loss, (out, lse)

        return nnx.value_and_grad(loss, has_aux=True)(router)

    (loss, (out, lse)), gradients = with_gradients(router, *arrays)

    # Segments and residues cut out by hand. At rate 2 heads 0 and 2 have one residue, 1 and 3 the
    # other: of each pair one has the first key head, one the second.
    parts, losses = [], []
    for first, step, mine, width in (
        *((i, 1, np.arange(N), 8) for i in (0, 8, 16)),
        *((i, 2, np.arange(i, N, 2), t) for i in (0, 1)),
    ):
        rows, theirs = slice(first, min(first + width, t), step), mine // 2 if step == 2 else [0, 1]
        alone = adaptive(len(mine), H, num_kv_heads=2, sparsity_ratio=0.5, block_size=4,
                         param_dtype=jnp.float64)  # fmt: skip
        alone.q_weight[...] = router.q_weight[...][mine]
        alone.k_weight[...] = router.k_weight[...][np.array(theirs)]
        q, k, v = (x[:, rows][:, :, np.array(n)] for x, n in zip(arrays, (mine, theirs, theirs),
                                                                 strict=True))  # fmt: skip
        found = attend(alone, ids[:, rows], q, k, v)
        place = np.ix_(range(B), range(t)[rows], mine)
        part = np.zeros((B, t, N, H)), np.full((B, t, N), -np.inf)
        part[0][place], part[1][place] = found[:2]
        parts.append(dilax.Partial(*map(jnp.asarray, part)))
        losses.append((float(found[2]), -(-q.shape[1] // 4)))
    wanted = dilax.merge(*parts)
    assert_exact(out, wanted.out)
    assert_exact(jnp.exp(lse), jnp.exp(wanted.lse))
    values, weights = zip(*losses, strict=True)
    assert abs(float(loss) - np.average(values, weights=weights)) < 1e-10

    (_, changed), _ = with_gradients(router, *(x.at[:, 17:].add(1.0) for x in arrays))
    assert (changed[0][:, :17] == out[:, :17]).all()
    assert all((jnp.abs(g).max((1, 2)) > 0).all() for g in jax.tree.leaves(gradients))
    # Short last segments, heads that take no part and residues without a row.
    router.sparsity_ratio, router.combine, router.dilation_rates = 1.0, "heads", (1, 30)
    arrays = [x[:, :21] for x in arrays]
    by_heads = {"segment_lengths": (8, 48), "dilation_rates": (1, 30), "combine": "heads"}
    whole, _ = jax.jit(functools.partial(reference.dilated_attention, **by_heads))(*arrays)
    assert_exact(jax.jit(lambda *x: router(*x))(*arrays), whole)


def test_inside_branches_along_an_order(rng, x64):
    """Segments of the order, several of them alike, each causal in its own way."""
    order, t, branches = dilax.TokenOrder((5, 7)), 35, ((7, 48), (1, 2))
    ids, arrays, said = packed(rng)[:, 26 : 26 + t], heads(rng, t), {"is_causal": True}
    router = made(rng, segment_lengths=branches[0], dilation_rates=branches[1], order=order,
                  block_size=3)  # fmt: skip

    @nnx.jit
    def attend(router, *x):
        return router(*x, q_segment_ids=ids, return_lse=True, **said)

    out, lse = attend(router, *arrays)
    for at in (4, 17, 30):
        changed, _ = attend(router, *(x.at[:, at:].add(1.0) for x in arrays))
        assert (changed[:, :at] == out[:, :at]).all()
        assert (changed[:, at:] != out[:, at:]).any()

    # All kept: dilated attention of the permuted tokens. Half: only some keys of each row.
    p, lse_of_half = order.positions, lse
    router.sparsity_ratio = 1.0
    out, lse = attend(router, *arrays)
    whole = jax.jit(
        lambda *x: reference.dilated_attention(
            *x, *branches, q_positions=p, q_segment_ids=ids[:, p], **said
        )
    )
    exact, exact_lse = (x[:, order.inverse] for x in whole(*(x[:, p] for x in arrays)))
    assert_exact(out, exact)
    assert_exact(jnp.exp(lse), jnp.exp(exact_lse))
    assert (lse_of_half <= lse + 1e-9).all()
    assert (lse_of_half < lse - 1e-3).any()


def test_positions_may_differ_between_examples(rng, x64):
    """As those of the segments of a branch do: each as alone with its own."""
    q, k = rng.normal(size=(2, 4, 20, 1, H))
    places = np.stack([rng.permutation(20), np.arange(20)])
    places[:, -1] = -1  # no token
    ids = np.where(np.tile(places, (2, 1)) < 0, 0, 1).astype(np.int32)
    eye, lse = jnp.eye(H)[None], jnp.full((4, 20, 1), 0.5)

    def both(places, q, k, ids, lse):
        found = route(q, k, eye, eye, Routing(0.6, 4, "first", True, places), ids, ids)
        at = np.tile(places, (len(q) // len(places), 1))
        said = {"scale": 0.3, "is_causal": True, "positions": at, "segment_ids": (ids, ids)}
        return found, kept_mass(q, k, lse, found.lists, **said)

    run = [jax.jit(functools.partial(both, x)) for x in (places, places[:1], places[1:])]
    found, mass = run[0](q, k, ids, lse)
    assert (found.lists.counts[0] != found.lists.counts[1]).any()
    for i in range(4):
        one = slice(i, i + 1)
        alone, its = run[1 + i % 2](q[one], k[one], ids[one], lse[one])
        n = alone.lists.capacity
        assert (alone.lists.counts == found.lists.counts[one]).all()
        assert (alone.lists.columns == found.lists.columns[one, ..., :n]).all()
        assert_exact(its, mass[one, ..., :n])


def test_examples_of_a_batch_do_not_influence_each_other(rng, x64):
    router, (q, k, v) = made(rng), heads(rng)
    attend = jax.jit(lambda q, k, v: router(q, k, v, is_causal=True))
    both = attend(q, k, v)
    for b in range(B):
        assert_exact(attend(q[b : b + 1], k[b : b + 1], v[b : b + 1]), both[b : b + 1])


def test_examples_may_lie_on_several_devices(rng, x64):
    router, arrays, ids = made(rng, straight_through=True), heads(rng), packed(rng)
    mesh = jax.make_mesh((B,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    where = jax.NamedSharding(mesh, jax.P("data"))

    @nnx.jit
    def both(router, ids, *x):
        def total(router):
            out, loss = router(*x, is_causal=True, q_segment_ids=ids, return_loss=True)
            return jnp.sin(out).sum() + loss, (out, loss)

        (_, found), gradients = nnx.value_and_grad(total, has_aux=True)(router)
        return *found, gradients

    found = both(router, *(jax.device_put(x, where) for x in (ids, *arrays)))
    assert found[0].sharding.spec[0] == "data"
    found = jax.tree.map(np.asarray, found)
    assert_exact(found, jax.tree.map(np.asarray, both(router, ids, *arrays)))


def test_all_blocks_kept_is_dense(rng, x64):
    more = {"add_zero_attn": True, "use_gradient_checkpointing": True}
    router, (q, k, v) = made(rng, sparsity_ratio=1.0, **more), heads(rng)
    exact, _ = dense(q, k, v, zero_attn=True)
    attend = nnx.jit(lambda router: router(q, k, v, is_causal=True))
    assert_exact(attend(router), exact)
    less = attend(made(rng, sparsity_ratio=0.2))
    assert float(jnp.abs(less - exact).max()) > 1e-3


def test_a_router_learns_which_block_holds_what_a_query_needs(rng):
    """One key of a block has a name, its others are noise that hides it in their mean."""
    blocks, noise = 16, (-1.0, 1.0)
    names = np.array(list(itertools.product((-1.5, 1.5), repeat=4)))
    q, k = np.zeros((2, 8, blocks, SIZE, 1, H))
    q[..., 4:], k[..., 4:] = rng.choice(noise, (2, *q.shape[:-1], 4))
    mine = np.stack([rng.permutation(blocks) for _ in range(8)])
    k[:, :, 5, 0] = np.pad(names[mine], [(0, 0), (0, 0), (0, 4)])
    q[:, :, 0, 0, :4] = names[np.roll(mine, 7, axis=1)]
    q, k = (jnp.asarray(x.reshape(8, -1, 1, H), jnp.float32) for x in (q, k))
    options = {"block_size": SIZE, "query_feature": "first", "attention_scale": 1.0}
    router = adaptive(1, H, sparsity_ratio=0.25, **options)

    def kept(router):
        lists = router.route(q, k).lists
        wanted = ((np.arange(blocks) - 7) % blocks).reshape(1, 1, blocks, 1)
        return float(((lists.columns == wanted) & lists.valid).any(-1).mean())

    @nnx.jit
    def step(router):
        gradients = nnx.grad(lambda r: r(q, k, k, return_loss=True)[1])(router)
        nnx.update(router, jax.tree.map(lambda w, g: w - 3.0 * g, nnx.state(router), gradients))

    before = kept(router)
    for _ in range(40):
        step(router)
    assert before < 0.6
    assert kept(router) > 0.85


@pytest.mark.parametrize("name", ["adaptive", "BlockSparseAdaptive", "adaptive_standard"])
def test_the_selector_knows_its_names(name):
    sizes = {"embed_dim": 32, "num_heads": 4, "implementation": "xla"}
    for factory in (dilax.create_dilated_attention, dilax.create_block_sparse_attention):
        made = factory(name, **sizes)
        assert isinstance(made, dilax.AdaptiveAttention)
        assert (made.sparsity_ratio, made.block_size, made.head_dim) == (0.1, 128, 8)
    options = {"num_kv_heads": 2, "layer_norm": True, "add_zero_attn": True}
    layer = dilax.create_multihead_dilated_attention(name, 32, 4, **options)
    assert isinstance(layer.attention, dilax.AdaptiveAttention)
    assert layer.attention.add_zero_attn
    assert (layer.num_kv_heads, layer.attention.num_kv_heads) == (2, 2)
    sizes = {"seq_len": 4096, "dtype": "bfloat16", "device_kind": "NVIDIA H100 80GB HBM3"}
    assert dilax.explain(name, **sizes).implementation == "pallas"
    if name == "adaptive":
        said = dilax.explain(name, **sizes, sparsity_ratio=0.3, block_size=64, head_dim=184)
        assert "30% of them" in said.variant
        assert said.implementation == "xla"  # no kernel takes such heads with such blocks
    wrong = {"sparsity_ratio": 2.0, "block_size": 0}
    own = {"sparsity_ratio": 0.3, "block_size": 64} if name == "adaptive_standard" else {}
    for option, x in ({"pattern_type": "local_window"} | wrong | own).items():
        with pytest.raises(ValueError, match=f"^{option}: wanted"):
            dilax.explain(name, **sizes, **{option: x})


def test_a_module_with_a_router_is_attention_between_projections(rng):
    x = jnp.asarray(rng.normal(size=(1, 40, 32)), jnp.float32)
    layer = dilax.create_multihead_dilated_attention(
        "adaptive", 32, 4, block_size=SIZE, sparsity_ratio=0.5, use_gradient_checkpointing=True,
        implementation="xla",
    )  # fmt: skip

    @nnx.jit
    def run(layer):
        def total(layer):
            out, loss = layer(x, is_causal=True, return_loss=True)
            return loss, out

        q, k, v = layer._heads((x,))
        plain = layer.out_proj(layer.attention(q, k, v, is_causal=True).reshape(x.shape))
        return *nnx.value_and_grad(total, has_aux=True)(layer), plain

    (loss, out), gradients, plain = run(layer)
    assert float(jnp.abs(out - plain).max()) < 1e-5
    assert float(loss) > 0
    for path, gradient in jax.tree.leaves_with_path(gradients):  # of the router, of nothing else
        assert bool((gradient != 0).any()) == ("attention" in jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("embed_dim", {"num_heads": 4}),
        ("embed_dim", {"embed_dim": 30, "num_heads": 4}),
        ("dilation_rates", {"segment_lengths": [8], "embed_dim": 32, "num_heads": 4}),
        ("pad_mode: .*lies in no block", {"pad_mode": "zeros"}),
        ("axis_name: .*the tokens lie on one device", {"axis_name": "seq"}),
        ("grid: .*say `order`", {"grid": (4, 8)}),
        ("sparse_config", {"sparse_config": "local", "embed_dim": 32, "num_heads": 4}),
        ("head_dim", {"head_dim": 8, "embed_dim": 32, "num_heads": 4}),
        ("use_flash_attn", {"use_flash_attn": 1, "embed_dim": 32, "num_heads": 4}),
    ],
)
def test_the_selector_refuses_by_name(name, options):
    options = {"embed_dim": 32, "num_heads": 4} | options if ":" in name else options
    with pytest.raises(ValueError, match=f"^{name if ':' in name else f'{name}: wanted'}"):
        dilax.create_block_sparse_attention("adaptive", **options)


def test_explain_refuses_branches_as_the_factories_do():
    with pytest.raises(ValueError, match=r"^segment_lengths: wanted None with kind 'adaptive'"):
        dilax.explain("adaptive", seq_len=4096, segment_lengths=[64], dilation_rates=[1])


def test_presets_and_modules_refuse_what_they_say_themselves():
    sizes = {"embed_dim": 32, "num_heads": 4}
    with pytest.raises(ValueError, match=r"^sparsity_ratio: wanted"):
        dilax.create_block_sparse_attention("adaptive_standard", sparsity_ratio=0.2, **sizes)
    with pytest.raises(ValueError, match=r"^combine: wanted 'lse' without"):
        dilax.create_multihead_dilated_attention("adaptive", 32, 4, combine="heads")
    said = {"combine": "lse", "mesh": None, "ring_size": 1}
    dilax.create_multihead_dilated_attention("adaptive", 32, 4, **said)
    for size in (2, True):
        with pytest.raises(ValueError, match="ring_size: wanted its default with kind 'adaptive'"):
            dilax.create_multihead_dilated_attention("adaptive", 32, 4, ring_size=size)
    branches = {"segment_lengths": [8, 16], "dilation_rates": [1, 2], "combine": "heads"}
    inside = dilax.create_multihead_dilated_attention("adaptive", 32, 4, **branches).attention
    assert isinstance(inside, dilax.AdaptiveAttention)
    assert (inside.segment_lengths, inside.combine) == ((8, 16), "heads")
    layer = dilax.MultiheadDilatedAttention(32, 4, [8], [1], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^return_loss: wanted"):
        layer(jnp.zeros((1, 8, 32)), return_loss=True)


CALL, ORDER = {"is_causal": True}, dilax.TokenOrder((9, 10))


@pytest.mark.parametrize(
    ("name", "options", "call"),
    [
        ("sparsity_ratio", {"sparsity_ratio": 0.0}, None),
        ("sparsity_ratio", {"sparsity_ratio": 1.5}, None),
        ("sparsity_ratio", {}, CALL | {"sparsity_ratio": True}),
        ("num_kv_heads", {"num_kv_heads": 3}, None),
        ("block_size", {"block_size": 0}, None),
        ("query_feature", {"query_feature": "last"}, None),
        ("query_feature", {"query_feature": "mean"}, CALL),
        ("loss_target", {"loss_target": "sum"}, None),
        ("straight_through", {"straight_through": 1}, None),
        (
            "straight_through",
            {"straight_through": True, "dropout": 0.5},
            CALL | {"dropout_key": np.zeros(2, np.uint32)},
        ),
        ("dropout_key", {"dropout": 0.5}, CALL),
        ("return_loss", {}, CALL | {"return_loss": "yes"}),
        ("zero_attn", {}, CALL | {"zero_attn": 1}),
        ("add_zero_attn", {"add_zero_attn": 1}, None),
        ("use_gradient_checkpointing", {"use_gradient_checkpointing": "all"}, None),
        ("implementation", {"implementation": "cuda"}, None),
        ("bias_v", {"use_gradient_checkpointing": True}, {"bias_k": "key"}),
        ("order", {"order": "hilbert"}, None),
        ("order", {"order": ORDER}, {"order": ORDER}),
        ("query_feature", {"query_feature": "previous"}, CALL | {"order": ORDER}),
        ("query", {}, {"order": dilax.TokenOrder((3, 4))}),
        ("combine", {"combine": "heads"}, None),
        (
            "query_feature",
            {
                "order": ORDER,
                "query_feature": "previous",
                "segment_lengths": [8],
                "dilation_rates": [1],
            },
            CALL,
        ),
        (
            "query",
            {"segment_lengths": [8], "dilation_rates": [1]},
            {"order": dilax.TokenOrder((3, 4))},
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(name, options, call, rng):
    x = np.zeros((B, T, N, H), np.float32)

    def use():
        made = adaptive(N, H, **({"num_kv_heads": K, "block_size": SIZE} | options))
        made(x, x[:, :, :K], x[:, :, :K], **(call or {}))

    with pytest.raises(ValueError, match=rf"^{name}: wanted"):
        use()


def test_shapes_that_do_not_fit_are_refused():
    x = jnp.zeros((1, 32, 4, 8))
    router = adaptive(4, 8, block_size=SIZE)
    for name, arrays in (
        ("query", (x[:, :, :2], x[:, :, :2], x[:, :, :2])),
        ("key", (x, x[:, :, :2], x[:, :, :2])),
        ("key", (x, x[:, :16], x[:, :16])),
    ):
        for use in (router, lambda q, k, _, **said: router.route(q, k, **said)):
            with pytest.raises(ValueError, match=rf"^{name}: wanted"):
                use(*arrays, is_causal=True)
    ids = np.ones((1, 32), np.int64)
    for name, said in (("order", "hilbert"), ("query", ORDER), ("is_causal", 1),
                       ("q_segment_ids", ids), ("key_padding_mask", ids)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: wanted"):
            router.route(x, x, **{"order" if name == "query" else name: said})
    with pytest.raises(ValueError, match=r"^head_dim: wanted a multiple of 8"):
        dilax.AdaptiveAttention(4, 12)


def test_everything_kept_is_dense_whatever_the_ids(rng):
    """Causally the first token of a block does not say which documents the others belong to."""
    q, k, v = (jnp.asarray(rng.normal(size=(2, 64, 2, 8)), jnp.float32) for _ in range(3))
    ids = [[1] * 32 + [0] + [1] * 31, [1] * 20 + [2] * 16 + [1] * 28]
    said = {"is_causal": True, "q_segment_ids": jnp.asarray(ids, jnp.int32)}
    layer = adaptive(2, 8, block_size=16, sparsity_ratio=1.0)
    whole = dilax.patterns.LocalWindow(1.0, block_size=16)
    found = jax.jit(lambda *x: layer(*x, deterministic=True, **said))(q, k, v)
    blocks = functools.partial(dilax.block_sparse_attention, implementation="xla", **said)
    wanted = jax.jit(lambda *x: blocks(*x, whole))(q, k, v)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
