"""A plain loop over transformers + PEFT: padded batches, AdamW. Options: dtype, head = `all` (the model's own loss) or `targets`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from recorder import Recorder, read_job
from transformers import AutoModelForCausalLM

LEARNING_RATE, MAX_NORM = 2e-4, 1.0


def main() -> None:
    job, case = read_job()
    recorder = Recorder(job)
    model = load(case, job["options"]["dtype"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    model.train()
    recorder.begin()
    for number, batch in enumerate(case["batches"][: job["steps"]], 1):
        loss = mean_loss(model, pad([case["train"][index] for index in batch]), job["options"]["head"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.step(number, float(loss.detach()))
        if recorder.out_of_time:
            break
    model.save_pretrained(job["adapter"])
    recorder.finish(job["adapter"], torch.get_num_threads())


def load(case: dict[str, Any], dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return PeftModel.from_pretrained(model, case["adapter"], is_trainable=True)


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Input ids, attention mask and labels, each (B, T), padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[place, :n], mask[place, :n], labels[place, :n] = torch.tensor(row["input_ids"]), 1, torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def mean_loss(model: Any, batch: dict[str, torch.Tensor], head: str) -> torch.Tensor:
    """Mean nats per target token of a batch."""
    if head == "all":
        return model(**batch, use_cache=False).loss
    causal = model.get_base_model()
    hidden = causal.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
    targets = batch["labels"][:, 1:]
    rows = targets != -100
    return F.cross_entropy(causal.lm_head(hidden[:, :-1][rows]).float(), targets[rows])


if __name__ == "__main__":
    main()
