"""Long-context dilated attention in JAX: exact, linear in memory, fast."""

from dilax._types import UnsupportedError as UnsupportedError
from dilax.attention_fn import DilatedAttention as DilatedAttention
from dilax.attention_fn import DilatedAttentionFn as DilatedAttentionFn
from dilax.create import choose_implementation as choose_implementation
from dilax.create import create_dilated_attention as create_dilated_attention
from dilax.create import create_multihead_dilated_attention as create_multihead_dilated_attention
from dilax.create import explain as explain
from dilax.dilated import dilated_attention as dilated_attention
from dilax.modules import MultiheadDilatedAttention as MultiheadDilatedAttention
from dilax.partial import Partial as Partial
from dilax.partial import merge as merge
from dilax.spec import DilatedSpec as DilatedSpec
