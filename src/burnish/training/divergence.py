"""How far the tuned model has moved from its base: KL(base ‖ tuned) on the target rows, and its gradient, beside the cross-entropy.

Both need the tuned model's logits, so both are made from one product, a block of rows at a time; neither model's logits are ever whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from burnish.errors import TrainingError
from burnish.training.loss import full_logits, plain_head, target_rows
from burnish.training.pack import Batch

# 32 rows × 262,144 words × 4 bytes = 34 MB for each of four buffers, whatever the batch.
_BLOCK_LOGITS = 32 * 262_144


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The base model, in evaluation mode and without gradients. PEFT switches `requires_grad` as well: it is put back as it was."""
    if not hasattr(model, "disable_adapter"):
        raise TrainingError("training.kl_weight needs a model with an adapter: without it there is no base to compare with")
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            yield
    finally:
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)
        model.train(was_training)


def held_losses(model: Any, batch: Batch, kl_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three (N,) tensors, nats, float32: what is lowered (with a graph), its cross-entropy, its KL(base ‖ tuned).

    what is lowered = cross-entropy + kl_weight · KL.
    """
    # The base comes first: PEFT's switch must not touch parameters that a graph already holds.
    if (head := plain_head(model, batch)) is None:
        with adapter_off(model):
            base = _logs(full_logits(model, batch))
        tuned = _logs(full_logits(model, batch))
        cross = -tuned.gather(1, batch.targets[:, None])[:, 0]
        divergence = (base.exp() * (base - tuned)).sum(-1)
        return cross + kl_weight * divergence, cross.detach(), divergence.detach()
    weight, softcap = head
    with adapter_off(model):
        base_rows = target_rows(model, batch)
    lowered, cross, divergence = _HeldLoss.apply(target_rows(model, batch), base_rows, weight, batch.targets, softcap, kl_weight)
    return lowered, cross, divergence


class _HeldLoss(torch.autograd.Function):
    """Cross-entropy + w · KL of each row, for a frozen head; the gradient with respect to `hidden` is made on the way forward.

    With p the tuned model's probabilities and q the base's: d KL(q ‖ p) / d logits = p − q, d cross-entropy / d logits = p − one-hot.
    """

    @staticmethod
    def forward(
        context: Any, hidden: Tensor, base: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, kl_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # hidden, base: (N, D), weight: (V, D), targets: (N,)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        cross, divergence = (torch.empty(hidden.shape[0], device=hidden.device) for _ in range(2))
        rows = min(max(1, _BLOCK_LOGITS // weight.shape[0]), max(1, hidden.shape[0]))
        narrow = hidden.new_empty(rows, weight.shape[0])  # (n, V) in the compute type
        # (n, V) in float32, used again by each block: fresh memory costs more than the arithmetic on a CPU.
        tuned_logits, tuned_logs, base_logits, base_logs = (torch.empty(rows, weight.shape[0], device=hidden.device) for _ in range(4))
        for start in range(0, hidden.shape[0], rows):
            block, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            n = block.shape[0]
            logits = _logits(block, weight, softcap, narrow[:n], tuned_logits[:n])
            log_p, _ = _normalised(logits, tuned_logs[:n], base_logits[:n])
            base_block = _logits(base[start : start + rows], weight, softcap, narrow[:n], base_logits[:n])
            log_q, q = _normalised(base_block, base_logs[:n], base_block)
            cross[start : start + n] = -log_p.gather(1, wanted)[:, 0]
            divergence[start : start + n] = log_q.sub_(log_p).mul_(q).sum(-1)
            if gradient is not None:
                slope = log_p.exp_().mul_(1 + kl_weight).sub_(q, alpha=kl_weight)
                slope.scatter_add_(1, wanted, torch.full_like(wanted, -1.0, dtype=torch.float32))
                if softcap is not None:
                    slope.mul_(1 - (logits / softcap) ** 2)
                torch.mm(narrow[:n].copy_(slope), weight, out=gradient[start : start + n])
        context.gradient = gradient
        context.mark_non_differentiable(cross, divergence)
        return cross + kl_weight * divergence, cross, divergence

    @staticmethod
    def backward(context: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        gradient = context.gradient
        context.gradient = None
        scaled = None if gradient is None else gradient.mul_(outputs[0][:, None].to(gradient.dtype))
        return scaled, None, None, None, None, None


def _logs(logits: Tensor) -> Tensor:
    """Log-probabilities. torch.log_softmax adds up a large vocabulary with an error of 1e-4 nats in float32 on a CPU; logsumexp stays below 1e-6."""
    return logits - logits.logsumexp(-1, keepdim=True)


def _normalised(logits: Tensor, logs: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities in `logs`, probabilities in `powers`), both (n, V); `powers` may be `logits` itself. As exact as `_logs`."""
    torch.sub(logits, logits.amax(-1, keepdim=True), out=logs)
    torch.exp(logs, out=powers)
    total = powers.sum(-1, keepdim=True)
    return logs.sub_(total.log()), powers.div_(total)


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None, narrow: Tensor, wide: Tensor) -> Tensor:
    """(n, V) float32 in `wide`."""
    logits = wide.copy_(torch.mm(hidden, weight.T, out=narrow))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
