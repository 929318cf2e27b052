"""TRL's SFTTrainer. Options: dtype of the base weights, and those of sft.py."""

from __future__ import annotations

import torch
from peft import PeftModel
from recorder import Recorder, read_job
from sft import train
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    job, case = read_job()
    recorder = Recorder(job)
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=getattr(torch, job["options"]["dtype"]), attn_implementation="sdpa")
    model = PeftModel.from_pretrained(model, case["adapter"], is_trainable=True)
    train(model, AutoTokenizer.from_pretrained(case["model"]), job=job, case=case, recorder=recorder)


if __name__ == "__main__":
    main()
