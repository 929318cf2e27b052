"""A frozen head's first look at the vocabulary, in 8 bits: which words matter at all, and what all the others add up to.

Of Gemma 3 270M's 262,144 words, 93 % get less than 2⁻¹⁶ from every row of a step, and all of those together 0.2 % of a row's probability. For that sum,
products in 8 bits are more than enough: against float64, log Σ exp is then off by 1.5e-5 on average (2e-4 in the root mean square, 681 GSM8K rows), where
bfloat16's own rounding of the logits costs 5e-4 (2e-2). The words that matter are multiplied in the compute type as ever:

    log Σ exp  =  log( Σ exp(exact logits of the chosen)  +  Σ exp(coarse logits of all) − Σ exp(coarse logits of the chosen) )

Where the others' share is not small (a model that knows nothing yet), the whole vocabulary is multiplied exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.models import Kernels
from burnish.models.int8 import Packed, pack_bytes, weight_limit, whole_product

_WORDS = 1 << 13  # of a block: with 680 rows, 22 MB of logits, which a last cache holds
_MOST_COARSE = 0.05  # of the probability, as a mean over the rows, may come from coarse logits


class CoarseHead:
    """(V, D) weights of a head in 8 bits, each word with its own scale; V · D bytes."""

    def __init__(self, weight: Tensor, kernels: Kernels) -> None:
        self.kernels = kernels
        self.blocks = [pack_bytes(weight[start : start + _WORDS], kernels) for start in range(0, weight.shape[0], _WORDS)]


def can_be_coarse(weight: Tensor, kernels: Kernels | None) -> bool:
    """Whether this head is frozen, in bfloat16 (float32 promises more digits), on a CPU whose 8-bit products are exact (VNNI, AMX)."""
    return kernels is not None and not weight.requires_grad and weight.dtype == torch.bfloat16 and weight_limit() == 127


def coarse_log_sums(hidden: Tensor, known: Tensor, head: CoarseHead) -> tuple[Tensor, Tensor]:
    """(N,) log Σ exp of all coarse logits, (V,) an upper bound of each word's probability. hidden: (N, D); known: (N,) a logit of each row."""
    rounded, scales = head.kernels.to_bytes(hidden)
    bounds = [torch.empty(packed[1].shape[0]) for packed in head.blocks]
    log_sums = torch.full((hidden.shape[0],), -torch.inf)
    for packed, bound in zip(head.blocks, bounds, strict=True):
        _join(rounded, scales, known, packed, log_sums, bound, head.kernels)
    return log_sums, torch.cat(bounds)


def log_sums_with_rest(hidden: Tensor, weight: Tensor, chosen: Tensor, coarse: Tensor, known: Tensor, head: CoarseHead) -> Tensor | None:
    """(N,) log Σ exp, the chosen words (C,) in the compute type and the rest as in `coarse`. None where the rest is too much for that."""
    kernels = head.kernels
    rounded, scales = kernels.to_bytes(hidden)
    exact, of_chosen = (torch.full_like(coarse, -torch.inf) for _ in range(2))
    for start in range(0, len(chosen), _WORDS):
        some = weight[chosen[start : start + _WORDS]]
        unused = torch.empty(some.shape[0])
        kernels.join_logits(torch.mm(hidden, some.T), known, exact, unused)
        _join(rounded, scales, known, pack_bytes(some, kernels), of_chosen, unused, kernels)
    rest = torch.log(-torch.expm1((of_chosen - coarse).clamp_(max=-1e-7))).add_(coarse)
    log_sums = torch.logaddexp(exact, rest)
    # Not finite: said by the exact path, as ever.
    return log_sums if float(torch.exp(rest - log_sums).mean()) <= _MOST_COARSE else None


def _join(rounded: Tensor, scales: Tensor, known: Tensor, packed: Packed, log_sums: Tensor, bound: Tensor, kernels: Kernels) -> None:
    kernels.join_logits(whole_product(rounded, packed), known, log_sums, bound, scales)
