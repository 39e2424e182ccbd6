"""What every classifier's head ends in: sums over samples."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

#: Target of a sample that is padding.
IGNORE = -100
#: A sample counts as right when its class is among so many most likely ones.
TOP = 5


def classification_sums(logits: Tensor, targets: Tensor, label_smoothing: float, training: bool) -> dict[str, Tensor]:
    """``loss``: cross-entropy, summed; without `training` also ``correct`` and ``correct_top5``: samples counted.

    Args:
        logits: (B, K), any floating type; the sums are fp32 scalars.
        targets: (B,) int64 classes, `IGNORE` for padding; or (B, K) probabilities, all 0 for padding.
        label_smoothing: share of a target that is spread over all classes.
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)
    if training or targets.ndim > 1:
        return {"loss": loss}
    best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == targets[:, None]
    return {"loss": loss, "correct": best[:, 0].sum().float(), "correct_top5": best.sum().float()}
