"""The compiled kernels: each against the same written in torch, and whole models with them against the same models without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_engine import FAMILIES, adapted, branching, close, gradients
from torch import Tensor

from burnish.models import attend_by_segment, fuse_attention, fused, fused_attention
from burnish.models import kernels as room
from burnish.models.kernels import Kernels, NoKernels, find_kernels
from burnish.recipe import build_recipe
from burnish.training import loss as loss_module
from burnish.training.engine import make_ready
from burnish.training.loss import summed_loss
from burnish.training.pack import Paths, flatten

TYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # what rounding leaves of a result, by norm


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    try:
        return find_kernels()
    except NoKernels as problem:
        pytest.skip(str(problem))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    found, expected = found.detach(), expected.detach()
    assert float((found.float() - expected.float()).norm()) <= TYPES[dtype] * float(expected.float().norm()) + 1e-30


def norm_by_hand(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * (offset + weight.float())


def turn_by_hand(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, H, D), in the form of halves, as transformers' apply_rotary_pos_emb."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None].float() + torch.cat([-second, first], -1) * sin[:, None].float()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("size", "offset"), [(640, 1.0), (37, 0.0)])
def test_norm(kernels: Kernels, dtype: torch.dtype, size: int, offset: float) -> None:
    x, weight, above = torch.randn(3, 11, size).to(dtype), torch.randn(size).to(dtype), torch.randn(3, 11, size).to(dtype)
    wide = x.float().requires_grad_()
    expected = norm_by_hand(wide, weight, 1e-6, offset)
    expected.backward(above.float())
    found, scale = kernels.rms_norm(x, weight, 1e-6, offset)
    near(found, expected.detach(), dtype)
    assert wide.grad is not None
    near(kernels.rms_norm_back(above, x, weight, offset, scale), wide.grad, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_turn(kernels: Kernels, dtype: torch.dtype, normed: bool) -> None:
    x, above = torch.randn(7, 3, 32).to(dtype), torch.randn(7, 3, 32).to(dtype)
    angle = torch.randn(7, 16).repeat(1, 2)
    cos, sin, weight = angle.cos().to(dtype), angle.sin().to(dtype), torch.randn(32).to(dtype) if normed else None
    wide = x.float().requires_grad_()
    inner = wide if weight is None else norm_by_hand(wide, weight, 1e-6, 1.0)
    expected = turn_by_hand(inner, cos, sin)
    expected.backward(above.float())
    found, scale = kernels.norm_and_turn(x, weight, 1e-6, 1.0, cos, sin)
    near(found, expected.detach(), dtype)
    assert wide.grad is not None
    near(kernels.norm_and_turn_back(above, x, weight, 1.0, scale, cos, sin), wide.grad, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(kernels: Kernels, dtype: torch.dtype, activation: str) -> None:
    gate, up, above = ((4 * torch.randn(9, 61)).to(dtype) for _ in range(3))
    gate[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -20.0]).to(dtype)  # where exponentials end
    wide = [gate.float().requires_grad_(), up.float().requires_grad_()]
    active = F.silu(wide[0]) if activation == "silu" else F.gelu(wide[0], approximate="tanh")
    expected = active * wide[1]
    expected.backward(above.float())
    near(kernels.gated(activation, gate, up), expected.detach(), dtype)
    inner, of_gate, of_up = kernels.gated_back(activation, gate, up, above.clone())
    for found, wanted in zip((inner, of_gate, of_up), (expected.detach(), wide[0].grad, wide[1].grad), strict=True):
        assert wanted is not None
        near(found, wanted, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("first", "window"), [(0, None), (5, None), (5, 4), (0, 3)])
def test_softmax(kernels: Kernels, dtype: torch.dtype, first: int, window: int | None) -> None:
    """2 key heads, 6 tokens of 3 heads each; token i sees keys first + i − window + 1 … first + i."""
    batch, tokens, group, keys = 2, 6, 3, first + 6
    scores, above = ((3 * torch.randn(batch, tokens * group, keys)).to(dtype) for _ in range(2))
    distance = first + torch.arange(tokens)[:, None] - torch.arange(keys)[None]
    sees = ((distance >= 0) & (distance < (window or keys))).repeat_interleave(group, 0)
    wide = scores.float().requires_grad_()
    logits = (wide * 0.3).masked_fill(~sees, -torch.inf)
    expected = logits.softmax(-1)
    expected.backward(above.float())
    found, log_sums = scores.clone(), torch.empty(batch * tokens * group)
    kernels.softmax(found, 0.3, log_sums, tokens, first, window)
    near(found, expected.detach(), dtype)
    near(0.3 * log_sums.view(batch, -1), logits.detach().logsumexp(-1), torch.float32)
    shares, of_scores = scores.clone(), above.clone()
    kernels.softmax_back(shares, of_scores, 0.3, log_sums, tokens, first, window)
    assert wide.grad is not None
    near(shares, expected.detach(), dtype)
    near(of_scores, wide.grad, dtype)
    assert not of_scores[:, ~sees].any()


@pytest.mark.parametrize("dtype", TYPES)
def test_logits(kernels: Kernels, dtype: torch.dtype) -> None:
    """Two blocks of words against one log-softmax over all of them."""
    logits, by_row = (5 * torch.randn(13, 90)).to(dtype), torch.rand(13, 1)
    targets = torch.randint(0, 90, (13,))
    wide = logits.float()
    expected = wide.logsumexp(1)
    log_sums, bound = torch.full((13,), -torch.inf), torch.empty(90)
    known = wide[torch.arange(13), targets].contiguous()
    for part in (slice(0, 50), slice(50, 90)):
        kernels.join_logits(logits[:, part].contiguous(), known, log_sums, bound[part])
    torch.testing.assert_close(log_sums, expected, rtol=1e-6, atol=1e-6)
    shares = torch.exp(wide - expected[:, None])
    assert bool((bound >= shares.amax(0) * (1 - 1e-5)).all()), "an upper bound of every row's probability"
    assert bool((bound <= torch.exp(wide - known[:, None]).amax(0).clamp(max=1.0) * (1 + 1e-5)).all())
    slopes, missing = logits[:, 50:].contiguous(), torch.ones(13, 1)
    kernels.logit_slopes(slopes, log_sums, by_row, torch.exp(known - log_sums), missing, targets, 50)
    wanted = (shares - F.one_hot(targets, 90)) * by_row
    near(slopes, wanted[:, 50:], dtype)
    torch.testing.assert_close(missing, 1 - shares[:, 50:].sum(1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_bytes(kernels: Kernels, dtype: torch.dtype) -> None:
    x = torch.randn(5, 70).to(dtype)
    x[2] = 0
    rounded, scale = kernels.to_bytes(x)
    expected = x.float().abs().amax(1).clamp_min(1e-12) / 127
    torch.testing.assert_close(scale, expected)
    assert torch.equal(rounded.float(), 128 + torch.round(x.float() / expected[:, None]))
    near(kernels.scale_rows(rounded.float() - 128, scale, dtype), x, torch.bfloat16)


def test_nan_stays(kernels: Kernels) -> None:
    """A step that is not finite must be seen as such: no kernel may make a number of it."""
    bad = torch.full((2, 32), torch.nan)
    assert kernels.rms_norm(bad, torch.ones(32), 1e-6, 0.0)[0].isnan().all()
    assert kernels.gated("silu", bad, torch.ones(2, 32)).isnan().all()
    log_sums = torch.full((2,), -torch.inf)
    kernels.join_logits(bad, torch.zeros(2), log_sums, torch.empty(32))
    assert log_sums.isnan().all()
    scores = torch.full((1, 4, 4), torch.nan)
    kernels.softmax(scores, 1.0, torch.empty(4), 4, 0, None)
    assert scores[0, 3].isnan().all()
    for spoilt in (torch.nan, torch.inf, -torch.inf):
        rows = torch.ones(2, 32)
        rows[1, 7] = spoilt
        assert kernels.to_bytes(rows)[1].isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", TYPES)
def test_what_a_model_is_sure_of_costs_nothing(kernels: Kernels, dtype: torch.dtype) -> None:
    """Logits of 20 and more, rounded to bfloat16, are off by 0.06: a loss is the exact one of the unrounded logits all the same, and never below 0."""
    from burnish.training.loss import _HeadLoss

    hidden, weight = (0.4 * torch.randn(64, 96)).to(dtype), torch.randn(700, 96).to(dtype)
    targets = (hidden.float() @ weight.float().T).argmax(1)
    weight[targets] *= 2
    rows = hidden.clone().requires_grad_()
    losses = _HeadLoss.apply(rows, weight, targets, None, kernels)
    losses.sum().backward()
    wide = hidden.double().requires_grad_()
    expected = F.cross_entropy(wide @ weight.double().T, targets, reduction="none")
    expected.sum().backward()
    assert bool((losses >= 0).all())
    assert rows.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(losses, expected.float(), rtol=1e-4, atol=5e-5 if dtype == torch.float32 else 0.05)
    assert float(losses.detach().sum()) == pytest.approx(float(expected.detach().sum()), abs=1e-3 if dtype == torch.float32 else 0.1)
    off = (rows.grad.double() - wide.grad).norm() / wide.grad.norm().clamp_min(1e-3)
    assert float(off) < (1e-3 if dtype == torch.float32 else 0.05)


def test_no_memory_for_a_row_is_an_error_and_no_crash(kernels: Kernels) -> None:
    """In a process of its own that may have little: 4 million words need 16 MB for each thread."""
    code = (
        "import resource, torch\nfrom burnish.models.kernels import find_kernels\n"
        "k = find_kernels()\nwords = 1 << 24\nlogits, bound = torch.zeros(1, words), torch.empty(words)\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (8 << 20), held + (8 << 20)))\n"
        "try:\n    k.join_logits(logits, torch.zeros(1), torch.zeros(1), bound)\n"
        "except MemoryError as problem: print('refused:', problem)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("refused: kernel join_logits"), (done.returncode, done.stderr[-500:])


def test_rows_whose_squares_overflow(kernels: Kernels) -> None:
    """1 ÷ their root mean square is 0: the norm and its gradient are 0, as torch's own are, and not 0 · infinity."""
    x, above = torch.full((2, 1, 32), 1e25), torch.full((2, 1, 32), 1e20)
    turn = (torch.ones(2, 32), torch.zeros(2, 32))
    for found, scale in (kernels.rms_norm(x, torch.ones(32), 1e-6, 0.0), kernels.norm_and_turn(x, torch.ones(32), 1e-6, 0.0, *turn)):
        assert not scale.any()
        assert not found.any()
        assert not kernels.rms_norm_back(above, x, torch.ones(32), 0.0, scale).any()
        assert not kernels.norm_and_turn_back(above, x, torch.ones(32), 0.0, scale, *turn).any()


def test_scores_as_large_as_numbers_get(kernels: Kernels) -> None:
    """At 1e20 a multiply-add's rounding is larger than any power of e: what is subtracted must have been rounded like what it is subtracted from."""
    scores, above = 1e20 * torch.randn(1, 8, 8), torch.randn(1, 8, 8)
    wide = scores.clone().requires_grad_()
    future = torch.ones(8, 8, dtype=torch.bool).triu(1)
    expected = (wide * 0.3).masked_fill(future, -torch.inf).softmax(-1)
    expected.backward(above)
    assert wide.grad is not None
    found, log_sums = scores.clone(), torch.empty(8)
    kernels.softmax(found, 0.3, log_sums, 8, 0, None)
    torch.testing.assert_close(found, expected.detach())
    shares, of_scores = scores.clone(), above.clone()
    kernels.softmax_back(shares, of_scores, 0.3, log_sums, 8, 0, None)
    torch.testing.assert_close(shares, expected.detach())
    torch.testing.assert_close(of_scores, wide.grad)


def test_the_number_of_threads_changes_nothing(kernels: Kernels) -> None:
    x, weight = torch.randn(64, 300), torch.randn(300)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        log_sums, bound = torch.full((64,), -torch.inf), torch.empty(300)
        kernels.join_logits(x, torch.full((64,), -torch.inf), log_sums, bound)
        results.append([kernels.rms_norm(x, weight, 1e-6, 1.0)[0], kernels.gated("gelu_tanh", x, x), log_sums, bound])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_tensor_on_its_side_is_refused(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match=r"contiguous.*strides \(1, 8\)"):
        kernels.rms_norm(torch.randn(8, 8).T, torch.ones(8), 1e-6, 0.0)
    assert not kernels.takes(torch.randn(8, 8).T)
    assert not kernels.takes(torch.randn(8), torch.randn(8).double())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_kernels_equals_the_model_without(
    family: str, dtype: torch.dtype, kernels: Kernels, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Loss and every adapter's gradient, with branches, windows shorter than what is shared, and query blocks of 8."""
    monkeypatch.setattr(fused_attention, "blocks_of_row", small_blocks)
    monkeypatch.setitem(loss_module._LEAST_PROBABILITY, dtype, 0.0)
    model = adapted(family, tokenizer, dtype=dtype)
    assert attend_by_segment(model)
    plain = flatten(branching(), Paths(by_segment=True, share=True))
    expected = gradients(model, lambda: summed_loss(model, plain))
    with_kernels = flatten(branching(), Paths(by_segment=True, share=True, kernels=kernels))
    fused.fuse(model, kernels)
    names = set(model.state_dict())
    assert fuse_attention(model, kernels, lambda: forward(model, plain)) == 3
    kinds = [type(module) for module in model.modules()]
    assert fuse_attention(model, kernels, lambda: forward(model, plain)) == 3
    assert [type(module) for module in model.modules()] == kinds, "those of an earlier training on this base stay as they are"
    assert set(model.state_dict()) == names, "what is saved has the same names"
    used: list[str] = []
    real = Kernels._call
    monkeypatch.setattr(Kernels, "_call", lambda self, name, *a, **k: used.append(name) or real(self, name, *a, **k))
    found = gradients(model, lambda: summed_loss(model, with_kernels))
    backwards = {"rms_norm_back", "norm_and_turn_back", "gated_back", "softmax_back", "logit_slopes"}
    assert backwards <= set(used)
    assert found[0] == pytest.approx(expected[0], rel=1e-5 if dtype == torch.float32 else 1e-2)
    close(found[1], expected[1], 2e-5 if dtype == torch.float32 else 8e-2)


def small_blocks(segments: Any, window: int | None) -> Any:
    from burnish.models import attention

    before = attention._QUERY_BLOCK
    attention._QUERY_BLOCK = 8
    try:
        return attention.blocks_of_row.__wrapped__(segments, window)
    finally:
        attention._QUERY_BLOCK = before


def forward(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        return summed_loss(model, batch)


def test_attention_that_would_differ_is_left_alone(kernels: Kernels, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each exchange is proved on the model's own call: here the kernel is wrong, so nothing is exchanged."""
    model = adapted("gemma3", tokenizer)
    assert attend_by_segment(model)
    fused.fuse(model, kernels)
    batch = flatten(branching(), Paths(by_segment=True, share=True))
    real = Kernels.softmax
    monkeypatch.setattr(Kernels, "softmax", lambda self, scores, scale, *rest: real(self, scores, 1.01 * scale, *rest))
    before = {name: type(module) for name, module in model.named_modules()}
    assert fuse_attention(model, kernels, lambda: forward(model, batch)) == 0
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_calls_without_segments_go_the_models_own_way(kernels: Kernels, tokenizer: Any) -> None:
    model = adapted("gemma3", tokenizer)
    ids, mask = torch.randint(5, 300, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        assert attend_by_segment(model)
        batch = flatten(branching(), Paths(by_segment=True, share=True))
        fused.fuse(model, kernels)
        assert fuse_attention(model, kernels, lambda: forward(model, batch)) == 3
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, before, rtol=1e-5, atol=1e-5)
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 15)


def test_without_a_compiler_the_training_says_so(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "which", lambda name: None)
    find_kernels.cache_clear()
    told: list[tuple[Any, ...]] = []
    recipe = build_recipe({"model": "m", "data": "d"})
    try:
        paths = make_ready(adapted("llama", tokenizer), branching(), recipe, steps=3, tell=lambda *what: told.append(what))
    finally:
        find_kernels.cache_clear()
    assert paths.kernels is None
    assert paths.by_segment
    assert any("no C compiler" in text and "slower" in text for _, _, _, text in told)


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such instruction' >&2\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(room, "cache_folder", lambda: tmp_path)
    find_kernels.cache_clear()
    try:
        with pytest.raises(NoKernels, match="cannot compile them: no such instruction"):
            find_kernels()
    finally:
        find_kernels.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("content", [b"", b"\x7fELF half of it", None])
def test_a_library_that_a_crash_cut_short_is_compiled_again(
    content: bytes | None, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """None: cut to half of its own bytes, which would end the process that loads it."""
    monkeypatch.setattr(room, "cache_folder", lambda: tmp_path)
    find_kernels.cache_clear()
    try:
        assert find_kernels().key == kernels.key
        (file,) = tmp_path.rglob("*.so")
        whole = file.read_bytes()
        file.unlink()  # the one that is loaded stays as it is
        file.write_bytes(whole[: len(whole) // 2] if content is None else content)
        find_kernels.cache_clear()
        assert find_kernels().key == kernels.key
        assert file.stat().st_size == len(whole)
    finally:
        find_kernels.cache_clear()


def test_a_folder_that_others_may_write_into_is_refused(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / f"kernels-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setattr(room, "cache_folder", lambda: tmp_path)
    find_kernels.cache_clear()
    try:
        with pytest.raises(NoKernels, match="somebody else may write"):
            find_kernels()
    finally:
        find_kernels.cache_clear()


def test_compiled_once_and_switched_off_by_a_key(kernels: Kernels, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled a second time")

    find_kernels.cache_clear()
    monkeypatch.setattr(room, "_compile", refuse)
    assert find_kernels().key == kernels.key
    recipe = build_recipe({"model": "m", "data": "d", "engine": {"compiled_kernels": False}})
    assert make_ready(adapted("llama", tokenizer), branching(), recipe, steps=3).kernels is None


def test_the_source_has_no_warnings(tmp_path: Path, kernels: Kernels) -> None:
    compiler = room.shutil.which("cc") or room.shutil.which("gcc")
    assert compiler is not None
    command = [compiler, *room._FLAGS, "-Wall", "-Wextra", "-Werror", "-c", str(room.SOURCE), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
