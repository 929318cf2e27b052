"""Unsloth's own door on a CPU: FastLanguageModel with a saved adapter, then its SFTTrainer. It chooses the compute type by itself.

It needs no switch to run here: where torch sees no accelerator, `import unsloth` takes its CPU backend. Nothing of it is patched by us.
"""

from __future__ import annotations

# isort: off
import unsloth  # noqa: F401 - first, as it asks: it patches TRL and transformers
import torch
from recorder import Recorder, read_job
from sft import train
from unsloth import FastLanguageModel


def main() -> None:
    job, case = read_job()
    recorder = Recorder(job)
    options = job["options"]
    model, tokenizer = FastLanguageModel.from_pretrained(
        case["adapter"],
        max_seq_length=2048,
        dtype=getattr(torch, options["dtype"]),
        load_in_4bit=False,
        use_gradient_checkpointing="unsloth" if options["checkpointing"] else False,
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=options["checkpointing"])
    train(model, tokenizer, job=job, case=case, recorder=recorder)


if __name__ == "__main__":
    main()
