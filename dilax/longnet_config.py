"""Everything that decides what a LongNet model computes."""

import dataclasses
from typing import Any

from dilax._types import FLOAT_DTYPES, refuse
from dilax.attention import POLICIES
from dilax.checks import check_bool, check_number, check_positive
from dilax.select import IMPLEMENTATIONS
from dilax.spec import DilatedSpec, HeadOffset

_POSITIONS = (None, "rope", "xpos")


@dataclasses.dataclass(frozen=True)
class LongNetConfig:
    """Everything that decides what a LongNet model computes; frozen, hashable, validated.

    The defaults are the base model of the paper.

    Args:
        embed_dim: E, a multiple of num_heads with a head dim that is a multiple of 8 up to 256.
        num_heads, num_kv_heads: N and K; None for K = N.
        num_layers, ffn_dim: number of layers, width of their feed-forward networks.
        segment_lengths, dilation_rates, head_offset, pad_mode, implementation: as in
            `dilax.dilated_attention`.
        vocab_size: number of tokens; only `LongNetLM` needs it.
        tied_embeddings: the language model's output projection is its embedding.
        position: "rope", "xpos" or None, on queries and keys of every layer.
        rope_theta: base of the wave lengths of both; xpos_scale_base: see `dilax.positions.XPos`.
        dropout: of embeddings and of what attention and feed-forward network add.
        attention_dropout: of attention probabilities.
        layer_norm_eps: epsilon of every LayerNorm.
        final_norm: normalise the output of the last layer.
        remat: None, or the name of the policy in `jax.checkpoint_policies` by which every layer
            is computed again in the backward pass.
        dtype: of the computation, None for that of the parameters; param_dtype: of those.
            Both may be float64 only with jax_enable_x64.

    Raises:
        ValueError: a field is wrong; the message says which, what was wanted and what came.

    Source: LongNet (arXiv:2307.02486), section 4 and table 3.

    Example:
        >>> LongNetConfig(embed_dim=64, num_heads=4).head_dim
        16
    """

    embed_dim: int = 768
    num_heads: int = 12
    num_layers: int = 12
    ffn_dim: int = 3072
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 6, 12)
    num_kv_heads: int | None = None
    vocab_size: int | None = None
    tied_embeddings: bool = False
    position: str | None = "rope"
    rope_theta: float = 10000.0
    xpos_scale_base: float = 512.0
    head_offset: HeadOffset = "interleaved"
    pad_mode: str = "mask"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    final_norm: bool = True
    remat: str | None = None
    dtype: str | None = None
    param_dtype: str = "float32"
    implementation: str | None = None

    def __post_init__(self):
        for name in ("embed_dim", "num_heads", "num_layers", "ffn_dim"):
            _check_size(name, getattr(self, name))
        for name in ("num_kv_heads", "vocab_size"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))
        E, N = self.embed_dim, self.num_heads
        if E % N or E // N % 8 or E // N > 256:
            wanted = (
                f"a multiple of num_heads={N} with a head dim that is a multiple of 8 up to 256"
            )
            raise refuse("embed_dim", wanted, E)
        if self.num_kv_heads is not None and N % self.num_kv_heads:
            raise refuse("num_kv_heads", f"a divisor of num_heads={N}", self.num_kv_heads)
        spec = DilatedSpec(self.segment_lengths, self.dilation_rates)
        object.__setattr__(self, "segment_lengths", spec.segment_lengths)
        object.__setattr__(self, "dilation_rates", spec.dilation_rates)
        for name in ("tied_embeddings", "final_norm"):
            check_bool(name, getattr(self, name))
        for name in ("rope_theta", "xpos_scale_base", "layer_norm_eps"):
            check_positive(name, getattr(self, name))
        for name in ("dropout", "attention_dropout"):
            check_number(name, getattr(self, name), 0, 1, "a Python number in [0, 1)")
        for name, choices in (
            ("position", _POSITIONS),
            ("head_offset", ("interleaved", "blocked")),
            ("pad_mode", ("mask", "zeros")),
            ("remat", (None, *POLICIES)),
            ("dtype", (None, *FLOAT_DTYPES)),
            ("param_dtype", FLOAT_DTYPES),
            ("implementation", (None, *IMPLEMENTATIONS)),
        ):
            if getattr(self, name) not in choices:
                raise refuse(name, f"one of {choices}", getattr(self, name))

    @property
    def head_dim(self) -> int:
        """H, the size of a head."""
        return self.embed_dim // self.num_heads


def _check_size(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int) or x < 1:
        raise refuse(name, "a positive int", x)
