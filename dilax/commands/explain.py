"""`dilax explain`."""

import dataclasses

from dilax.decision import explain


@dataclasses.dataclass(frozen=True)
class Explain:
    """Say what a call would run, and why not something else. Computes nothing."""

    kind: str = "auto"
    """Any name that create_dilated_attention knows."""
    seq_len: int = 16384
    """T, queries."""
    kv_seq_len: int | None = None
    """S, keys; None for T."""
    batch: int = 1
    """B."""
    num_heads: int = 12
    """N, query heads."""
    num_kv_heads: int | None = None
    """K, key and value heads; None for N."""
    head_dim: int = 64
    """H."""
    dtype: str = "bfloat16"
    """Of queries, keys and values."""
    segment_lengths: tuple[int, ...] | None = None
    """Segment length W of each branch, in tokens; None for those of the kind."""
    dilation_rates: tuple[int, ...] | None = None
    """Dilation rate R of each branch; None for those of the kind."""
    combine: str = "lse"
    """lse: every head takes part in every branch; heads: each branch has heads of its own."""
    head_offset: str = "interleaved"
    """Which residue a head keeps: interleaved (the paper) or blocked (torchscale)."""
    is_causal: bool = False
    """A query sees no key after it."""
    packed: bool = False
    """The call has segment ids or a key padding mask."""
    dropout: float = 0.0
    """Share of attention probabilities dropped."""
    implementation: str | None = None
    """Name one instead of leaving the choice to the library."""
    device_kind: str | None = None
    """Of another machine, such as "NVIDIA H100 80GB HBM3"; None for this one."""
    devices: int = 1
    """Along the mesh axis of the tokens; with several a plan says who sends how much."""
    layout: str = "contiguous"
    """Which tokens a device holds: contiguous, or zigzag, which balances causal work."""
    method: str | None = None
    """How rows move: ring, all_to_all, all_gather or hybrid; None for the fastest expected."""
    gigabytes_per_second: float = 340.0
    """What a device receives, for the expected times of the plan."""

    def run(self) -> None:
        """Print the decision."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("segment_lengths", "dilation_rates"):
            if fields[name] is None:
                del fields[name]
        print(explain(**fields))
