"""A fabricated run (used by every test of the report), and what `gather` makes of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import DataError
from burnish.recipe import build_recipe
from burnish.report import report
from burnish.report.gather import FAILS_BELOW, SHOWN_WINS, gather
from burnish.run import Run

TITLES = {
    "base": "Base model",
    "few_shot": "Few-shot",
    "few_shot_retrieved": "Few-shot, retrieved",
    "tuned": "Fine-tuned",
}
SKILL = {"base": 0.0, "few_shot": 0.12, "few_shot_retrieved": 0.4, "tuned": 0.78}
AREAS = ("kitchen", "living room", "garden shed", "attic", "guest bathroom", "garage")
THINGS = ("lights", "fan", "blinds", "radio", "heater")


def _row(index: int, source: random.Random) -> dict[str, Any]:
    area, thing, action = source.choice(AREAS), source.choice(THINGS), source.choice(("On", "Off"))
    reference = {"intent": f"HassTurn{action}", "slots": {"area": area, "name": thing}}
    answers, scores, reasons = {}, {}, {}
    for name, skill in SKILL.items():
        if source.random() < skill:
            answers[name], scores[name] = json.dumps(reference), 1.0
        elif name == "base":
            answers[name], scores[name] = (
                f"Sure! I will turn {action.lower()} the {thing} in the {area} for you. " * 9,
                None,
            )
            reasons[name] = "not JSON: Expecting value at character 1"
        elif source.random() < 0.1:
            answers[name], scores[name], reasons[name] = "", None, "empty answer"
        else:
            wrong = {"intent": reference["intent"], "slots": {"area": source.choice(AREAS), "name": thing, "level": 3}}
            answers[name], scores[name] = json.dumps(wrong), 0.0
    return {
        "example": f"{index:016x}",
        "source": f"data/home-assistant-en.jsonl:{1000 + index}",
        "question": f"please turn {action.lower()} the {thing} in the {area}",
        "reference": json.dumps(reference),
        "answers": answers,
        "scores": scores,
        "reasons": reasons,
    }


def comparison(rows: int = 150) -> dict[str, Any]:
    source = random.Random(0)
    detail = [_row(index, source) for index in range(rows)]
    candidates = []
    for position, name in enumerate(SKILL):
        share = sum(row["scores"][name] or 0 for row in detail) / rows
        bad = sum(row["scores"][name] is None for row in detail)
        candidates.append(
            {
                "name": name,
                "title": TITLES[name],
                "score": share,
                "low": max(0.0, share - 0.07),
                "high": min(1.0, share + 0.07),
                "n": rows,
                "unscored": bad,
                "unscored_reasons": {"not JSON": bad} if bad else {},
                "metrics": {
                    "field_f1": {"value": min(1, share + 0.12), "low": share, "high": min(1, share + 0.2)},
                    "edit_similarity": {
                        "value": 0.3 + 0.6 * share,
                        "low": 0.25 + 0.6 * share,
                        "high": 0.35 + 0.6 * share,
                    },
                },
                "seconds_p50": 0.31 + 0.4 * (position in (1, 2)),
                "seconds_p95": 0.9 + 1.1 * (position in (1, 2)),
                "rows_per_second": 4.2 - position / 2,
                "prompt_tokens_mean": (21.4, 311.0, 352.2, 21.4)[position],
                "completion_tokens_mean": (63.9, 30.2, 28.8, 27.1)[position],
                "stopped_fraction": (0.31, 0.97, 0.99, 1.0)[position],
                "training_seconds": 301.4 if name == "tuned" else None,
                "prompt_form": (None, "as_is", "instructed", None)[position],
                "shots": (None, 8, 8, None)[position],
            }
        )
    score = {row["name"]: row["score"] for row in candidates}
    pairs = [
        {
            "candidate": "tuned",
            "baseline": name,
            "metric": "json_match",
            "n": rows,
            "difference": score["tuned"] - score[name],
            "low": score["tuned"] - score[name] - 0.09,
            "high": score["tuned"] - score[name] + 0.08,
            "p_value": 1e-9,
            "p_adjusted": 3e-9,
            "verdict": "BETTER",
        }
        for name in ("base", "few_shot", "few_shot_retrieved")
    ]
    fields = {
        name: {
            field: {"precision": min(1, s + 0.1), "recall": s, "f1": min(1, s + 0.05), "support": support}
            for field, support in (("intent", rows), ("slots.area", 121), ("slots.name", 97), ("slots.level", 12))
        }
        for name, s in score.items()
    }
    return {
        "metric": "json_match",
        "metric_title": "JSON match",
        "metric_reads": "The answer parses to the same JSON value: key order and 1 or 1.0 do not matter.",
        "metric_reason": "every training answer is a JSON object",
        "binary": True,
        "confidence": 0.95,
        "rows": rows,
        "detectable_difference": 0.114,
        "verdict": "BETTER",
        "sentence": f"Fine-tuning helped: the tuned model is right on {score['tuned']:.0%} of {rows} unseen rows; "
        f"the best baseline, few-shot with retrieved examples, on {score['few_shot_retrieved']:.0%}.",
        "best_baseline": "few_shot_retrieved",
        "candidates": candidates,
        "comparisons": pairs,
        "fields": fields,
        "consistency": consistency(score, rows),
        "rows_detail": detail,
    }


def consistency(score: dict[str, float], rows: int) -> dict[str, Any]:
    """Two checks of every candidate, one for which fewer is better, and one that could not be measured."""

    def measured(value: float) -> dict[str, Any]:
        bounds = {"low": max(0.0, value - 0.07), "high": min(1.0, value + 0.06)}
        return {"value": value, **bounds, "n": rows, "unscored": 2, "unscored_reasons": {"prediction is not JSON": 2}, "left_out": 3}

    pair = {"difference": 0.1, "low": 0.05, "high": 0.16, "p_value": 1e-4, "p_adjusted": 2e-4, "n": rows, "verdict": "BETTER"}
    json_check = {
        "key": "json",
        "title": "valid JSON",
        "reads": "The whole answer is one JSON value.",
        "binary": True,
        "lower_is_better": False,
        "note": None,
    }
    loops = {
        "key": "repetition",
        "title": "loops",
        "reads": "It says the same again.",
        "binary": True,
        "lower_is_better": True,
        "note": "A note.",
    }
    return {
        "chosen": "by the recipe",
        "against": "few_shot_retrieved",
        "measures": [
            {**json_check, "candidates": {name: measured(value) for name, value in score.items()}, "comparisons": {"tuned": pair}},
            {**loops, "candidates": {name: measured(1 - value) for name, value in score.items()}, "comparisons": {"tuned": pair}},
        ],
        "refused": [{"check": "tone", "reason": "training answers are too short to have a tone"}],
    }


def judged() -> dict[str, Any]:
    return {
        "subject": "tuned", "against": "few_shot_retrieved", "model": "a-judge", "base_url": "https://example.org/v1", "judges_itself": True,
        "rubric": "The better answer names the room.", "confidence": 0.95, "rows": 100, "of_rows": 150, "n": 100, "won": 61, "lost": 20, "tied": 19,
        "win_rate": 0.705, "low": 0.62, "high": 0.78, "p_value": 1e-5, "verdict": "BETTER", "reasons": {"agreed": 81, "place": 15, "alike": 4},
        "position_bias": 15 / 96, "unreadable": 0, "labels": {"n": 40, "share": 0.8, "kappa": 0.61, "low": 0.41, "high": 0.78}, "spent": 0.12,
        "judgements": [],
    }  # fmt: skip


def manifest() -> dict[str, Any]:
    return {
        "sources": [
            {
                "path": "/home/me/home-assistant-en.jsonl",
                "split": "train",
                "format": "chat",
                "rows": 1500,
                "sha256": "ab" * 32,
            }
        ],
        "splits": {
            name: {"rows": count, "groups": count // 5, "sha256": f"{count:064x}"}
            for name, count in (("train", 1200), ("validation", 120), ("test", 150))
        },
        "removed": [{"source": "x.jsonl:4", "reason": "exact duplicate"}],
        "removed_counts": {"exact duplicate": 23, "13-word overlap with training": 7},
        "duplicate_fraction": 0.0153,
        "token_lengths": {
            name: {
                "p50": 47,
                "p90": 62,
                "p99": 80,
                "max": 97,
                "target_p50": 24,
                "target_p90": 33,
                "target_p99": 41,
                "target_max": 48,
            }
            for name in ("train", "validation", "test")
        },
        "attribution": "Sentences from home-assistant-intents, © The Home Assistant authors, CC BY 4.0.",
        "warnings": ["12 rows of 1,500 end without a full stop while the others have one"],
    }


def selection() -> dict[str, Any]:
    scores = {
        ("few_shot", 2): 0.04,
        ("few_shot", 8): 0.125,
        ("few_shot_retrieved", 2): 0.29,
        ("few_shot_retrieved", 8): 0.375,
    }
    tried = [
        {
            "candidate": name,
            "prompt_form": form,
            "shots": shots,
            "score": max(0, value - 0.08 * (form == "as_is")),
            "n": 24,
        }
        for (name, shots), value in scores.items()
        for form in ("as_is", "instructed")
    ]
    tried += [{"candidate": "base", "prompt_form": form, "shots": 0, "score": 0.0, "n": 24} for form in ("as_is", "instructed")]
    return {
        "metric": "json_match",
        "rows": 24,
        "tried": tried,
        "chosen": {
            "base": {"prompt_form": "as_is", "shots": 0},
            "few_shot": {"prompt_form": "instructed", "shots": 8},
            "few_shot_retrieved": {"prompt_form": "instructed", "shots": 8},
        },
        "instruction": "Answer with one JSON object that has the keys intent and slots.",
        "example_prompts": {
            name: f"{name}\nUser: turn on the lights\nAssistant: " * 6 for name in ("base", "few_shot", "few_shot_retrieved")
        },
    }


def training_lines(steps: int = 150) -> list[dict[str, Any]]:
    source, lines = random.Random(1), []
    for step in range(1, steps + 1):
        mean = 0.09 + 3.2 * 0.965**step
        lines.append(
            {
                "step": step,
                "epoch": step / 50,
                "loss": mean * (1 + 0.25 * source.uniform(-1, 1)),
                "learning_rate": 2e-4 * min(1, step / 8) * (0.1 + 0.9 * (1 - step / steps)),
                "gradient_norm": 0.8,
                "target_tokens": 210,
                "tokens": 400,
                "seconds": 2.0 * step,
            }
        )
        if step % 25 == 0:
            worse = 0.012 * max(0, step - 100) / 25
            lines.append({"step": step, "epoch": step / 50, "validation_loss": mean + 0.05 + worse, "seconds": 2.0 * step})
    return lines


def training_summary() -> dict[str, Any]:
    return {
        "steps": 150,
        "planned_steps": 450,
        "epochs": 1.0,
        "seconds": 301.4,
        "tokens_per_second": 412.7,
        "examples_per_second": 8.31,
        "target_tokens": 31500,
        "best_step": 125,
        "best_validation_loss": 0.1892,
        "stopped_early": True,
        "trainable_parameters": 3796992,
        "total_parameters": 271895168,
        "peak_memory_bytes": 3 * 2**30,
        "learning_rate": 2e-4,
        "method": "lora",
        "base_model": "gemma-3-270m",
    }


def fabricate(path: Path, *, tuned: bool = True, optional: bool = True) -> Run:
    """A plausible run folder; without `tuned` as before training, without `optional` with comparison.json alone."""
    run = Run.create(path, build_recipe({"model": "gemma-3-270m", "data": "x.jsonl", "name": "home"}))
    content = comparison()
    if not tuned:
        content |= {"verdict": None, "sentence": None, "comparisons": [], "candidates": content["candidates"][:3]}
    run.write_json(run.comparison_file, content)
    if optional:
        run.write_json(run.manifest_file, manifest())
        run.write_json(run.selection_file, selection())
        if tuned:
            run.write_json(run.judge_file, judged())
            run.write_jsonl(run.metrics_file, training_lines())
            run.write_json(run.training_file, training_summary())
        steps = ("prepare", "baselines", "train", "evaluate", "compare")
        run.write_json(
            run.status_file,
            {
                "created": "2026-08-01T09:30:11.000+00:00",
                "versions": {"burnish": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "python": "3.11.2"},
                "machine": {"processor": "AMD EPYC", "cores": 2, "memory": "7.8 GiB", "device": "cpu"},
                "steps": {s: {"state": "done", "seconds": 7.5 * 3**i, "inputs": "00ff" * 4} for i, s in enumerate(steps)},
            },
        )
    return run


def test_counts_match_a_second_count(tmp_path: Path) -> None:
    rows = gather(fabricate(tmp_path / "run"))["rows"]
    detail = comparison()["rows_detail"]
    tuned = [row["scores"]["tuned"] == 1 for row in detail]
    best = [row["scores"]["few_shot_retrieved"] == 1 for row in detail]
    assert rows["counts"] == {
        "wins": sum(t and not b for t, b in zip(tuned, best, strict=True)),
        "losses": sum(b and not t for t, b in zip(tuned, best, strict=True)),
        "ties": sum(t == b for t, b in zip(tuned, best, strict=True)),
    }
    assert rows["all_fail"] == sum(all((value or 0) < FAILS_BELOW for value in row["scores"].values()) for row in detail)
    assert len(rows["wins"]) == SHOWN_WINS
    assert all(row["scores"]["tuned"] == 1 and row["scores"]["few_shot_retrieved"] != 1 for row in rows["wins"])


def test_graded_metrics_show_the_largest_differences_first(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    content = comparison(3)
    content |= {"binary": False}
    for row, value in zip(content["rows_detail"], (0.5, 0.9, 0.7), strict=True):
        row["scores"] = {"tuned": value, "few_shot_retrieved": 0.4}
    run.write_json(run.comparison_file, content)
    assert [row["scores"]["tuned"] for row in gather(run)["rows"]["wins"]] == [0.9, 0.7, 0.5]


def test_without_a_tuned_candidate(tmp_path: Path) -> None:
    facts = gather(fabricate(tmp_path / "run", tuned=False))
    assert facts["subject"] is None
    assert facts["training"] is None
    assert facts["best_baseline"] == "few_shot_retrieved"
    assert facts["rows"]["wins"] == []


def test_comparison_alone_is_enough(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", optional=False)
    page = report(run).read_text(encoding="utf-8")
    assert "BETTER" in page
    facts = json.loads(run.report_json_file.read_text(encoding="utf-8"))
    assert (facts["data"], facts["baselines"], facts["training"]) == (None, None, None)


def test_the_smallest_comparison(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", build_recipe({"model": "m", "data": "x.jsonl"}))
    run.write_json(run.comparison_file, {"candidates": [{"name": "base"}]})
    assert "NO VERDICT" in report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [[], {}, {"candidates": 3}, {"candidates": [{"title": "nameless"}]}])
def test_what_is_no_comparison_is_refused_and_nothing_is_written(tmp_path: Path, content: Any) -> None:
    run = fabricate(tmp_path / "run")
    run.write_json(run.comparison_file, content)
    with pytest.raises(DataError, match="burnish compare"):
        report(run)
    assert not run.report_file.exists()
    assert not run.report_json_file.exists()


def test_missing_comparison_names_the_step(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    run.comparison_file.unlink()
    with pytest.raises(DataError, match="burnish compare"):
        report(run)


def test_report_json_holds_the_numbers_and_its_schema_version(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    report(run)
    facts = json.loads(run.report_json_file.read_text(encoding="utf-8"))
    content = comparison()
    assert facts["schema_version"] == 1
    assert [row["score"] for row in facts["candidates"]] == [row["score"] for row in content["candidates"]]
    assert [{k: v for k, v in pair.items() if k != "title"} for pair in facts["comparisons"]] == content["comparisons"]
    assert facts["verdict"]["verdict"] == "BETTER"
    assert "report" not in facts["steps"]


def test_long_curves_are_thinned_with_both_ends(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    run.write_jsonl(run.metrics_file, training_lines(5000))
    steps = gather(run)["training"]["steps"]
    assert len(steps) == 800
    assert (steps[0]["step"], steps[-1]["step"]) == (1, 5000)
