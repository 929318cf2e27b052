"""What TRL and Unsloth have in common: an SFTTrainer over token ids that are ready, in the given order, with the settings of everyone."""

from __future__ import annotations

import time
from typing import Any

from recorder import Recorder

BATCH = 8


def train(model: Any, tokenizer: Any, *, job: dict[str, Any], case: dict[str, Any], recorder: Recorder) -> None:
    """Options: bf16 (autocast), checkpointing, batching = `padded`, `padding_free` (the batch of 8 as one row) or `packed` (rows of max_length)."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    options = job["options"]
    batching = options.get("batching", "padded")
    rows = [case["train"][index] for batch in case["batches"] for index in batch]
    packed = {"packing": True, "max_length": options["max_length"]} if batching == "packed" else {"max_length": None}
    config = SFTConfig(
        output_dir=job["scratch"],
        per_device_train_batch_size=1 if batching == "packed" else BATCH,
        max_steps=job["steps"],
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=options["bf16"],
        gradient_checkpointing=options["checkpointing"],
        padding_free=batching == "padding_free",
        train_sampling_strategy="sequential",
        shuffle_dataset=batching == "packed",  # packing puts the longest rows first; shuffled, a few steps stand for all
        dataset_kwargs={"skip_prepare_dataset": batching != "packed"},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **packed,
    )
    watch = watcher(recorder, own_batches=batching == "packed")
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[watch])
    if batching == "packed":
        watch.lengths = [row["seq_lengths"] for row in trainer.train_dataset]
    trainer.train()
    trainer.model.save_pretrained(job["adapter"])
    recorder.finish(job["adapter"], torch.get_num_threads())


def watcher(recorder: Recorder, *, own_batches: bool) -> Any:
    """A callback that records when each step was done and its loss, as the trainer logs it."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        lengths: list[list[int]]  # of the documents of each packed row, where the trainer forms its own batches
        done_at = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            recorder.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.done_at = time.time()
            control.should_training_stop |= recorder.out_of_time

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
            if logs is None or "loss" not in logs:
                return  # the last log of a training holds totals
            sizes = {}
            if own_batches:
                each = args.per_device_train_batch_size
                documents = [n for row in self.lengths[(state.global_step - 1) * each : state.global_step * each] for n in row]
                sizes = {"tokens": sum(documents), "examples": len(documents)}
            recorder.step(state.global_step, float(logs["loss"]), at=self.done_at, **sizes)

    return Watch()
