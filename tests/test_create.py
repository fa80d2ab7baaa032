"""Every name of the PyTorch libraries resolves or says why not; factories honour or refuse."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dilax
from dilax import UnsupportedError
from dilax.names import KINDS, LATER_EXPORTS
from tests.compare import assert_exact

SPEC = ([6, 12], [1, 2])
H100 = "NVIDIA H100 80GB HBM3"
FUNCTIONS = {
    "auto": None,
    "dilated": "xla",
    "standard": "xla",
    "DilatedAttention": "xla",
    "improved": None,
    "ImprovedDilatedAttention": None,
}
# name: implementation, fused projections and LayerNorm
MODULES = {
    "multihead_dilated": ("xla", False),
    "MultiheadDilatedAttention": ("xla", False),
    "improved_multihead": (None, True),
    "ImprovedMultiheadDilatedAttention": (None, True),
    "auto": (None, False),
    "dilated": ("xla", False),
    "standard": ("xla", False),
    "improved": (None, True),
}
SPARSE = (  # tests/test_create_sparse.py
    "block_sparse block_sparse_ring BlockSparseRingDilatedAttention block_sparse_multihead "
    "BlockSparseRingMultiheadDilatedAttention BlockSparseOptimized BlockSparseTorchSparse "
    "hierarchical BlockSparseHierarchical hilbert_post_pattern "
    "BlockSparseRingDilatedAttentionHilbertPostPattern local global_local ultra_sparse "
    "hilbert_standard hilbert_ultra fine_grained long_range hierarchical_ultra_sparse"
).split()
ON_MESH = (  # tests/test_on_mesh.py runs them
    "ring RingDilatedAttention RingDilatedAttentionHybrid RingDilatedAttentionTrue ring_production "
    "RingDilatedAttentionProduction ring_multihead RingMultiheadDilatedAttentionHybrid distributed "
    "DistributedMultiheadDilatedAttention ring_distributed RingDistributedDilatedAttention "
    "ring_hilbert RingDilatedAttentionHilbertOptimized head_parallel "
    "HeadParallelDilatedAttentionOptimized block_sparse_distributed "
    "BlockSparseRingDistributedDilatedAttention"
).split()
FACTORIES = [dilax.create_dilated_attention, dilax.create_multihead_dilated_attention]


def module(kind, **options):
    return dilax.create_multihead_dilated_attention(kind, 32, 4, *SPEC, **options)


ORDERED = (
    "hilbert HilbertDilatedAttention hilbert_pallas HilbertAttentionTritonFixed"
).split()  # tests/test_order.py


ADAPTIVE = "adaptive BlockSparseAdaptive adaptive_standard".split()  # tests/test_adaptive.py


def test_the_table_has_every_name_once():
    names = [name for kind in KINDS for name in kind.names]
    assert sorted(names) == sorted({*FUNCTIONS, *MODULES, *ORDERED, *ADAPTIVE, *SPARSE, *ON_MESH})
    assert len(ADAPTIVE + SPARSE + ON_MESH) == 32 + 8


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_dilated_attention(name):
    attention = dilax.create_dilated_attention(name, *SPEC)
    assert attention == dilax.DilatedAttention(*SPEC, implementation=FUNCTIONS[name])


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_what_the_name_says(name):
    implementation, improved = MODULES[name]
    layer = module(name)
    assert isinstance(layer, dilax.MultiheadDilatedAttention)
    assert layer.attention.implementation == implementation
    assert layer.fused_qkv is improved
    assert (layer.norm is not None) is improved
    either = module(name, fused_qkv=not improved, layer_norm=not improved)
    assert either.fused_qkv is not improved
    assert (either.norm is None) is improved


@pytest.mark.parametrize("name", ["multihead_dilated", "improved_multihead"])
def test_modules_compute_what_the_class_computes(name, x64):
    x = jax.random.normal(jax.random.key(1), (2, 12, 32), jnp.float64)
    improved = MODULES[name][1]
    layer = module(name, gamma_init=2.0, add_bias_kv=True, param_dtype=jnp.float64)
    same = dilax.MultiheadDilatedAttention(
        32,
        4,
        *SPEC,
        fused_qkv=improved,
        layer_norm=improved,
        gamma_init=2.0,
        add_bias_kv=True,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    run = nnx.jit(lambda layer, x: layer(x))
    assert_exact(run(layer, x), run(same, x))
    other = module(name, add_bias_kv=True, param_dtype=jnp.float64, rngs=nnx.Rngs(1))
    assert np.abs(run(other, x) - run(layer, x)).max() > 1e-3


@pytest.mark.parametrize("create", FACTORIES)
@pytest.mark.parametrize(
    "name",
    ["", "Dilated", "flash", None, 3, ("dilated",), ["dilated"], np.array([1, 2]), jnp.ones(2)],
    ids=str,
)
def test_unknown_names_are_refused(name, create):
    with pytest.raises(
        ValueError, match=r"^kind: wanted one of auto, dilated, .*improved_multihead"
    ):
        create(name)


@pytest.mark.parametrize("name", LATER_EXPORTS)
def test_exports_of_later_versions_are_known(name):
    assert not hasattr(dilax, name)
    says = rf"^dilax\.{name}: a known name, not available.* are .*Attention, .*dilated_attention,"
    with pytest.raises(AttributeError, match=says) as error:
        getattr(dilax, name)
    listed = str(error.value).partition("available are ")[2].split(", ")
    assert not {"names", "create"} & {*listed}
    assert all(hasattr(dilax, x) for x in listed)


def test_unknown_attributes_are_those_of_any_module():
    name = "block_dense"
    with pytest.raises(AttributeError, match=rf"^module 'dilax' has no attribute '{name}'$"):
        getattr(dilax, name)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FUNCTIONS])
def test_functions_are_not_modules(name):
    with pytest.raises(ValueError, match=r"^kind: .*create_multihead_dilated_attention"):
        dilax.create_dilated_attention(name, *SPEC)


def test_defaults_are_those_of_the_pytorch_library():
    attention = dilax.create_dilated_attention()
    assert attention == dilax.DilatedAttention((2048, 4096, 8192), (1, 2, 4))
    layer = dilax.create_multihead_dilated_attention()
    assert (layer.embed_dim, layer.num_heads) == (768, 12)
    assert layer.attention.dilation_rates == (1, 2, 4)
    spec = dilax.DilatedSpec((8,), (3,))
    assert dilax.create_dilated_attention("auto", spec) == dilax.DilatedAttention([8], [3])
    with pytest.raises(ValueError, match=r"^dilation_rates: wanted a sequence"):
        dilax.create_dilated_attention("auto", [8, 16])


def test_options_reach_the_attention():
    options = {
        "dropout": 0.2,
        "attention_scale": 0.5,
        "add_zero_attn": True,
        "use_gradient_checkpointing": "dots_saveable",
        "combine": "heads",
        "head_offset": "blocked",
        "average_branches": False,
        "pad_mode": "zeros",
    }
    wanted = dilax.DilatedAttention(*SPEC, embed_dim=32, num_heads=4, **options)
    assert (
        dilax.create_dilated_attention("auto", *SPEC, embed_dim=32, num_heads=4, **options)
        == wanted
    )
    layer = module("auto", **options, bias=False, num_kv_heads=2)
    assert layer.use_gradient_checkpointing == options.pop("use_gradient_checkpointing")
    assert layer.attention == dilax.DilatedAttention(*SPEC, embed_dim=32, num_heads=4, **options)
    assert layer.out_proj.bias is None
    assert layer.num_kv_heads == 2


@pytest.mark.parametrize("kind", ["dilated", "improved", "auto"])
@pytest.mark.parametrize("create", FACTORIES)
def test_use_flash_attn_names_the_implementation(create, kind):
    def implementation(**options):
        made = create(kind, **options)
        return getattr(made, "attention", made).implementation

    assert implementation(use_flash_attn=True) == "pallas"
    assert implementation(use_flash_attn=False) == "xla"
    assert implementation(use_flash_attn=None, implementation="pallas") == "pallas"
    with pytest.raises(ValueError, match=r"^use_flash_attn: wanted None or False"):
        create(kind, use_flash_attn=True, implementation="xla")


def test_use_flash_attn_raises_where_it_cannot_run():
    q = jnp.ones((1, 12, 4, 8))
    with pytest.raises(UnsupportedError, match=r"pallas: .*cpu"):
        dilax.create_dilated_attention("auto", *SPEC, use_flash_attn=True)(q, q, q)
    with pytest.raises(UnsupportedError, match=r"pallas: .*cpu"):
        module("auto", use_flash_attn=True)(jnp.ones((1, 12, 32)))


@pytest.mark.parametrize("create", FACTORIES)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ring_size", 2, "None or 1"),
        ("ring_size", True, "None or 1"),
        ("ring_size", "1", "None or 1"),
        ("sparsity_ratio", 0.0, "(0, 1]"),
        ("block_size", 100, "64 or a multiple of 128"),
        ("pattern_type", "learned", "'local_window' or"),
        ("pattern", "learned", "one of local"),
        ("need_speed", 0, "True or False"),
        ("use_flash_attn", 1, "True or False"),
        ("implementation", "cuda", "None or one of"),
        ("dropout", 1.0, "in [0, 1)"),
        ("attention_scale", "auto", "finite"),
        ("embed_dim", 0, "positive"),
        ("num_heads", -1, "int"),
        ("add_bias_kv", 1, "True or False"),
        ("add_zero_attn", 1, "True or False"),
        ("layer_norm", 1, "True or False"),
        ("use_gradient_checkpointing", "all", "dots_saveable"),
        ("segment_lengths", [8, 4], "decrease"),
        ("dropuot", 0.1, "did you mean dropout?"),
        ("options", {}, "one of add_bias_kv"),
        ("self", 1, "one of add_bias_kv"),
        ("scale", 1.0, "attention_scale"),
        ("is_causal", True, "one of add_bias_kv"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(name, value, says, create):
    if name == "segment_lengths":
        arguments = {"segment_lengths": value, "dilation_rates": [1, 1]}
    else:
        arguments = {name: value}
    with pytest.raises(ValueError, match=rf"^{name}: wanted .*{re.escape(says)}"):
        create("auto", **arguments)


@pytest.mark.parametrize(
    "option",
    [
        {"bias": True},
        {"bias": False},
        {"add_bias_kv": True},
        {"layer_norm": True},
        {"gamma_init": 1.0},
    ],
)
def test_functions_refuse_what_needs_parameters(option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"^{name}: .*create_multihead_dilated_attention"):
        dilax.create_dilated_attention("auto", *SPEC, **option)


def test_harmless_values_are_taken():
    plain = dilax.create_dilated_attention("auto", *SPEC)
    assert dilax.create_dilated_attention("auto", *SPEC, ring_size=1, need_speed=False) == plain


def test_choose_implementation_names_what_there_is():
    for seq_len in (1, 50_000, 10**9):
        assert dilax.choose_implementation(seq_len) == "improved"
    module(dilax.choose_implementation(64))
    assert dilax.choose_implementation(64, need_speed=True) == "block_sparse"
    assert dilax.choose_implementation(64, num_gpus=2) == "ring_multihead"
    with pytest.raises(ValueError, match="need_speed"):
        dilax.choose_implementation(64, num_gpus=2, need_speed=True)
    bad: dict[str, Any] = {"seq_len": 0, "num_gpus": 1.5, "need_speed": 1}
    for name, x in bad.items():
        with pytest.raises(ValueError, match=rf"^{name}: wanted"):
            dilax.choose_implementation(**{"seq_len": 64, name: x})


def passed_over(decision):
    return {name: why for _, name, why in decision.passed_over}


def test_explain_gives_a_reason_for_everything_passed_over():
    decision = dilax.explain(seq_len=4096)
    assert (decision.implementation, decision.device_kind) == ("xla", "cpu")
    assert set(passed_over(decision)) == {"pallas", "block_sparse", "ring", "head_parallel"}
    assert "cpu" in passed_over(decision)["pallas"]
    text = str(decision)
    assert text.startswith("kind 'auto' on cpu")
    for word in ("(2048, 4096, 8192)", "where the inputs lie", *passed_over(decision).values()):
        assert word in text


def test_explain_follows_kind_and_arguments():
    by_name = dilax.explain("dilated", seq_len=64, device_kind=H100)
    assert passed_over(by_name)["pallas"] == "kind 'dilated' runs 'xla'"
    by_argument = dilax.explain(seq_len=64, use_flash_attn=False, device_kind=H100)
    assert passed_over(by_argument)["pallas"] == "the call names 'xla'"
    with pytest.raises(UnsupportedError, match="pallas"):
        dilax.explain(seq_len=64, implementation="pallas")


@pytest.mark.kernel
def test_explain_asks_the_kernels_about_another_device():
    call = {"seq_len": 4096, "device_kind": H100, "packed": True, "dropout": 0.1, "num_kv_heads": 4}
    taken = dilax.explain(dtype="bfloat16", **call)
    assert taken.implementation == "pallas"
    assert passed_over(taken)["xla"] == "'pallas' comes first and takes the call"
    refused = dilax.explain(dtype="float32", **call)
    assert refused.implementation == "xla"
    assert "float32" in passed_over(refused)["pallas"]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("kind", {"kind": "x"}),
        ("seq_len", {"seq_len": 0}),
        ("seq_len", {"seq_len": 4.0}),
        ("num_heads", {"num_heads": 0}),
        ("num_kv_heads", {"num_kv_heads": 0}),
        ("key", {"num_kv_heads": 5}),
        ("query", {"head_dim": 12}),
        ("batch", {"batch": -1}),
        ("kv_seq_len", {"kv_seq_len": "4"}),
        ("dtype", {"dtype": "int8"}),
        ("dropout", {"dropout": 2}),
        ("is_causal", {"is_causal": None}),
        ("packed", {"packed": 1}),
        ("combine", {"combine": "x"}),
        ("head_offset", {"head_offset": "x"}),
        ("implementation", {"implementation": "x"}),
        ("use_flash_attn", {"use_flash_attn": "x"}),
        ("dilation_rates", {"segment_lengths": [8]}),
        ("device_kind", {"device_kind": 1}),
    ],
)
def test_explain_refuses_by_name(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: wanted "):
        dilax.explain(**{"seq_len": 64, **call})
