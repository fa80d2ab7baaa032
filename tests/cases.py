"""The one list of named cases of dilated attention: for tests, benchmarks and GPU tests alike.

A `Case` is small and static. `Case.arrays` draws its inputs, `Case.keywords` everything else that
`dilax.dilated_attention` and `dilax.reference.dilated_attention` take.
"""

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: the branches, the sizes, which masks and extras there are, and plain options."""

    name: str
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    T: int = 24
    S: int | None = None  # None: T
    B: int = 2
    N: int = 4
    K: int | None = None  # None: N
    H: int = 8
    segment_ids: str | None = (
        None  # "packed": sorted, 0 at the end; "arbitrary"; "many": short ones
    )
    key_padding: bool = False
    bias: bool = False
    dropout_rate: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()

    def arrays(self, dtype: Any = np.float64) -> dict[str, np.ndarray]:
        """query, key, value and, if the case has them, bias_k and bias_v: differentiable."""
        S, K = self.S or self.T, self.K or self.N
        shapes = {
            "query": (self.B, self.T, self.N, self.H),
            "key": (self.B, S, K, self.H),
            "value": (self.B, S, K, self.H),
        }
        if self.bias:
            shapes |= {"bias_k": (K, self.H), "bias_v": (K, self.H)}
        rng = self._rng("arrays")
        return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}

    def cotangents(self, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
        """Random cotangents of out (in `dtype`) and of lse (float32, or float64 for float64)."""
        rng = self._rng("cotangents")
        out = rng.normal(size=(self.B, self.T, self.N, self.H)).astype(dtype)
        stats = np.float64 if np.dtype(dtype) == np.float64 else np.float32
        return out, rng.normal(size=(self.B, self.T, self.N)).astype(stats)

    def masks(self) -> dict[str, np.ndarray]:
        """Segment ids and key padding mask, whichever the case has."""
        S, rng, masks = self.S or self.T, self._rng("masks"), {}
        if self.segment_ids:
            masks["q_segment_ids"] = self._ids(rng, self.T)
            if self.S:
                masks["kv_segment_ids"] = self._ids(rng, S)
        if self.key_padding:
            masks["key_padding_mask"] = rng.random((self.B, S)) < 0.7
        return masks

    def visible(self) -> np.ndarray:
        """bool [B, T, S]: pairs that causality, segment ids and the padding mask all leave."""
        masks, options, S = self.masks(), dict(self.options), self.S or self.T
        q_position = options.get("q_start", 0) + np.arange(self.T)
        k_position = options.get("k_start", 0) + np.arange(S)
        visible = np.ones((self.B, self.T, S), bool)
        if options.get("is_causal"):
            visible &= q_position[:, None] >= k_position
        if "q_segment_ids" in masks:
            q_ids = masks["q_segment_ids"]
            kv_ids = masks.get("kv_segment_ids", q_ids)
            visible &= (q_ids[:, :, None] == kv_ids[:, None]) & (kv_ids != 0)[:, None]
        if "key_padding_mask" in masks:
            visible &= masks["key_padding_mask"][:, None]
        return visible

    def keywords(self) -> dict[str, Any]:
        """Everything of the call that is not differentiable."""
        dropout = {}
        if self.dropout_rate:
            dropout = {
                "dropout_rate": self.dropout_rate,
                "dropout_key": jax.random.key(self._number("dropout")),
                "deterministic": False,
            }
        branches = {"segment_lengths": self.segment_lengths, "dilation_rates": self.dilation_rates}
        masks = {name: jnp.asarray(mask) for name, mask in self.masks().items()}
        return branches | masks | dropout | dict(self.options)

    def _number(self, what: str) -> int:
        return zlib.crc32(f"{self.name}/{what}".encode())

    def _rng(self, what: str) -> np.random.Generator:
        return np.random.default_rng(self._number(what))

    def _ids(self, rng: np.random.Generator, length: int) -> np.ndarray:
        if self.segment_ids == "arbitrary":
            ids = rng.integers(0, 4, (self.B, length))
        else:
            documents = length // 2 if self.segment_ids == "many" else 3
            ids = np.sort(rng.integers(1, documents + 1, (self.B, length)), axis=1)
            for row in ids:
                row[length - int(rng.integers(1, 4)) :] = 0
        return ids.astype(np.int32)


def _options(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


_CAUSAL = _options(is_causal=True)
_HEADS = _options(combine="heads")
_BLOCKED = _options(head_offset="blocked")
_ZEROS = _options(pad_mode="zeros")
_ZERO_KEY = _options(zero_attn=True)
_TWO = ((6, 24), (1, 2))
_THREE = ((6, 12, 24), (1, 2, 4))
_RAGGED = ((9, 24), (2, 1))  # nothing divides anything

CASES = (
    # Every option, alone or in few.
    Case("plain", *_TWO),
    Case("causal", *_THREE, options=_CAUSAL),
    Case("heads_blocked_causal", *_RAGGED, N=5, options=_HEADS + _BLOCKED + _CAUSAL),
    Case("heads_summed", *_TWO, options=_HEADS + _options(average_branches=False)),
    Case("averaged", *_TWO, options=_options(average_branches=True)),
    Case("gqa_causal_blocked", *_RAGGED, N=6, K=3, options=_CAUSAL + _BLOCKED),
    Case("mqa", *_RAGGED, N=5, K=1, options=_CAUSAL),
    Case("gqa_heads", (4, 8, 12, 24), (1, 2, 3, 1), N=6, K=2, options=_HEADS),
    Case("gqa_heads_odd", *_THREE, N=8, K=2, options=_HEADS + _CAUSAL),
    Case("scale_negative", *_TWO, options=_options(scale=-0.3) + _CAUSAL),
    Case("packed_causal", *_RAGGED, segment_ids="packed", options=_CAUSAL),
    Case("ids_arbitrary", *_RAGGED, segment_ids="arbitrary", options=_CAUSAL),
    Case("ids_many_short", *_TWO, segment_ids="many", options=_CAUSAL),
    Case(
        "key_padding_ids_causal", *_RAGGED, key_padding=True, segment_ids="packed", options=_CAUSAL,
    ),
    Case("bias_heads", *_TWO, bias=True, options=_HEADS),
    # Padding that acts as keys.
    Case("zeros_long", (7, 40), (1, 3), T=26, options=_ZEROS),
    Case("zeros_blocked", (7, 10), (2, 4), T=26, N=6, options=_ZEROS + _BLOCKED),
    Case("zeros_heads", *_RAGGED, options=_ZEROS + _HEADS),
    Case("zeros_causal", *_RAGGED, options=_ZEROS + _CAUSAL),
    Case("zeros_extras", *_RAGGED, T=17, bias=True, key_padding=True, options=_ZEROS + _ZERO_KEY),
    # Cross lengths and starts.
    Case("cross_short_keys", *_RAGGED, T=24, S=13),
    Case("cross_ids", *_RAGGED, T=13, S=22, segment_ids="packed"),
    Case("cross_padding_gqa", *_RAGGED, T=13, S=22, K=2, key_padding=True, options=_CAUSAL),
    Case("starts_keys_later", *_RAGGED, T=20, options=_CAUSAL + _options(q_start=2, k_start=9)),
    Case("starts_apart", (4, 8), (1, 2), T=6, S=7, options=_options(q_start=30, k_start=1)),
    Case("decode_one", *_RAGGED, T=1, S=24, options=_CAUSAL + _options(q_start=23)),
    Case(
        "starts_blocked_heads", *_RAGGED, T=15, S=9,
        options=_HEADS + _options(q_start=7, k_start=3),
    ),
    # Dropout.
    Case("dropout_causal_gqa", *_TWO, N=8, K=2, dropout_rate=0.5, options=_CAUSAL),
    Case("dropout_heads", *_TWO, dropout_rate=0.4, options=_HEADS),
    Case("dropout_zeros", *_RAGGED, dropout_rate=0.4, options=_ZEROS),
    Case(
        "dropout_starts", *_RAGGED, T=15, S=21, bias=True, dropout_rate=0.3,
        options=_CAUSAL + _options(q_start=11, k_start=4),
    ),
    # The hard list.
    Case("one_below_segment", (8, 16), (1, 2), T=15, options=_CAUSAL),
    Case("one_above_segment_ids", (8, 16), (1, 2), T=17, segment_ids="packed"),
    Case("prime", (7, 13), (3, 5), T=29, N=3, options=_CAUSAL),
    Case("prime_everything", (11, 31), (3, 7), T=37, B=1, N=7, options=_BLOCKED),
    Case("segment_above_length", (16, 1 << 40), (1, 5), T=11),
    Case("rate_above_heads", (16, 24), (3, 8), N=2),
    Case("rate_above_heads_blocked", (16, 24), (3, 8), N=2, options=_BLOCKED + _CAUSAL),
    Case("rate_above_segment", (2, 3), (1, 5), T=14, N=7),
    Case("rate_above_length", (16, 32), (1, 50), T=9, N=12, B=1, options=_CAUSAL),
    Case("no_rate_one_heads", (8, 24), (2, 3), N=3, options=_HEADS),
    Case("rate_three_of_eight", (8,), (3,), T=29, options=_CAUSAL),
    Case("length_one", *_THREE, T=1),
    Case("length_one_causal", (4, 8), (2, 4), T=1, options=_CAUSAL),
    Case("segment_one", (1, 4), (1, 2), T=9),
    Case("equal_segments", (8, 8), (1, 4), options=_CAUSAL),
    Case("duplicate_branches", (8, 8), (2, 2)),
    Case("head_dim_24", (9,), (2,), H=24, options=_CAUSAL),
    Case("one_head_one_branch", (24,), (1,), N=1, B=1, options=_CAUSAL),
    Case("twelve_heads", (16, 32), (4, 5), T=32, N=12, K=4, B=1),
    Case("all_masks", *_RAGGED, K=2, key_padding=True, segment_ids="arbitrary", bias=True,
         dropout_rate=0.25, options=_CAUSAL + _ZERO_KEY + _options(scale=0.5)),
)  # fmt: skip

BY_NAME = {case.name: case for case in CASES}

# One of each path through the code: what also runs with the oldest jax.
ON_EVERY_JAX = (
    "averaged", "cross_padding_gqa", "dropout_starts", "gqa_causal_blocked", "heads_blocked_causal",
    "key_padding_ids_causal", "length_one", "prime", "zeros_extras", "all_masks",
)  # fmt: skip


def as_parameters(cases: Iterable[Case] = CASES) -> list[Any]:
    """Parameters of pytest, named; those that one version of jax is enough for are marked so."""
    return [
        pytest.param(
            case, id=case.name, marks=[] if case.name in ON_EVERY_JAX else pytest.mark.newest
        )
        for case in cases
    ]
