"""The loss of adapters on held-out rows: float32, one row at a time, PEFT's own layers, the same code for everyone.

Runs in the plain environment: held_out.py JOB, a JSON file with `case`, `rows` and `adapters` (name → folder); prints name → nats per token.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from recorder import read_job
from transformers import AutoModelForCausalLM


def main() -> None:
    job, case = read_job()
    rows = case["held_out"][: job["rows"]]
    base = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32, attn_implementation="sdpa").eval()
    losses = {"": mean_loss(base, rows)}
    for name, folder in job["adapters"].items():
        model = PeftModel.from_pretrained(base, folder).eval()
        losses[name] = mean_loss(model.get_base_model(), rows)
        base = model.unload()
    print(json.dumps(losses))


@torch.inference_mode()
def mean_loss(causal: Any, rows: list[dict[str, list[int]]]) -> float:
    total, count = 0.0, 0
    for row in rows:
        targets = torch.tensor(row["labels"][1:])
        hidden = causal.model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).last_hidden_state[0, :-1]
        wanted = targets != -100
        total += float(F.cross_entropy(causal.lm_head(hidden[wanted]), targets[wanted], reduction="sum"))
        count += int(wanted.sum())
    return total / count


if __name__ == "__main__":
    main()
