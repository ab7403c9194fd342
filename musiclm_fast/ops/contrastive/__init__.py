from musiclm_fast.ops.contrastive.distributed import distributed_contrastive_loss
from musiclm_fast.ops.contrastive.op import contrastive_loss
from musiclm_fast.ops.contrastive.reference import contrastive_loss_reference

__all__ = ["contrastive_loss", "contrastive_loss_reference", "distributed_contrastive_loss"]
