"""Cross-entropy of a language model on its target tokens only, summed, in nats.

Gemma 3 270M has a vocabulary of 262,144: a naive loop spends 63 % of its multiplications and nearly all of its memory on the head. Here the
head sees only rows that carry a target, a block of rows at a time, and the gradient of a block is taken at once, so that logits never live
longer than their block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.training.pack import Batch

# 64 rows × 262,144 words × 4 bytes = 67 MB for each of two buffers, whatever the batch.
_BLOCK_LOGITS = 64 * 262_144


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy(hidden · weightᵀ, targets) of each row, for a frozen head; the gradient with respect to `hidden` is made on the way forward.

    The loss of a row depends on that row only, so backward just scales each row's gradient by what comes from above.

    The buffers of a block are used again by the next: on a CPU, touching fresh memory costs more than the arithmetic.
    """

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        # hidden: (N, D), weight: (V, D), targets: (N,)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        losses = torch.empty(hidden.shape[0], device=hidden.device)  # (N,) float32
        rows = min(max(1, _BLOCK_LOGITS // weight.shape[0]), max(1, hidden.shape[0]))
        narrow = hidden.new_empty(rows, weight.shape[0])  # (n, V) in the compute type
        wide, result = (torch.empty(rows, weight.shape[0], device=hidden.device) for _ in range(2))  # (n, V) in float32
        for start in range(0, hidden.shape[0], rows):
            block, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            n = block.shape[0]
            logits = wide[:n].copy_(torch.mm(block, weight.T, out=narrow[:n]))
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            log_probabilities = torch.log_softmax(logits, -1, out=result[:n])
            losses[start : start + n] = -log_probabilities.gather(1, wanted)[:, 0]
            if gradient is not None:
                slope = log_probabilities.exp_()  # d loss / d logits = softmax − one-hot
                slope.scatter_add_(1, wanted, torch.full_like(wanted, -1.0, dtype=torch.float32))
                if softcap is not None:
                    slope.mul_(1 - (logits / softcap) ** 2)
                torch.mm(narrow[:n].copy_(slope), weight, out=gradient[start : start + n])
        context.gradient = gradient
        return losses

    @staticmethod
    def backward(context: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient = context.gradient
        context.gradient = None
        return (None if gradient is None else gradient.mul_(outputs[0][:, None].to(gradient.dtype))), None, None, None


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Σ over target tokens of −log p(token), nats, float32 scalar with a graph. Divide by the number of targets of the whole step."""
    return token_losses(model, batch).double().sum().float()


def token_losses(model: Any, batch: Batch) -> Tensor:
    """(N,) −log p of each target token, nats, float32, with a graph.

    Packed sequences are kept apart by their positions. transformers 5.23 builds that mask only with `use_cache=False`.
    """
    if (head := frozen_head(model)) is None:
        return F.cross_entropy(full_logits(model, batch), batch.targets, reduction="none")
    weight, softcap = head
    return _HeadLoss.apply(target_rows(model, batch), weight, batch.targets, softcap)


def frozen_head(model: Any) -> tuple[Tensor, float | None] | None:
    """(weight (V, D), soft cap of the logits) where logits are no more than that of the last hidden rows; else None."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    softcap, plain = _after_head(causal.config)
    if plain and head is not None and head.bias is None and not head.weight.requires_grad and type(head) is torch.nn.Linear:
        return head.weight, softcap
    return None


def target_rows(model: Any, batch: Batch) -> Tensor:
    """(N, D) last hidden rows of the places whose next token is a target."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model(**_arguments(batch)).last_hidden_state[0][batch.predictors]


def full_logits(model: Any, batch: Batch) -> Tensor:
    """(N, V) float32, for heads that are more than one frozen product."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal(**_arguments(batch), logits_to_keep=batch.predictors).logits[0].float()


def _arguments(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}


def _after_head(config: Any) -> tuple[float | None, bool]:
    """(soft cap of the logits, whether nothing else is done to them). Some families scale logits: they take the plain path."""
    config = config.get_text_config()
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"))
    return getattr(config, "final_logit_softcapping", None), not scaled
