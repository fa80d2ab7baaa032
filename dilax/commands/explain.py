"""`dilax explain`."""

import dataclasses

from dilax.commands.patterns import PatternOptions
from dilax.decision import explain


@dataclasses.dataclass(frozen=True)
class Explain(PatternOptions):
    """Say what a call would run, and why not something else. Computes nothing."""

    kind: str | None = None
    """Any name that create_dilated_attention knows; None for auto, or ring on several devices."""
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
    mesh: str | None = None
    """In place of devices, axes with sizes: data=2,sequence=4, or host=2,device=8."""
    axis_name: str | None = None
    """The mesh axis of the tokens, or two, between hosts and inside one: host,device."""
    batch_axis: str | None = None
    """The mesh axis of the examples."""
    head_axis: str | None = None
    """The mesh axis of the heads."""
    ring_size: int | None = None
    """If given, must be the number of devices along the tokens."""
    layout: str | None = None
    """Which tokens a device holds: contiguous, or zigzag, which balances causal work."""
    method: str | None = None
    """How rows move: ring, all_to_all, all_gather or hybrid, or one for each branch, with commas
    (local where none move); None for the fastest expected."""
    gigabytes_per_second: tuple[float, ...] | None = None
    """What a device receives, for the expected times: one number, or one for each axis of the
    tokens, the outermost first; None for 340 inside a host and 50 between hosts."""

    def run(self) -> None:
        """Print the decision."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("segment_lengths", "dilation_rates"):
            if fields[name] is None:
                del fields[name]
        if self.kind is None:
            fields["kind"] = "auto" if self.devices == 1 and self.mesh is None else "ring"
        for f in dataclasses.fields(PatternOptions):
            del fields[f.name]
        fields["pattern"] = self.block_pattern()
        speeds = self.gigabytes_per_second
        if speeds is not None and len(speeds) == 1:
            fields["gigabytes_per_second"] = speeds[0]
        for name in ("axis_name", "batch_axis", "head_axis", "method"):
            said = fields[name]
            if said is not None and "," in said:
                fields[name] = tuple(said.replace(" ", "").split(","))
        print(explain(**fields))
