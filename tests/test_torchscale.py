"""Microsoft's torchscale: golden results, its weights, and its known bugs, not to return."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import dilax
from benchmarks import gpu_peers
from benchmarks.gpu_lab import Shape
from dilax import reference
from dilax.longnet import LongNetDecoder, LongNetEncoder
from dilax.longnet_config import LongNetConfig
from dilax.torchscale import from_torchscale
from tests.compare import FACTOR, assert_exact, error

DATA = pathlib.Path(__file__).parent / "data"
ATTENTION = sorted(path.stem for path in DATA.glob("torchscale_*.npz"))


def _encoder_case():
    with np.load(DATA / "longnet_encoder_small.npz") as stored:
        case = dict(stored)
    state = {n.removeprefix("state."): x for n, x in case.items() if n.startswith("state.")}
    assert len(state) == 2 * 20 + 2
    return case, state


def _sizes(case):
    return {
        "num_heads": int(case["num_heads"]),
        "segment_lengths": case["segment_lengths"].tolist(),
        "dilation_rates": case["dilation_rates"].tolist(),
    }


def test_golden_cases_are_all_there():
    assert ATTENTION == [
        "torchscale_causal",
        "torchscale_heads_not_divisible",
        "torchscale_plain",
        "torchscale_ragged_tail",
    ]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("attention", [dilax.dilated_attention, reference.dilated_attention])
def test_golden_attention(name, attention, x64):
    with np.load(DATA / f"{name}.npz") as case:
        attend = functools.partial(
            attention,
            segment_lengths=case["segment_lengths"].tolist(),
            dilation_rates=case["dilation_rates"].tolist(),
            is_causal=bool(case["is_causal"]),
            head_offset=str(case["head_offset"]),
            pad_mode=str(case["pad_mode"]),
        )
        result = jax.jit(attend)(*(case[x] for x in ("query", "key", "value")))
        out = result if attention is dilax.dilated_attention else result[0]
        assert_exact(jnp.asarray(out), case["out"])


def test_the_benchmark_checks_torch_with_what_torchscale_gives(x64):
    with np.load(DATA / "torchscale_ragged_tail.npz") as case:
        lists = zip(case["segment_lengths"].tolist(), case["dilation_rates"].tolist(), strict=True)
        T, _, H = case["query"].shape[1:]
        attend = gpu_peers.attention("torchscale in float64", Shape("", tuple(lists), T, H))
        out = jax.jit(attend)(*(jnp.asarray(case[x]) for x in ("query", "key", "value")))
        assert_exact(out, case["out"])


@functools.cache
def _attend(*branches):
    options = dict(head_offset="blocked", pad_mode="zeros")
    return jax.jit(lambda q, k, v: dilax.dilated_attention(q, k, v, *branches, **options))


def _formula(case, state, gelu):
    """The original encoder in NumPy, around an attention that has golden results of its own."""

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    sizes, x = _sizes(case), case["input"]
    branches = sizes["segment_lengths"], sizes["dilation_rates"]
    B, T, E = x.shape
    attend = _attend(*map(tuple, branches))
    for i in range(2):
        h = norm(x, f"layers.{i}.self_attn_layer_norm")
        qkv = (linear(h, f"layers.{i}.self_attn.{c}_proj").reshape(B, T, 4, -1) for c in "qkv")
        h = attend(*map(jnp.asarray, qkv))
        h = norm(np.asarray(h).reshape(B, T, E), f"layers.{i}.self_attn.inner_attn_ln")
        x = x + linear(h, f"layers.{i}.self_attn.out_proj")
        h = gelu(linear(norm(x, f"layers.{i}.final_layer_norm"), f"layers.{i}.ffn.fc1"))
        x = x + linear(norm(h, f"layers.{i}.ffn.ffn_layernorm"), f"layers.{i}.ffn.fc2")
    return norm(x, "layer_norm")


def _gelu(x):
    """The exact GELU, in the dtype of x."""
    half = x.dtype.type(0.5)
    return x * half * (1 + np.vectorize(math.erf)(x * half**0.5).astype(x.dtype))


def test_golden_encoder_by_original_names(x64):
    """The original rounds its GELU to float32 whatever the dtype; all the rest is float64.

    So this model, in float64 throughout, equals the formula to 1e-10, and the golden output as
    closely as the formula does whose GELU is rounded.
    """
    case, state = _encoder_case()
    model = from_torchscale(state, **_sizes(case))
    about = json.loads(str(case["config"]))
    assert (model.config.embed_dim, model.config.num_layers) == (about["embed"], about["layers"])
    assert (model.config.ffn_dim, model.config.layer_norm_eps) == (about["ffn"], 1e-5)
    assert model.config.param_dtype == "float64"
    out = nnx.jit(model)(jnp.asarray(case["input"]))
    assert_exact(out, _formula(case, state, _gelu))
    rounded = _formula(case, state, lambda x: _gelu(x.astype(np.float32)).astype(np.float64))
    assert error(out, case["out"]) <= FACTOR * error(rounded, out)
    assert error(rounded, out) < 1e-7


NAMES = {
    "self_attn.q_proj.weight": lambda m: m.layers.attention.query_proj.kernel,
    "self_attn.q_proj.bias": lambda m: m.layers.attention.query_proj.bias,
    "self_attn.k_proj.weight": lambda m: m.layers.attention.key_proj.kernel,
    "self_attn.k_proj.bias": lambda m: m.layers.attention.key_proj.bias,
    "self_attn.v_proj.weight": lambda m: m.layers.attention.value_proj.kernel,
    "self_attn.v_proj.bias": lambda m: m.layers.attention.value_proj.bias,
    "self_attn.out_proj.weight": lambda m: m.layers.attention.out_proj.kernel,
    "self_attn.out_proj.bias": lambda m: m.layers.attention.out_proj.bias,
    "self_attn.inner_attn_ln.weight": lambda m: m.layers.attention.norm.scale,
    "self_attn.inner_attn_ln.bias": lambda m: m.layers.attention.norm.bias,
    "self_attn_layer_norm.weight": lambda m: m.layers.attention_norm.scale,
    "self_attn_layer_norm.bias": lambda m: m.layers.attention_norm.bias,
    "ffn.fc1.weight": lambda m: m.layers.ffn.fc1.kernel,
    "ffn.fc1.bias": lambda m: m.layers.ffn.fc1.bias,
    "ffn.fc2.weight": lambda m: m.layers.ffn.fc2.kernel,
    "ffn.fc2.bias": lambda m: m.layers.ffn.fc2.bias,
    "ffn.ffn_layernorm.weight": lambda m: m.layers.ffn.norm.scale,
    "ffn.ffn_layernorm.bias": lambda m: m.layers.ffn.norm.bias,
    "final_layer_norm.weight": lambda m: m.layers.ffn_norm.scale,
    "final_layer_norm.bias": lambda m: m.layers.ffn_norm.bias,
}


def test_every_weight_lands_in_its_place(rng, tmp_path):
    """Norms and biases too, which a freshly made original model leaves at 1 and 0."""
    case, state = _encoder_case()
    state = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in state.items()}
    path = tmp_path / "weights.npz"
    np.savez(path, **{f"encoder.{name}": x for name, x in state.items()})
    model = from_torchscale(path, prefix="encoder.", **_sizes(case))
    assert {f"layers.{i}.{name}" for i in (0, 1) for name in NAMES} == {
        name for name in state if name.startswith("layers.")
    }
    for name, found in NAMES.items():
        for i in (0, 1):
            np.testing.assert_array_equal(found(model)[i], state[f"layers.{i}.{name}"].T)
    np.testing.assert_array_equal(model.norm.scale, state["layer_norm.weight"])
    np.testing.assert_array_equal(model.norm.bias, state["layer_norm.bias"])


def test_safetensors_file_and_unknown_names(tmp_path):
    case, state = _encoder_case()
    state = {name: x.astype(np.float32) for name, x in state.items()}
    without = {name: x for name, x in state.items() if not name.startswith("layer_norm")}
    path = tmp_path / "weights.safetensors"
    save_file({"cls_token": np.ones(3, np.float32), **without}, path)
    with pytest.raises(ValueError, match="cls_token"):
        from_torchscale(path, **_sizes(case))
    model = from_torchscale(path, unknown="ignore", dropout=0.5, **_sizes(case))
    assert model.norm is None
    assert not model.config.final_norm
    assert model.config.dropout == 0.5
    np.testing.assert_array_equal(
        model.layers.ffn.fc1.kernel[1], state["layers.1.ffn.fc1.weight"].T
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.1.ffn.fc2.bias"), r"also layers\.1\.ffn\.fc2\.bias"),
        (lambda s: s.pop("layers.0.self_attn.q_proj.weight"), "q_proj"),
        (lambda s: s.update({"layers.0.surprise": np.ones(2)}), r"layers\.0\.surprise"),
        (lambda s: s.update({"layers.0.ffn.fc2.bias": np.ones(7)}), r"fc2\.bias.*\[32\].*\[7\]"),
        (lambda s: s.pop("layer_norm.bias"), r"also layer_norm\.bias"),
        (lambda s: s.update({"layers.3.ffn.fc1.bias": np.ones(64)}), r"layers\.2\."),
    ],
)
def test_wrong_weights_are_refused_by_name(change, message):
    case, state = _encoder_case()
    change(state)
    with pytest.raises(ValueError, match=message):
        from_torchscale(state, **_sizes(case))


@pytest.mark.parametrize(
    ("weights", "message"),
    [("absent.npz", "exists"), (__file__, "safetensors or .npz"), (3, "mapping")],
)
def test_wrong_sources_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        from_torchscale(weights, num_heads=4, segment_lengths=[8], dilation_rates=[1])


# The known bugs of torchscale, SEMANTICS.md section 2.


def _qkv(rng, T, N=4, H=8):
    return tuple(jnp.asarray(rng.normal(size=(1, T, N, H))) for _ in range(3))


def _union(q, k, v, w, r, offsets, is_causal):
    """One branch as a masked softmax, position by position."""
    T, N = q.shape[1:3]
    p = np.arange(T)
    out = np.zeros(q.shape)
    for n in range(N):
        kept = p % w % r == offsets[n]
        see = (p[:, None] // w == p // w) & kept[:, None] & kept
        see &= (p[:, None] >= p) | (not is_causal)
        s = np.where(see, np.asarray(q[0, :, n] @ k[0, :, n].T) / q.shape[-1] ** 0.5, -np.inf)
        e = np.where(see, np.exp(s - np.where(kept, s.max(1), 0)[:, None]), 0)
        out[0, :, n] = e @ np.asarray(v[0, :, n]) / np.where(kept, e.sum(1), 1)[:, None]
    return out


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_shift_when_the_rate_does_not_divide_the_segment(is_causal, rng, x64):
    """torchscale shifts segment s right by s (ceil(w / r) r - w) and loses the tail."""
    q, k, v = _qkv(rng, 30)
    out = dilax.dilated_attention(q, k, v, [10], [4], is_causal=is_causal, head_offset="blocked")
    assert_exact(out, _union(q, k, v, 10, 4, [0, 1, 2, 3], is_causal))


SHARDS = np.split(np.arange(16), 2)


def test_causal_sequence_parallel_is_not_wrong(rng, x64):
    """torchscale masks each shard of the queries as if it began where the gathered keys begin.

    Shards of 8 with segments shorter than one, across their edge, and longer: the queries of a
    shard over one shard of the keys after the other equal the whole.
    """
    q, k, v = _qkv(rng, 16)
    branches = {"segment_lengths": [5, 16], "dilation_rates": [2, 3], "is_causal": True}

    def attend(queries, keys):
        starts = {"q_start": int(queries[0]), "k_start": int(keys[0])}
        run = functools.partial(dilax.dilated_attention, **branches, **starts, return_lse=True)
        return dilax.Partial(*jax.jit(run)(q[:, queries], k[:, keys], v[:, keys]))

    def joined(shards):
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *shards)

    everything = np.arange(16)
    exact = jax.jit(functools.partial(reference.dilated_attention, **branches))(q, k, v)
    whole = attend(everything, everything)
    assert_exact(whole, dilax.Partial(*exact))
    hops = [dilax.merge(*(attend(queries, keys) for keys in SHARDS)) for queries in SHARDS]
    assert_exact(joined(hops), whole)


def test_key_padding_is_not_ignored(rng, x64):
    """torchscale takes a padding mask and attends to the padding."""
    config = LongNetConfig(32, 4, 2, 48, (8, 16), (1, 2), param_dtype="float64", position=None)
    encoder = LongNetEncoder(config, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(1, 20, 32)))
    ids = jnp.asarray(np.arange(20)[None] < 13, jnp.int32)
    other = x.at[:, 13:].set(rng.normal(size=(1, 7, 32)))
    run = nnx.jit(encoder)
    out = run(x, segment_ids=ids)[:, :13]
    assert_exact(out, run(other, segment_ids=ids)[:, :13])
    assert error(run(x)[:, :13], run(other)[:, :13]) > 1e-3
    assert_exact(out, run(x[:, :13]))  # also as if the padding were not there


def test_dropout_does_not_act_in_evaluation(rng):
    """torchscale passes its dropout rate to the kernel in evaluation too."""
    sizes = dict(embed_dim=32, num_heads=4, num_layers=1, ffn_dim=48)
    branches = dict(segment_lengths=(16,), dilation_rates=(2,))
    plain = LongNetConfig(**sizes, **branches)
    drops = LongNetConfig(**sizes, **branches, attention_dropout=0.5, dropout=0.5)
    x = jnp.asarray(rng.normal(size=(1, 20, 32)), jnp.float32)
    model = LongNetDecoder(drops, rngs=nnx.Rngs(params=0, dropout=1))
    same = LongNetDecoder(plain, rngs=nnx.Rngs(params=0, dropout=1))
    exact = nnx.jit(same)(x)
    run = nnx.jit(lambda model, x, rngs: model(x, rngs=rngs))
    np.testing.assert_array_equal(run(model, x, nnx.Rngs(dropout=1)), exact)
    drop = nnx.jit(lambda model, x, rngs: model(x, deterministic=False, rngs=rngs))
    assert error(drop(model, x, nnx.Rngs(dropout=1)), exact) > 1e-2


def test_a_true_lse_of_zero_counts(rng, x64):
    """torchscale takes an lse of exactly 0 for a position that the branch does not cover.

    With one key per query in the first branch, and a logit of 0, that branch's lse is log(1) = 0.
    """
    _, k, v = _qkv(rng, 4)
    q = jnp.zeros_like(k)
    out, lse = dilax.dilated_attention(q, k, v, [1], [1], return_lse=True)
    np.testing.assert_array_equal(lse, 0.0)
    assert_exact(out, v)
    out, lse = dilax.dilated_attention(q, k, v, [1, 4], [1, 1], return_lse=True)
    assert_exact(lse, np.full((1, 4, 4), np.log(5.0)))
    assert_exact(out, (v + v.sum(1, keepdims=True)) / 5)
