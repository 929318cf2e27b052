"""Where each file of a run lies: every name once."""

from __future__ import annotations

from pathlib import Path


class Places:
    """The names of a run's files and folders, whether they are there or not."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def resolved_file(self) -> Path:
        return self.path / "recipe.resolved.yaml"

    @property
    def status_file(self) -> Path:
        return self.path / "run.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    def split_file(self, split: str) -> Path:
        return self.path / "data" / f"{split}.jsonl"

    @property
    def manifest_file(self) -> Path:
        return self.path / "data" / "manifest.json"

    @property
    def selection_file(self) -> Path:
        return self.path / "candidates" / "selection.json"

    def predictions_file(self, candidate: str) -> Path:
        return self.path / "candidates" / f"{candidate}.jsonl"

    def samples_file(self, candidate: str) -> Path:
        return self.path / "candidates" / f"{candidate}.samples.jsonl"

    def endpoint_file(self, name: str) -> Path:
        return self.path / "endpoints" / f"{name}.jsonl"

    @property
    def judge_file(self) -> Path:
        return self.path / "judge.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "training" / "metrics.jsonl"

    @property
    def training_file(self) -> Path:
        return self.path / "training" / "summary.json"

    @property
    def rate_file(self) -> Path:
        return self.path / "training" / "rate.json"

    @property
    def stages_file(self) -> Path:
        return self.path / "stages.json"

    def stage_folder(self, name: str) -> Path:
        return self.path / "stages" / name

    @property
    def decision_file(self) -> Path:
        return self.path / "decision.json"

    @property
    def decision_report_file(self) -> Path:
        return self.path / "decision.html"

    @property
    def probe_file(self) -> Path:
        return self.path / "probe.json"

    @property
    def probe_folder(self) -> Path:
        return self.path / "probe"

    @property
    def bases_file(self) -> Path:
        return self.path / "bases.json"

    def base_folder(self, name: str) -> Path:
        return self.path / "bases" / name

    @property
    def sweep_file(self) -> Path:
        return self.path / "sweep.json"

    @property
    def trials_file(self) -> Path:
        return self.path / "trials.jsonl"

    @property
    def best_recipe_file(self) -> Path:
        return self.path / "best.yaml"

    @property
    def sweep_report_file(self) -> Path:
        return self.path / "sweep.html"

    @property
    def curve_file(self) -> Path:
        return self.path / "curve.json"

    @property
    def curve_points_file(self) -> Path:
        return self.path / "curve.jsonl"

    @property
    def curve_report_file(self) -> Path:
        return self.path / "curve.html"

    @property
    def value_file(self) -> Path:
        return self.path / "value.json"

    @property
    def value_work_file(self) -> Path:
        """What the short trainings of `burnish value` brought, a line each: from here it goes on."""
        return self.path / "value-work.jsonl"

    @property
    def value_rows_file(self) -> Path:
        return self.path / "value.jsonl"

    @property
    def value_table_file(self) -> Path:
        return self.path / "value.csv"

    @property
    def value_report_file(self) -> Path:
        return self.path / "value.html"

    @property
    def kept_file(self) -> Path:
        return self.path / "kept.jsonl"

    @property
    def reference_file(self) -> Path:
        """What the model said of each preference pair before training."""
        return self.path / "training" / "reference.json"

    @property
    def tokens_folder(self) -> Path:
        """The rows as tokens."""
        return self.path / "training" / "tokens"

    @property
    def frozen_folder(self) -> Path:
        """What frozen lower layers make of the rows, while training."""
        return self.path / "training" / "frozen"

    @property
    def checkpoints_folder(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter_folder(self) -> Path:
        return self.path / "adapter"

    @property
    def comparison_file(self) -> Path:
        return self.path / "comparison.json"

    @property
    def estimate_file(self) -> Path:
        return self.path / "estimate.json"

    @property
    def card_file(self) -> Path:
        return self.path / "model_card.md"

    @property
    def retain_file(self) -> Path:
        return self.path / "retain.json"

    @property
    def retain_folder(self) -> Path:
        """Rows, answers and trainings of `burnish retain`; each training is a run of its own."""
        return self.path / "retain"

    @property
    def retain_rows_file(self) -> Path:
        return self.retain_folder / "rows.jsonl"

    @property
    def replay_file(self) -> Path:
        """Rows that the base model wrote for replay."""
        return self.retain_folder / "replay.jsonl"

    @property
    def repaired_folder(self) -> Path:
        return self.path / "adapter-repaired"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def report_json_file(self) -> Path:
        return self.path / "report.json"
