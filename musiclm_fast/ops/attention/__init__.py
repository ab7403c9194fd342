from musiclm_fast.ops.attention.op import attention, grid_codes, grid_offsets
from musiclm_fast.ops.attention.reference import attention_reference

__all__ = ["attention", "attention_reference", "grid_codes", "grid_offsets"]
