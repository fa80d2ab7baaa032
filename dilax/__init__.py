"""Long-context dilated attention in JAX: exact, linear in memory, fast."""

import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING

from dilax._types import UnsupportedError as UnsupportedError
from dilax.adaptive import AdaptiveAttention as AdaptiveAttention
from dilax.attention import DilatedAttention as DilatedAttention
from dilax.attention_fn import DilatedAttentionFn as DilatedAttentionFn
from dilax.block_lists import BlockLists as BlockLists
from dilax.block_sparse import block_sparse_attention as block_sparse_attention
from dilax.create import choose_implementation as choose_implementation
from dilax.create import create_block_sparse_attention as create_block_sparse_attention
from dilax.create import create_dilated_attention as create_dilated_attention
from dilax.create import create_multihead_dilated_attention as create_multihead_dilated_attention
from dilax.decision import explain as explain
from dilax.dilated import dilated_attention as dilated_attention
from dilax.longnet import LongNetDecoder as LongNetDecoder
from dilax.longnet import LongNetEncoder as LongNetEncoder
from dilax.longnet import LongNetLM as LongNetLM
from dilax.longnet_config import LongNetConfig as LongNetConfig
from dilax.modules import MultiheadDilatedAttention as MultiheadDilatedAttention
from dilax.names import missing as _missing
from dilax.on_mesh import AttentionSharding as AttentionSharding
from dilax.order import TokenOrder as TokenOrder
from dilax.partial import Partial as Partial
from dilax.partial import merge as merge
from dilax.pattern_config import SparsePatternConfig as SparsePatternConfig
from dilax.positions import RotaryPosition as RotaryPosition
from dilax.positions import XPos as XPos
from dilax.sharded import from_layout as from_layout
from dilax.sharded import layout_positions as layout_positions
from dilax.sharded import sharded_dilated_attention as sharded_dilated_attention
from dilax.sharded import to_layout as to_layout
from dilax.sharded_blocks import sharded_block_sparse_attention as sharded_block_sparse_attention
from dilax.spec import DilatedSpec as DilatedSpec
from dilax.torchscale import from_torchscale as from_torchscale

if not _TYPE_CHECKING:  # a type checker is to see unknown names as errors

    def __getattr__(name: str):
        public = (x for x in globals() if not x.startswith("_"))
        exported = sorted(x for x in public if f"dilax.{x}" not in _sys.modules)
        raise _missing(name, _sys.modules[__name__], exported)
