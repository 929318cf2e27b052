"""The fast paths of a step, each against the plain one: segments, shared beginnings, the head in blocks, fused modules."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from burnish.models import IGNORED, METHODS, attend_by_segment, attention, fused, trainable_parameters
from burnish.models.attention import Segment
from burnish.recipe import build_recipe
from burnish.training import loss as loss_module
from burnish.training import step as step_module
from burnish.training.loss import summed_loss, token_losses
from burnish.training.objective import Supervised
from burnish.training.pack import Paths, flatten, row_length
from burnish.types import Tokens
from conftest import build_tiny

FAMILIES = ("llama", "gemma3")
PATHS = {
    "mask": Paths(),
    "full logits": Paths(blocked=False),
    "segments": Paths(by_segment=True),
    "shared": Paths(by_segment=True, share=True),
}


def branching(seed: int = 0) -> list[Tokens]:
    """Sequences that share 31 tokens, two of them 51, one nothing; some are trained inside what is shared; one ends where others go on."""
    chance = random.Random(seed)

    def some(n: int) -> list[int]:
        return [chance.randrange(5, 300) for _ in range(n)]

    trunk = [1, *some(30)]
    branch = trunk + some(20)
    made = []
    for start, begin in ((trunk, 31), (branch, 40), (branch, 51), ([1], 1), (trunk, 25)):
        ids = start + some(chance.randrange(3, 40))
        made.append(Tokens(ids, [IGNORED] * begin + ids[begin:]))
    made.append(Tokens(branch, [IGNORED] * 33 + branch[33:]))
    return made


def naive_loss(model: Any, tokens: Tokens) -> torch.Tensor:
    logits = model(torch.tensor([tokens.input_ids]), use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, torch.tensor(tokens.labels[1:]), ignore_index=IGNORED, reduction="sum")


def gradients(model: Any, compute: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = compute()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in trainable_parameters(model).items()}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()) + 1e-7, name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_each_alone_for_every_weight(family: str, path: str, tokenizer: Any) -> None:
    """All weights are trained, so that every gradient is looked at; the sliding window (6) is shorter than what is shared."""
    model = build_tiny(family, tokenizer).requires_grad_(True)
    expected = gradients(model, lambda: sum((naive_loss(model, tokens) for tokens in branching()), torch.zeros(())))
    assert attend_by_segment(model)
    batch = flatten(branching(), PATHS[path])
    found = gradients(model, lambda: summed_loss(model, batch))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    close(found[1], expected[1])


def test_shared_beginnings_stand_once(tokenizer: Any) -> None:
    sequences = branching()
    whole, shared = flatten(sequences, PATHS["segments"]), flatten(sequences, PATHS["shared"])
    assert whole.input_ids.shape[1] == sum(len(s.input_ids) for s in sequences)
    # By hand: 31 shared by five, 20 more by three of them; what is left of each stands alone.
    saved = 4 * 31 + 2 * 20
    assert shared.input_ids.shape[1] == whole.input_ids.shape[1] - saved
    assert sorted(shared.targets.tolist()) == sorted(whole.targets.tolist())
    assert shared.owners.tolist() == whole.owners.tolist()
    assert shared.segments is not None
    assert shared.segments[0].parents == () or shared.segments[1].parents == ()
    assert {len(segment.parents) for segment in shared.segments} == {0, 1, 2}
    for index, sequence in enumerate(sequences):
        own = [i for i, owner in enumerate(shared.owners.tolist()) if owner == index]
        positions = shared.position_ids[0][shared.predictors[own]].tolist()
        assert positions == [i for i, label in enumerate(sequence.labels[1:]) if label != IGNORED]
        assert [shared.input_ids[0][place] for place in shared.predictors[own]] == [sequence.input_ids[i] for i in positions]


def test_long_steps_are_split_and_stay_what_they_are(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = branching()[:5]
    assert row_length(sequences, PATHS["segments"]) == flatten(sequences, PATHS["segments"]).input_ids.shape[1]
    alike = sequences[:3]  # all share 31 tokens; two of them 20 more, which is not counted
    assert row_length(alike, PATHS["shared"]) == flatten(alike, PATHS["shared"]).input_ids.shape[1] + 20
    model = build_tiny("llama", tokenizer).requires_grad_(True)
    assert attend_by_segment(model)
    objective = Supervised()
    objective.paths = PATHS["segments"]
    parts: list[int] = []
    real = objective.backward
    monkeypatch.setattr(objective, "backward", lambda m, some, n: parts.append(len(some)) or real(m, some, n))
    results = []
    for most in (2048, 100):
        monkeypatch.setattr(step_module, "_CPU_TOKENS", most)
        results.append(gradients(model, lambda: Given(step_module.backward(model, objective, sequences, at_once=5, denominator=7))))
    assert parts == [5, 2, 2, 1]
    assert step_module._parts(alike, PATHS["segments"]) == -(-sum(len(s.input_ids) for s in alike) // 100)
    assert step_module._parts(alike, PATHS["shared"]) == 1, "what all share would be computed again in each part"
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    close(results[1][1], results[0][1])


class Given:
    """A loss whose gradients are in the weights already."""

    def __init__(self, value: float) -> None:
        self.value = value

    def backward(self) -> None:
        """Done."""

    def detach(self) -> float:
        return self.value


def test_short_beginnings_are_not_shared() -> None:
    sequences = [Tokens([1, 5, 6, n], [IGNORED, IGNORED, 6, n]) for n in range(7, 11)]
    batch = flatten(sequences, PATHS["shared"])
    assert batch.input_ids.shape[1] == 16
    assert batch.segments == tuple(Segment(4 * i, 4 * i + 4, 0) for i in range(4))


@pytest.mark.parametrize("window", [None, 6, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_segments_equals_sdpa_with_a_mask(window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients against torch's own attention with the rule as a dense mask; query blocks of 16 cut every segment."""
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 16)
    attention.blocks_of_row.cache_clear()
    segments = (
        Segment(0, 37, 0),
        Segment(37, 60, 37, (0,)),
        Segment(60, 101, 37, (0,)),
        Segment(101, 120, 78, (0, 2)),
        Segment(120, 150, 0),
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 150, 16).to(dtype).requires_grad_() for heads in (6, 2, 2))
    position = torch.cat([torch.arange(s.first, s.first + s.stop - s.start) for s in segments])
    owner = torch.cat([torch.full((s.stop - s.start,), n) for n, s in enumerate(segments)])
    sees = torch.tensor([[a == b or b in segments[a].parents for b in range(5)] for a in range(5)])
    distance = position[:, None] - position[None]
    mask = sees[owner][:, owner] & (distance >= 0) & (distance < (window or 10_000))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    found = attention._SegmentAttention.apply(q, k, v, segments, window, 0.3)
    slope = torch.randn(expected.shape)
    expected.backward(slope)
    found.backward(slope.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip((q, k, v), wide, strict=True):
        assert float((ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()) < tolerance
    with torch.no_grad():  # flex attention has no backward on a CPU; its rule is the same
        flex = attention._flex(*(x.detach() for x in wide), segments, window, 0.3).transpose(1, 2)
    torch.testing.assert_close(flex, expected, rtol=1e-5, atol=1e-5)
    attention.blocks_of_row.cache_clear()


def test_without_segments_the_model_is_as_it_was(tokenizer: Any) -> None:
    model = build_tiny("gemma3", tokenizer)
    ids, mask = torch.randint(5, 300, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        assert attend_by_segment(model)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trained_head", [False, True])
def test_the_head_in_blocks_equals_cross_entropy(softcap: float | None, trained_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, with different weights of the rows; nothing is left out at this threshold."""
    monkeypatch.setattr(loss_module, "_block_width", lambda _: 37)
    monkeypatch.setitem(loss_module._LEAST_PROBABILITY, torch.float32, 0.0)
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16, requires_grad=True), torch.randn(301, 16, requires_grad=trained_head)
    targets, by_row = torch.randint(0, 301, (23,)), torch.rand(23)
    targets[:3] = torch.tensor([0, 36, 300])  # the edges of blocks
    losses = loss_module._HeadLoss.apply(hidden, weight, targets, softcap, None)
    (losses * by_row).sum().backward()
    found = [hidden.grad.clone(), weight.grad]
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="none")
    (expected * by_row).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], hidden.grad, rtol=1e-5, atol=1e-6)
    if trained_head:
        torch.testing.assert_close(found[1], weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("least", "tolerance", "at_most"), [(2.0**-20, 3e-4, 0.9), (2.0**-12, 3e-2, 0.3)])
def test_unlikely_words_are_left_out_within_bounds(least: float, tolerance: float, at_most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On peaked distributions over 20,000 words, few words are multiplied again, and the gradient is as near as promised."""
    monkeypatch.setitem(loss_module._LEAST_PROBABILITY, torch.float32, least)
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 64, requires_grad=True), torch.randn(20_000, 64) * torch.rand(20_000, 1)
    targets = torch.randint(0, 20_000, (12,))
    multiplied = []
    real = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda chosen, wanted: multiplied.append(len(chosen)) or real(chosen, wanted))
    loss_module._HeadLoss.apply(hidden, weight, targets, None, None).sum().backward()
    found = hidden.grad.clone()
    hidden.grad = None
    F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert multiplied[0] < at_most * 20_000
    assert float((found - hidden.grad).norm() / hidden.grad.norm()) < tolerance


def adapted(family: str, tokenizer: Any, *, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    recipe = build_recipe({"model": "m", "data": "d", "lora": {"rank": 4, "alpha": 8, **lora}})
    model = METHODS["lora"](build_tiny(family, tokenizer).to(dtype).requires_grad_(False), recipe)
    torch.manual_seed(3)
    for parameter in trainable_parameters(model).values():
        parameter.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_modules_equal_the_libraries(family: str, tokenizer: Any) -> None:
    model = adapted(family, tokenizer)
    names = set(model.state_dict())
    ids = torch.randint(5, 300, (2, 20))

    def compute() -> torch.Tensor:
        return model(ids).logits.float().logsumexp(-1).sum()

    expected = gradients(model, compute)
    counts = fused.fuse(model)
    assert counts == {"norm": 7 if family == "llama" else 19, "lora": 21, "mlp": 3}
    assert set(model.state_dict()) == names, "what is saved has the same names"
    found = gradients(model, compute)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    close(found[1], expected[1])
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, build_tiny(family, tokenizer)(ids).logits, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert float(merged(ids).logits.float().logsumexp(-1).sum()) == pytest.approx(expected[0], rel=1e-5)


def test_fused_norm_trains_its_weight(tokenizer: Any) -> None:
    model = build_tiny("gemma3", tokenizer).requires_grad_(True)
    ids = torch.randint(5, 300, (1, 20))
    expected = gradients(model, lambda: model(ids).logits.logsumexp(-1).sum())
    assert fused.fuse(model) == {"norm": 19, "lora": 0, "mlp": 3}
    close(gradients(model, lambda: model(ids).logits.logsumexp(-1).sum())[1], expected[1])


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"target_modules": ["q_proj", "down_proj"]}])
def test_what_cannot_be_fused_stays_the_library_s(lora: dict[str, Any], tokenizer: Any) -> None:
    model = adapted("llama", tokenizer, **lora).eval()
    ids = torch.randint(5, 300, (1, 20))
    expected = gradients(model, lambda: model(ids).logits.logsumexp(-1).sum())
    counts = fused.fuse(model)
    assert counts["lora"] == (0 if "dropout" in lora else 6)
    close(gradients(model, lambda: model(ids).logits.logsumexp(-1).sum())[1], expected[1])


def test_a_norm_that_does_something_else_is_left_alone() -> None:
    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) + 0.01

    holder = torch.nn.Sequential(OddRMSNorm())
    assert fused.fuse(holder)["norm"] == 0
    assert type(holder[0]) is OddRMSNorm


def test_everything_together_in_bfloat16(tokenizer: Any) -> None:
    """All fast paths at once in bfloat16 stay as near to float32 as the plain path in bfloat16 does (within a factor of 1.5)."""
    exact = adapted("gemma3", tokenizer)
    loss, expected = gradients(exact, lambda: sum((naive_loss(exact, tokens) for tokens in branching()), torch.zeros(())))
    errors = []
    for fast in (False, True):
        model = adapted("gemma3", tokenizer, dtype=torch.bfloat16)
        if fast:
            fused.fuse(model)
            attend_by_segment(model)
            batch = flatten(branching(), PATHS["shared"])
            value, found = gradients(model, lambda m=model, b=batch: token_losses(m, b).sum())
        else:
            value, found = gradients(model, lambda m=model: sum((naive_loss(m, t) for t in branching()), torch.zeros(())))
        distance = sum(float((found[n].float() - expected[n]).norm() ** 2) for n in expected) ** 0.5
        errors.append((abs(value - loss), distance))
    assert errors[1][1] < 1.5 * errors[0][1]
    assert errors[1][0] < 1e-2 * loss


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma3", 1.0)])
def test_the_offset_of_a_norm_is_found_in_bfloat16_with_large_weights(family: str, offset: float, tokenizer: Any) -> None:
    """Gemma's weights reach 300: beside them, in bfloat16, an offset of 1 is rounding."""
    model = build_tiny(family, tokenizer).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(300 * torch.rand(parameter.shape))
    assert fused.fuse(model)["norm"] > 0
    norms = [module for module in model.modules() if isinstance(module, fused.FusedNorm)]
    assert {norm.offset for norm in norms} == {offset}
