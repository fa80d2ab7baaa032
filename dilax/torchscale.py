"""Weights of Microsoft's torchscale: its LongNet encoder, by the original names."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dilax._types import refuse
from dilax.longnet import LongNetEncoder
from dilax.longnet_config import LongNetConfig

# torchscale's name within a layer -> ours; a Linear's weight is [out, in], our kernel [in, out].
_LINEAR = {
    "self_attn.q_proj": ("attention", "query_proj"),
    "self_attn.k_proj": ("attention", "key_proj"),
    "self_attn.v_proj": ("attention", "value_proj"),
    "self_attn.out_proj": ("attention", "out_proj"),
    "ffn.fc1": ("ffn", "fc1"),
    "ffn.fc2": ("ffn", "fc2"),
}
_NORM = {
    "self_attn_layer_norm": ("attention_norm",),
    "self_attn.inner_attn_ln": ("attention", "norm"),
    "final_layer_norm": ("ffn_norm",),
    "ffn.ffn_layernorm": ("ffn", "norm"),
}
_BUFFER = "self_attn.xpos.scale"  # a constant that XPos computes
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def _read(weights: Any) -> dict[str, np.ndarray]:
    """The arrays of a mapping, a .safetensors file or a .npz file, by name."""
    if isinstance(weights, str | pathlib.Path):
        path = pathlib.Path(weights)
        if not path.is_file():
            raise refuse("weights", "a file that exists", str(path))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        if path.suffix != ".safetensors":
            raise refuse("weights", "a .safetensors or .npz file", str(path))
        try:
            from safetensors.numpy import load_file
        except ImportError:
            raise ImportError("reading .safetensors needs the package safetensors") from None
        return load_file(path)
    if not isinstance(weights, Mapping):
        raise refuse("weights", "a mapping of arrays by name, or a path", weights)
    return {name: np.asarray(array) for name, array in weights.items()}


def _paths(layers: int, final_norm: bool) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """torchscale's names with the path in our tree and the layer, None outside the layers."""
    inner = {}
    for name, path in _LINEAR.items():
        inner |= {f"{name}.weight": (*path, "kernel"), f"{name}.bias": (*path, "bias")}
    for name, path in _NORM.items():
        inner |= {f"{name}.weight": (*path, "scale"), f"{name}.bias": (*path, "bias")}
    paths: dict[str, tuple[tuple[str, ...], int | None]] = {
        f"layers.{i}.{name}": (("layers", *path), i)
        for i in range(layers)
        for name, path in inner.items()
    }
    if final_norm:
        paths |= {"layer_norm.weight": (("norm", "scale"), None)}
        paths |= {"layer_norm.bias": (("norm", "bias"), None)}
    return paths


def _check_names(state: Mapping[str, Any], wanted: Any, buffers: Any, unknown: Any) -> None:
    """Refuse missing names, and unknown ones unless they are to be ignored."""
    if unknown not in ("refuse", "ignore"):
        raise refuse("unknown", "'refuse' or 'ignore'", unknown)
    missing = [name for name in wanted if name not in state]
    if missing:
        raise refuse("weights", f"also {', '.join(missing)}", f"{len(state)} other names")
    extra = sorted(set(state) - set(wanted) - set(buffers))
    if extra and unknown == "refuse":
        raise refuse("weights", "no name but those of a LongNet encoder", ", ".join(extra))


def _filled(model: nnx.Module, state: Mapping[str, np.ndarray], paths: Mapping[str, Any]) -> Any:
    """The model's parameters, as nested dicts, with the weights in their places."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tree = nnx.to_pure_dict(params)
    arrays: dict[tuple[str, ...], list[np.ndarray]] = {}
    for name, (path, _) in paths.items():  # layers come in order
        array = state[name].T if path[-1] == "kernel" else state[name]
        arrays.setdefault(path, []).append(array)
        _, leaf = _leaf(tree, path)
        shape = leaf.shape if path[0] == "norm" else leaf.shape[1:]
        if array.shape != shape:
            wanted = f"shape {list(shape[::-1] if path[-1] == 'kernel' else shape)}"
            raise refuse(name, wanted, state[name])
    for path, found in arrays.items():
        parent, leaf = _leaf(tree, path)
        whole = found[0] if path[0] == "norm" else np.stack(found)
        parent[path[-1]] = jnp.asarray(whole, leaf.dtype)
    return nnx.merge(graphdef, nnx.State(tree), rest)


def _leaf(tree: dict, path: tuple[str, ...]) -> tuple[dict, Any]:
    """The innermost dict on a path, and the leaf in it."""
    for name in path[:-1]:
        tree = tree[name]
    return tree, tree[path[-1]]


def from_torchscale(
    weights: Any,
    *,
    num_heads: int,
    segment_lengths: Any,
    dilation_rates: Any,
    prefix: str = "",
    unknown: str = "refuse",
    **options: Any,
) -> LongNetEncoder:
    """A `LongNetEncoder` with the weights of torchscale's LongNetEncoder.

    It has torchscale's head offsets ("blocked") and padding ("zeros"), so that it computes what
    the weights were trained with. (The original evaluates GELU in float32 in any dtype; in
    float64 the outputs agree to that rounding.)

    Args:
        weights: arrays by torchscale's names (`layers.0.self_attn.k_proj.weight`, ...), or the
            path of a .safetensors or .npz file of them. Sizes are read off the shapes.
        num_heads, segment_lengths, dilation_rates: of the original model.
        prefix: what every name begins with, e.g. "encoder."; names without it count as unknown.
        unknown: "refuse" names that a LongNet encoder does not have, or "ignore" them.
        options: further fields of `LongNetConfig`, e.g. dropout, dtype; param_dtype is that of the
            weights and position "xpos" if they have its buffer, else None, unless given.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape, or an option is wrong.

    Source: github.com/microsoft/torchscale, architecture/encoder.py and model/LongNet.py.

    Example:
        >>> try:
        ...     from_torchscale({}, num_heads=4, segment_lengths=[8], dilation_rates=[1])
        ... except ValueError as error:
        ...     print(str(error)[:48])
        weights: wanted matrices layers.0.ffn.fc1.weight
    """
    everything = _read(weights)
    begins = len(prefix)
    state = {name[begins:]: x for name, x in everything.items() if name.startswith(prefix)}
    layers = {int(m[1]) for m in map(_LAYER.fullmatch, state) if m}
    first = ("layers.0.ffn.fc1.weight", "layers.0.self_attn.q_proj.weight")
    if not layers or any(name not in state or state[name].ndim != 2 for name in first):
        wanted = f"matrices {' and '.join(prefix + name for name in first)}"
        raise refuse("weights", wanted, f"{len(everything)} other names")
    buffers = [f"layers.{i}.{_BUFFER}" for i in layers]
    final_norm = "layer_norm.weight" in state or "layer_norm.bias" in state
    paths = _paths(max(layers) + 1, final_norm)
    outside = {name: x for name, x in everything.items() if not name.startswith(prefix)}
    _check_names({**outside, **state}, paths, buffers, unknown)
    ffn_dim, embed_dim = state[first[0]].shape
    fields = {
        "position": "xpos" if buffers[0] in state else None,
        "param_dtype": jax.dtypes.canonicalize_dtype(state[first[0]].dtype).name,
        **options,
    }
    config = LongNetConfig(
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_layers=max(layers) + 1,
        ffn_dim=ffn_dim,
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        head_offset="blocked",
        pad_mode="zeros",
        final_norm=final_norm,
        **fields,
    )
    return _filled(LongNetEncoder(config, rngs=nnx.Rngs(0)), state, paths)
