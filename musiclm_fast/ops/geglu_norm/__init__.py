from musiclm_fast.ops.geglu_norm.op import geglu_norm
from musiclm_fast.ops.geglu_norm.reference import geglu_norm_reference

__all__ = ["geglu_norm", "geglu_norm_reference"]
