"""Long-context dilated attention in JAX: exact, linear in memory, fast."""

from dilax._types import UnsupportedError as UnsupportedError
from dilax.dilated import dilated_attention as dilated_attention
from dilax.partial import Partial as Partial
from dilax.partial import merge as merge
from dilax.spec import DilatedSpec as DilatedSpec
