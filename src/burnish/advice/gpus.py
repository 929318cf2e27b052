"""A forecast for a GPU that is not here: FLOPs ÷ what it does a second, bytes ÷ what it reads a second, memory from the same parts.

Training and reading prompts are products: 2 FLOPs a weight and token forward, as much again backward for what flows through a frozen weight, and
once more for a trained one (Kaplan et al. 2020, arXiv 2001.08361, appendix B; here by part). Writing answers reads all weights once a step
(Pope et al. 2022, arXiv 2211.05102). Where so little is computed that the GPU waits for its launches, LAUNCH_SECONDS counts.

These are reckoned, not measured; expect a factor of 1.5 either way, which is their range.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from burnish.advice.estimate import COMPARE_SECONDS, Forecast
from burnish.errors import RecipeError
from burnish.evaluation import AnswerCost
from burnish.training import Shape, StepTimes, head_bytes

UTILISATION = (
    0.35  # of the peak for bfloat16 products, in training and on prompts; 0.3 to 0.5 is usual for models of 1 B parameters and more
)
BANDWIDTH_SHARE = 0.6  # of the peak, while answers are written
LAUNCHES_PER_LAYER, LAUNCH_SECONDS = 30, 6e-6  # kernels of a decoder layer in one direction, and what each takes at the least
CONTEXT_BYTES = 800 << 20  # CUDA, its libraries and their work space
FRAGMENTS = 1.1  # the allocator's loss on activations
RANGE = 1.5


@dataclass(frozen=True, slots=True)
class Gpu:
    memory_gb: float  # 10⁹ bytes
    bf16_tflops: float  # dense, accumulated in float32
    bandwidth_gb: float  # 10⁹ bytes a second
    source: str


# Dense bfloat16; data sheets print twice the number "with sparsity".
GPUS: dict[str, Gpu] = {
    "a10": Gpu(24, 125, 600, "NVIDIA A10 Tensor Core GPU, data sheet, 2021"),
    "a100-40gb": Gpu(40, 312, 1555, "NVIDIA A100 Tensor Core GPU, data sheet, 2022 (PCIe 40 GB)"),
    "a100-80gb": Gpu(80, 312, 2039, "NVIDIA A100 Tensor Core GPU, data sheet, 2022 (SXM 80 GB)"),
    "b200": Gpu(180, 2250, 8000, "NVIDIA DGX B200, data sheet, 2024 (a GPU of eight)"),
    "h100": Gpu(80, 989, 3350, "NVIDIA H100 Tensor Core GPU, data sheet, 2023 (SXM)"),
    "h100-pcie": Gpu(80, 756, 2000, "NVIDIA H100 Tensor Core GPU, data sheet, 2022 (PCIe)"),
    "h200": Gpu(141, 989, 4800, "NVIDIA H200 Tensor Core GPU, data sheet, 2023"),
    "l4": Gpu(24, 121, 300, "NVIDIA L4 Tensor Core GPU, data sheet, 2023"),
    "l40s": Gpu(48, 362, 864, "NVIDIA L40S, data sheet, 2023"),
    "rtx-3090": Gpu(24, 71, 936, "NVIDIA Ampere GA102 GPU architecture, white paper, 2020"),
    "rtx-4090": Gpu(24, 165, 1008, "NVIDIA Ada GPU architecture, white paper, 2022"),
    "rtx-5090": Gpu(32, 209, 1792, "NVIDIA RTX Blackwell GPU architecture, white paper, 2025"),
}


def find_gpu(name: str) -> Gpu:
    """Of the table, by name. Raises RecipeError with the nearest names."""
    if (found := GPUS.get(name.strip().lower().replace(" ", "-"))) is not None:
        return found
    near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
    raise RecipeError(f"--gpu {name}: not in the table{f'; did you mean {near[0]}' if near else ''}. There are {', '.join(GPUS)}")


def forecast_on(
    name: str, steps: StepTimes, answers: AnswerCost, *, prepare_seconds: float, price_per_hour: float | None = None
) -> Forecast:
    """The same run on one GPU of the table, in bfloat16."""
    gpu, shape = find_gpu(name), steps.shape
    step = step_seconds(
        gpu, shape, tokens=steps.tokens_per_step, targets=steps.target_tokens_per_step, checkpointing=steps.plan.checkpointing
    )
    # Validations are forward passes; measured here as a share of a step, which is about the same on a GPU.
    share = steps.validation_seconds / steps.seconds_per_step
    before = (steps.rate_seconds + steps.reference_seconds) / steps.seconds_per_step
    seconds = {
        "prepare": prepare_seconds,
        "baselines": answers.load_seconds + answer_seconds(gpu, shape, answers.work["baselines"]),
        "train": steps.load_seconds + step * (steps.steps + steps.validations * share + before),
        "evaluate": answers.load_seconds + answer_seconds(gpu, shape, answers.work["tuned"]) if answers.tuned else 0.0,
        "compare": COMPARE_SECONDS,
    }
    total = sum(seconds.values())
    parts = memory_on(shape, steps)
    return Forecast(
        machine=name,
        measured=False,
        seconds=seconds,
        low_seconds=total / RANGE,
        high_seconds=total * RANGE,
        step_seconds=step,
        steps=steps.steps,
        memory={**parts, "total": sum(parts.values())},
        memory_available=int(gpu.memory_gb * 1e9),
        assumptions=(
            f"{UTILISATION:.0%} of {gpu.bf16_tflops:g} TFLOP/s (bfloat16, dense), {BANDWIDTH_SHARE:.0%} of {gpu.bandwidth_gb:g} GB/s: {gpu.source}",
            f"each kernel takes {LAUNCH_SECONDS * 1e6:.0f} µs at the least",
            "reckoned from formulas, not measured on such a GPU: the range is a factor of 1.5 either way",
            "reading the model and preparing the rows take as long as here",
        ),
        price_per_hour=price_per_hour,
    )


def step_flops(shape: Shape, *, tokens: float, targets: float, checkpointing: bool = False) -> float:
    """Of one optimizer update, without attention's own products (small beside the weights' at rows of some hundred tokens)."""
    embedding = shape.vocabulary * shape.hidden_size
    body = shape.parameters - embedding - (shape.trained_parameters if shape.adapter else 0)
    passes = 2 + checkpointing  # forward, backward through the weights, forward again
    if not shape.adapter:
        return 2 * tokens * body * (passes + 1) + 2 * targets * embedding * 3
    # The head is frozen; its way back leaves out words of no probability, which is not counted on here.
    return 2 * tokens * (body * passes + shape.trained_parameters * (passes + 1)) + 2 * targets * embedding * 2


def step_seconds(gpu: Gpu, shape: Shape, *, tokens: float, targets: float, checkpointing: bool = False) -> float:
    computed = step_flops(shape, tokens=tokens, targets=targets, checkpointing=checkpointing) / (UTILISATION * gpu.bf16_tflops * 1e12)
    return max(computed, (3 + checkpointing) * shape.layers * LAUNCHES_PER_LAYER * LAUNCH_SECONDS)


def answer_seconds(gpu: Gpu, shape: Shape, work: dict[str, float]) -> float:
    """Of batches that hold so much work (evaluation/speed.py: UNITS)."""
    base = shape.parameters - (shape.trained_parameters if shape.adapter else 0)
    prompts = 2 * base * work["prompt tokens"] / (UTILISATION * gpu.bf16_tflops * 1e12)
    step = max(2 * base / (BANDWIDTH_SHARE * gpu.bandwidth_gb * 1e9), shape.layers * LAUNCHES_PER_LAYER * LAUNCH_SECONDS)
    return prompts + work["decoding steps"] * step


def memory_on(shape: Shape, steps: StepTimes) -> dict[str, int]:
    """The parts on a GPU in bfloat16, with the whole micro-batch in one row."""
    import torch

    narrow = 2 / shape.weight_bytes
    here, numbers = steps.memory, shape.trained_parameters
    kept: dict[str, Any] = {
        "weights": here.weights * narrow if shape.adapter else 2 * shape.parameters,
        "adapter": 2 * numbers if shape.adapter else 0,
        "gradients": 4 * numbers,
        "optimizer": 12 * numbers,
        "activations": shape.batch_tokens * steps.plan.bytes_per_token * narrow * FRAGMENTS,
        "head": head_bytes(shape.batch_targets, shape.vocabulary, shape.hidden_size, dtype=torch.bfloat16, device="cuda"),
        "everything_else": CONTEXT_BYTES,
    }
    return {name: int(value) for name, value in kept.items()}
