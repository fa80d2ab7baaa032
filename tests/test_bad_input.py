"""Every wrong argument is refused by name, with what was wanted and what came, before compute.

All arrays of the calls are `jax.ShapeDtypeStruct`: whoever computes with one raises a TypeError.
"""

import inspect
import re

import jax
import numpy as np
import pytest

import dilax
from dilax import UnsupportedError

B, T, S, N, K, H = 2, 12, 12, 4, 2, 8


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def ids(*shape, dtype="int32"):
    return array(*shape, dtype=dtype)


Q, KV = array(B, T, N, H), array(B, S, K, H)
BASE = {
    "query": Q, "key": KV, "value": KV, "segment_lengths": [4, 8], "dilation_rates": [1, 2],
}  # fmt: skip
DROP = {"dropout_rate": 0.5, "deterministic": False}


def sized(b=B, t=T, s=S, n=N, k=K, h=H, dtype="float32"):
    """query, key and value of these sizes."""
    kv = array(b, s, k, h, dtype=dtype)
    return {"query": array(b, t, n, h, dtype=dtype), "key": kv, "value": kv}


# name of the argument, (part of) what came, what is changed in a good call
BAD = {
    # Shapes.
    "query rank": ("query", "float32[12,4,8]", {"query": array(T, N, H)}),
    "key rank": ("key", "float32[2,12,16]", {"key": array(B, S, K * H)}),
    "value rank": ("value", "float32[2,12,2,8,1]", {"value": array(B, S, K, H, 1)}),
    "query is a scalar": ("query", "float32[]", {"query": array()}),
    "B=0": ("query", "float32[0,12,4,8]", sized(b=0)),
    "T=0": ("query", "float32[2,0,4,8]", sized(t=0)),
    "S=0": ("key", "float32[2,0,2,8]", sized(s=0)),
    "N=0": ("query", "float32[2,12,0,8]", sized(n=0)),
    "K=0": ("key", "float32[2,12,0,8]", sized(k=0)),
    "H=0": ("query", "float32[2,12,4,0]", sized(h=0)),
    "H=7": ("query", "float32[2,12,4,7]", sized(h=7)),
    "H=12": ("query", "float32[2,12,4,12]", sized(h=12)),
    "H=264": ("query", "float32[2,12,4,264]", sized(h=264)),
    "K does not divide N": ("key", "float32[2,12,3,8]", sized(k=3)),
    "more kv heads than heads": ("key", "float32[2,12,8,8]", sized(k=8)),
    "key of another batch": ("key", "float32[3,12,2,8]", {"key": array(3, S, K, H)}),
    "value of another batch": ("value", "float32[3,12,2,8]", {"value": array(3, S, K, H)}),
    "key of another head dim": ("key", "float32[2,12,2,16]", {"key": array(B, S, K, 16)}),
    "value of another head dim": ("value", "float32[2,12,2,16]", {"value": array(B, S, K, 16)}),
    "value of another length": ("value", "float32[2,13,2,8]", {"value": array(B, 13, K, H)}),
    "value of other heads": ("value", "float32[2,12,4,8]", {"value": array(B, S, 4, H)}),
    # Dtypes and things that are no arrays.
    "int query": ("query", "int32[2,12,4,8]", {"query": array(B, T, N, H, dtype="int32")}),
    "complex": ("query", "complex64[2,12,4,8]", sized(dtype="complex64")),
    "bool key": ("key", "bool[2,12,2,8]", {"key": array(B, S, K, H, dtype="bool")}),
    "float8": ("query", "float8_e4m3fn[2,12,4,8]", sized(dtype="float8_e4m3fn")),
    "mixed key": ("key", "bfloat16[2,12,2,8]", {"key": array(B, S, K, H, dtype="bfloat16")}),
    "mixed value": ("value", "float16[2,12,2,8]", {"value": array(B, S, K, H, dtype="float16")}),
    "query is None": ("query", "None", {"query": None}),
    "query is a list": ("query", "[[1.0]]", {"query": [[1.0]]}),
    "value is a string": ("value", "'value'", {"value": "value"}),
    # Segments and rates.
    "no rates": ("dilation_rates", "None", {"dilation_rates": None}),
    "no segments": ("segment_lengths", "None", {"segment_lengths": None}),
    "0-d segment": ("segment_lengths", "int64[]", {"segment_lengths": np.array(8)}),
    "2-d segments": ("segment_lengths", "int64[2,1]", {"segment_lengths": np.array([[4], [8]])}),
    "bytes": ("segment_lengths", "b'48'", {"segment_lengths": b"48"}),
    "dict": ("segment_lengths", "{4: 1, 8: 2}", {"segment_lengths": {4: 1, 8: 2}}),
    "set": ("dilation_rates", "{1, 2}", {"dilation_rates": {1, 2}}),
    "int segment": ("segment_lengths", "8", {"segment_lengths": 8}),
    "int rate": ("dilation_rates", "2", {"dilation_rates": 2}),
    "string segments": ("segment_lengths", "'48'", {"segment_lengths": "48"}),
    "string in segments": ("segment_lengths[1]", "'8'", {"segment_lengths": [4, "8"]}),
    "float segment": ("segment_lengths[0]", "4.0", {"segment_lengths": [4.0, 8]}),
    "fractional rate": ("dilation_rates[1]", "1.5", {"dilation_rates": [1, 1.5]}),
    "zero segment": ("segment_lengths[0]", "0", {"segment_lengths": [0, 8]}),
    "negative segment": ("segment_lengths[0]", "-4", {"segment_lengths": [-4, 8]}),
    "zero rate": ("dilation_rates[1]", "0", {"dilation_rates": [1, 0]}),
    "negative rate": ("dilation_rates[0]", "-1", {"dilation_rates": [-1, 2]}),
    "bool rate": ("dilation_rates[0]", "True", {"dilation_rates": [True, 2]}),
    "None in rates": ("dilation_rates[1]", "None", {"dilation_rates": [1, None]}),
    "nested segments": ("segment_lengths[0]", "[4, 8]", {"segment_lengths": [[4, 8]]}),
    "more segments": ("dilation_rates", "[1, 2]", {"segment_lengths": [4, 8, 12]}),
    "more rates": ("dilation_rates", "[1, 2, 4]", {"dilation_rates": [1, 2, 4]}),
    "empty": ("segment_lengths", "[]", {"segment_lengths": [], "dilation_rates": []}),
    "empty rates": ("dilation_rates", "[]", {"dilation_rates": []}),
    "decreasing": ("segment_lengths", "[8, 4]", {"segment_lengths": [8, 4]}),
    "spec and rates": (
        "dilation_rates", "[1, 2]", {"segment_lengths": dilax.DilatedSpec((4, 8), (1, 2))},
    ),
    "spec as rates": (
        "dilation_rates", "DilatedSpec", {"dilation_rates": dilax.DilatedSpec((4, 8), (1, 2))},
    ),
    # Names.
    "combine": ("combine", "'sum'", {"combine": "sum"}),
    "combine None": ("combine", "None", {"combine": None}),
    "more branches than heads": (
        "combine", "4",
        {"combine": "heads", "segment_lengths": [4] * 5, "dilation_rates": [1] * 5},
    ),
    "head_offset": ("head_offset", "'torchscale'", {"head_offset": "torchscale"}),
    "head_offset with heads": ("head_offset", "0", {"head_offset": 0, "combine": "heads"}),
    "pad_mode": ("pad_mode", "'zero'", {"pad_mode": "zero"}),
    "implementation": ("implementation", "'cudnn'", {"implementation": "cudnn"}),
    "implementation number": ("implementation", "1", {"implementation": 1}),
    # True or False.
    # The name is looked at before anything that other arguments ask for.
    "implementation with everything": (
        "implementation", "'cudnn'",
        {
            "key_padding_mask": array(B, S, dtype="bool"), "zero_attn": True, "pad_mode": "zeros",
            "bias_k": array(K, H), "bias_v": array(K, H), "implementation": "cudnn",
        },
    ),
    "ids with dropout": (
        "q_segment_ids", "int32[12]",
        {**DROP, "dropout_key": array(2, dtype="uint32"), "q_segment_ids": ids(T)},
    ),
    "is_causal": ("is_causal", "1", {"is_causal": 1}),
    "is_causal None": ("is_causal", "None", {"is_causal": None}),
    "zero_attn": ("zero_attn", "'yes'", {"zero_attn": "yes"}),
    "return_lse": ("return_lse", "0", {"return_lse": 0}),
    "average_branches": ("average_branches", "'mean'", {"average_branches": "mean"}),
    "deterministic": ("deterministic", "None", {"deterministic": None}),
    # Numbers.
    "scale": ("scale", "'0.5'", {"scale": "0.5"}),
    "scale bool": ("scale", "True", {"scale": True}),
    "scale nan": ("scale", "nan", {"scale": float("nan")}),
    "scale inf": ("scale", "inf", {"scale": float("inf")}),
    "scale array": ("scale", "float32[4]", {"scale": array(4)}),
    "q_start": ("q_start", "-1", {"q_start": -1}),
    "q_start float": ("q_start", "1.0", {"q_start": 1.0}),
    "q_start bool": ("q_start", "True", {"q_start": True}),
    "k_start": ("k_start", "'0'", {"k_start": "0"}),
    "k_start None": ("k_start", "None", {"k_start": None}),
    "k_start array": ("k_start", "int32[1]", {"k_start": np.zeros(1, np.int32)}),
    # Masks and ids.
    "q ids shape": ("q_segment_ids", "int32[12]", {"q_segment_ids": ids(T)}),
    "q ids length": ("q_segment_ids", "int32[2,11]", {"q_segment_ids": ids(B, 11)}),
    "q ids batch": ("q_segment_ids", "int32[1,12]", {"q_segment_ids": ids(1, T)}),
    "q ids dtype": ("q_segment_ids", "float32[2,12]", {"q_segment_ids": array(B, T)}),
    "q ids int8": ("q_segment_ids", "int8[2,12]", {"q_segment_ids": ids(B, T, dtype="int8")}),
    "q ids list": ("q_segment_ids", "[[1]]", {"q_segment_ids": [[1]]}),
    "kv ids alone": ("q_segment_ids", "None", {"kv_segment_ids": ids(B, S)}),
    "kv ids length": (
        "kv_segment_ids", "int32[2,13]", {"q_segment_ids": ids(B, T), "kv_segment_ids": ids(B, 13)},
    ),
    "kv ids dtype": (
        "kv_segment_ids", "bool[2,12]",
        {"q_segment_ids": ids(B, T), "kv_segment_ids": ids(B, S, dtype="bool")},
    ),
    "kv ids missing": ("kv_segment_ids", "None", sized(s=9) | {"q_segment_ids": ids(B, T)}),
    "padding dtype": ("key_padding_mask", "int32[2,12]", {"key_padding_mask": ids(B, S)}),
    "padding shape": (
        "key_padding_mask", "bool[2,4,12]", {"key_padding_mask": array(B, N, S, dtype="bool")},
    ),
    "padding length": (
        "key_padding_mask", "bool[2,11]", {"key_padding_mask": array(B, 11, dtype="bool")},
    ),
    # Extra keys and padding keys.
    "bias_k alone": ("bias_v", "None", {"bias_k": array(K, H)}),
    "bias_v alone": ("bias_k", "None", {"bias_v": array(K, H)}),
    "bias_k shape": (
        "bias_k", "float32[4,8]", {"bias_k": array(N, H), "bias_v": array(K, H)},
    ),
    "bias_v shape": (
        "bias_v", "float32[1,1,2,8]", {"bias_k": array(K, H), "bias_v": array(1, 1, K, H)},
    ),
    "bias_k dtype": (
        "bias_k", "bfloat16[2,8]",
        {"bias_k": array(K, H, dtype="bfloat16"), "bias_v": array(K, H)},
    ),
    "zeros across": ("pad_mode", "'zeros'", sized(s=9) | {"pad_mode": "zeros"}),
    "zeros and start": ("pad_mode", "'zeros'", {"pad_mode": "zeros", "k_start": 4, "q_start": 4}),
    # Dropout.
    "rate 1": ("dropout_rate", "1.0", {"dropout_rate": 1.0}),
    "rate above 1": ("dropout_rate", "10", {"dropout_rate": 10}),
    "rate negative": ("dropout_rate", "-0.1", {"dropout_rate": -0.1}),
    "rate nan": ("dropout_rate", "nan", {"dropout_rate": float("nan")}),
    "rate string": ("dropout_rate", "'0.1'", {"dropout_rate": "0.1"}),
    "rate bool": ("dropout_rate", "False", {"dropout_rate": False}),
    "rate None": ("dropout_rate", "None", {"dropout_rate": None}),
    "rate array": ("dropout_rate", "float32[]", {"dropout_rate": array()}),
    "no key": ("dropout_key", "None", DROP),
    "key is an int": ("dropout_key", "0", {**DROP, "dropout_key": 0}),
    "key is floats": ("dropout_key", "float32[2]", {**DROP, "dropout_key": array(2)}),
    "keys": ("dropout_key", "uint32[3,2]", {**DROP, "dropout_key": array(3, 2, dtype="uint32")}),
    "empty key": ("dropout_key", "uint32[0]", {**DROP, "dropout_key": array(0, dtype="uint32")}),
    "key unused but wrong": ("dropout_key", "'key'", {"dropout_key": "key"}),
}  # fmt: skip


def test_the_good_call_is_good():
    def run(**arrays):
        return dilax.dilated_attention(**BASE | arrays)

    assert jax.eval_shape(run, query=Q, key=KV, value=KV).shape == (B, T, N, H)


def test_the_table_is_long():
    assert len(BAD) >= 60


@pytest.mark.parametrize(("name", "got", "changed"), BAD.values(), ids=BAD)
def test_is_refused_before_compute(name, got, changed):
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: wanted .+, got .*") as caught:
        dilax.dilated_attention(**BASE | changed)
    assert got in str(caught.value).rpartition(", got ")[2] or str(caught.value).endswith(got)


@pytest.mark.parametrize(("name", "got", "changed"), BAD.values(), ids=BAD)
def test_is_refused_while_tracing(name, got, changed):
    """Under jit the arrays are tracers: the same words, but for how a tracer is shown."""
    arguments = BASE | changed
    traced = {k: x for k, x in arguments.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {k: x for k, x in arguments.items() if k not in traced}
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: wanted .+, got "):
        jax.eval_shape(lambda traced: dilax.dilated_attention(**traced, **static), traced)


@pytest.mark.parametrize("name", ["segment_lengths", "scale", "dropout_rate", "q_start"])
def test_static_arguments_may_not_be_traced(name):
    changed = {"segment_lengths": ids(2), "q_start": ids()}.get(name, array())
    arrays = {"query": Q, "key": KV, "value": KV, name: changed}
    with pytest.raises(ValueError, match=rf"^{name}.*: wanted .+, got "):
        jax.eval_shape(lambda arrays: dilax.dilated_attention(**BASE | arrays), arrays)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="window"):
        dilax.dilated_attention(**BASE, window=3)


@pytest.mark.parametrize(
    "reasons", [{"pallas": ("no GPU",)}, {"pallas": ("a", "b"), "xla": ("c",)}]
)
def test_unsupported_lists_every_reason(reasons):
    text = str(UnsupportedError("query float32[1]", reasons))
    for name, why in reasons.items():
        assert name in text
        assert all(reason in text for reason in why)
    assert "query float32[1]" in text
    assert UnsupportedError("", reasons).reasons == reasons


def test_a_named_implementation_is_never_replaced():
    """On a CPU, "pallas" is refused with reasons. float64 it can take nowhere."""
    arrays = sized(dtype="float64")
    with jax.enable_x64(True), pytest.raises(UnsupportedError, match=r"pallas: .+") as caught:
        dilax.dilated_attention(**BASE | arrays, implementation="pallas")
    assert caught.value.reasons["pallas"]


def test_the_docstring_names_every_argument():
    documented = dilax.dilated_attention.__doc__
    for name in inspect.signature(dilax.dilated_attention).parameters:
        assert re.search(rf"^\s+(\w+, )*{name}(, \w+)*:", documented, re.M), name


class Foreign:
    """An array of another library: its dtype means nothing to NumPy."""

    shape, ndim = (B, T, N, H), 4

    class dtype:
        def __repr__(self):
            return "torch.float32"

    dtype = dtype()


def test_foreign_arrays_are_named():
    """torch tensors and arrays of jax.random keys."""
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match=r"^dropout_key: wanted .+, got key<fry>\[3\]$"):
        dilax.dilated_attention(**BASE, **DROP, dropout_key=keys)
    with pytest.raises(ValueError, match=r"^query: wanted .+, got torch.float32\[2,12,4,8\]$"):
        dilax.dilated_attention(**BASE | {"query": Foreign()})
    with pytest.raises(ValueError, match=r"^key_padding_mask: wanted .+, got torch.float32"):
        dilax.dilated_attention(**BASE, key_padding_mask=Foreign())
