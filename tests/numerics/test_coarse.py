"""The head that looks through the vocabulary in 8 bits first: its loss and gradient against float64, beside what bfloat16 alone is off by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_engine import adapted, branching
from torch import Tensor, nn

from burnish.models import Kernels, NoKernels, find_kernels
from burnish.models.int8 import weight_limit
from burnish.recipe import build_recipe
from burnish.training import coarse as room
from burnish.training import loss as loss_module
from burnish.training.coarse import CoarseHead, can_be_coarse, coarse_log_sums, log_sums_with_rest
from burnish.training.engine import make_ready


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    if weight_limit() != 127:
        pytest.skip("this machine has no exact 8-bit products (VNNI, AMX)")
    try:
        return find_kernels()
    except NoKernels as problem:
        pytest.skip(str(problem))


def peaked(words: int = 20_000, rows: int = 40, size: int = 64, by: float = 1.6) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 hidden rows and a head whose probabilities are like a language model's: few words have nearly all."""
    torch.manual_seed(0)
    hidden, weight = (by * torch.randn(rows, size)).bfloat16(), (torch.randn(words, size) * torch.rand(words, 1)).bfloat16()
    targets = (hidden.float() @ weight.float().T).topk(5, 1).indices[torch.arange(rows), torch.arange(rows) % 5]
    return hidden, weight, targets


def loss_and_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    losses = loss_module._HeadLoss.apply(hidden, weight, targets, None, *more)
    (losses * torch.linspace(0.5, 1.5, len(targets))).sum().backward()
    assert hidden.grad is not None
    return losses.detach().double(), hidden.grad.double()


def test_loss_and_gradient_are_as_near_as_the_exact_heads(kernels: Kernels) -> None:
    hidden, weight, targets = peaked()
    wide = hidden.double().requires_grad_()
    expected = F.cross_entropy(wide @ weight.double().T, targets, reduction="none")
    (expected * torch.linspace(0.5, 1.5, len(targets))).sum().backward()
    assert wide.grad is not None
    errors = []
    for coarse in (None, CoarseHead(weight, kernels)):
        losses, gradient = loss_and_gradient(hidden, weight, targets, kernels, coarse)
        off = (losses - expected.detach()).abs()
        errors.append((float(off.mean()), float((gradient - wide.grad).norm() / wide.grad.norm())))
    (loss_exact, gradient_exact), (loss_coarse, gradient_coarse) = errors
    assert loss_coarse <= 1.05 * loss_exact, "8 bits cost less than bfloat16's own rounding"
    assert gradient_coarse <= 1.1 * gradient_exact + 1e-3


def test_most_words_are_never_multiplied_exactly(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = peaked()
    multiplied: list[int] = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: multiplied.append(b.shape[1]) or real(a, b, **k))
    loss_module._log_sum_exp_by_kernel(hidden, weight, targets, kernels, CoarseHead(weight, kernels))
    assert 0 < sum(multiplied) < 0.3 * weight.shape[0]


def test_the_sum_is_exact_where_all_words_are_chosen(kernels: Kernels) -> None:
    hidden, weight, targets = peaked(words=300)
    known = (hidden.float() * weight[targets].float()).sum(1)
    head = CoarseHead(weight, kernels)
    of_all, _ = coarse_log_sums(hidden, known, head)
    found = log_sums_with_rest(hidden, weight, torch.arange(300), of_all, known, head)
    assert found is not None
    torch.testing.assert_close(found, (hidden @ weight.T).float().logsumexp(1), rtol=1e-5, atol=1e-4)


def test_coarse_bounds_hold(kernels: Kernels) -> None:
    """log Σ exp of the coarse logits is that of the rounded weights and rows, by another way to compute it."""
    hidden, weight, targets = peaked(words=9000)
    known = (hidden.float() * weight[targets].float()).sum(1)
    of_all, highest = coarse_log_sums(hidden, known, CoarseHead(weight, kernels))

    def rounded(x: Tensor) -> Tensor:
        whole, scale = kernels.to_bytes(x)
        return (whole.double() - 128) * scale[:, None].double()

    logits = rounded(hidden) @ rounded(weight).T
    torch.testing.assert_close(of_all.double(), logits.logsumexp(1), rtol=1e-4, atol=1e-3)
    final = torch.maximum(logits.logsumexp(1), known.double())  # a row's known logit is exact, and may be above the coarse sum
    assert bool((highest.double() * 1.001 >= torch.exp(logits - final[:, None]).amax(0)).all())


def test_where_the_rest_is_much_everything_is_exact(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly even probabilities: no word is likely, and the coarse sum would be all there is."""
    monkeypatch.setitem(loss_module._LEAST_PROBABILITY, torch.bfloat16, 1e-3)
    hidden, weight, targets = peaked(by=0.05)
    head = CoarseHead(weight, kernels)
    exact = loss_module._log_sum_exp_by_kernel(hidden, weight, targets, kernels, None)
    found = loss_module._log_sum_exp_by_kernel(hidden, weight, targets, kernels, head)
    assert all(torch.equal(one, two) for one, two in zip(exact, found, strict=True))
    monkeypatch.setattr(room, "_MOST_COARSE", 1.0)
    assert not torch.equal(loss_module._log_sum_exp_by_kernel(hidden, weight, targets, kernels, head)[1], exact[1])


def test_not_finite_stays_not_finite(kernels: Kernels) -> None:
    hidden, weight, targets = peaked(words=300)
    hidden[3, 5] = torch.nan
    losses, _ = loss_and_gradient(hidden, weight, targets, kernels, CoarseHead(weight, kernels))
    assert losses[3].isnan()


def test_which_heads_are_coarse(kernels: Kernels, tokenizer: Any) -> None:
    weight = nn.Parameter(torch.randn(64, 32).bfloat16())
    assert not can_be_coarse(weight, kernels), "a trained head"
    assert can_be_coarse(weight.requires_grad_(False), kernels)
    assert not can_be_coarse(weight.float(), kernels), "float32 promises more digits"
    assert not can_be_coarse(weight, None)
    for wanted in (True, False):
        recipe = build_recipe({"model": "m", "data": "d", "engine": {"coarse_head": wanted}})
        paths = make_ready(adapted("gemma3", tokenizer, dtype=torch.bfloat16), branching(), recipe, steps=3)
        assert (paths.coarse is not None) == wanted
    assert make_ready(adapted("gemma3", tokenizer), branching(), build_recipe({"model": "m", "data": "d"}), steps=3).coarse is None
