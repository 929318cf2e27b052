"""Writes dpo_golden.json: what TRL's own DPOTrainer computes on five pairs with a tiny model whose weights are formulas.

    python tests/numerics/make_dpo_golden.py            in an environment with trl (1.16.0 made the stored file)

test_preference.py builds the same model and pairs with `policy` and `PAIRS`, and compares. TRL is no dependency of Burnish or its tests.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).with_name("dpo_golden.json")
VOCABULARY = 97
BETA = 0.3
# (prompt, chosen, rejected): lengths differ; the second pair's answers begin alike.
PAIRS = [
    ([1, 5, 9, 13], [20, 21, 2], [30, 2]),
    ([1, 6, 10], [22, 23, 24, 25, 2], [22, 23, 60, 2]),
    ([1, 7, 11, 15, 19, 23, 27], [40, 2], [41, 42, 43, 44, 45, 2]),
    ([1, 8], [50, 51, 2], [52, 53, 2]),
    ([1, 5, 9, 13], [30, 2], [20, 21, 2]),  # the opposite of the first
]
ADAPTER = LoraConfig(r=2, lora_alpha=6, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")


def base() -> Any:
    """A Llama of two layers; every matrix is a sine of its index, so that any version of any library makes the same."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    _fill(model, 0.35, lambda name: True)
    return model


def move(model: Any) -> None:
    """Give the adapter weights as if it had been trained."""
    _fill(model, 0.3, lambda name: "lora_" in name)


def policy() -> Any:
    model = get_peft_model(base().requires_grad_(False), ADAPTER, autocast_adapter_dtype=False)
    move(model)
    return model


def _fill(model: Any, scale: float, wanted: Any) -> None:
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if parameter.dim() > 1 and wanted(name):
                index = torch.arange(parameter.numel(), dtype=torch.float64)
                parameter.copy_((torch.sin(index * 0.7311 + index**2 * 0.0137 + number) * scale).view_as(parameter))


def main() -> None:
    import datasets
    import trl
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(3, VOCABULARY)} | {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    rows = datasets.Dataset.from_list([{"prompt": "w5", "chosen": "w6", "rejected": "w7"}])  # TRL wants some; the batch below is our own
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            folder, beta=BETA, loss_type=["sigmoid"], report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False
        )
        trainer = trl.DPOTrainer(base(), args=settings, train_dataset=rows, processing_class=tokenizer, peft_config=ADAPTER)
        move(trainer.model)
        trainer.model.eval()
        batch = trainer.data_collator([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in PAIRS])
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["eval"].items() if name.startswith(("rewards/", "logps/"))}
        gradients = {
            name.removeprefix("module."): {"norm": float(p.grad.norm()), "first": p.grad.flatten()[:6].tolist()}
            for name, p in trainer.model.named_parameters()
            if p.requires_grad
        }
    content = {"trl": trl.__version__, "loss": float(loss.detach()), **metrics, "gradients": gradients}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
