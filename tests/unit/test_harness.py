"""The adapter to lm-evaluation-harness, with a stand-in for the library (it brings data sets from the network): what it hands over and what it is handed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from burnish.errors import DataError, ModelError, RecipeError
from burnish.evaluation import Ground, measure_suite, read_suites
from burnish.models import Limits, continuation_tokens, generate, score_continuations


class LM:
    """The abstract class of lm_eval.api.model, as far as an evaluation uses it."""

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    def install(evaluate: Callable[..., Any]) -> None:
        library, api, model = ModuleType("lm_eval"), ModuleType("lm_eval.api"), ModuleType("lm_eval.api.model")
        library.simple_evaluate, model.LM = evaluate, LM  # type: ignore[attr-defined]
        library.api, api.model = api, model  # type: ignore[attr-defined]
        for name, module in (("lm_eval", library), ("lm_eval.api", api), ("lm_eval.api.model", model)):
            monkeypatch.setitem(sys.modules, name, module)

    return install


def run(tmp_path: Path, model: Any, chat: Any, task: str = "tiny", rows: int | None = 7) -> dict[str, Any]:
    (suite,) = read_suites([f"lm-eval:{task}"])
    return measure_suite(tmp_path / "rows.jsonl", "w", lambda: model, suite, Ground(chat, 512, 4, harness_rows=rows))


def test_our_model_answers_the_harness(stand_in: Any, tiny_models: Any, chat: Any, tmp_path: Path) -> None:
    """The stand-in asks all three questions of an LM; each answer is that of our own functions. Its documents become rows, once each."""
    model, seen = tiny_models("llama"), {}

    def evaluate(**asked: Any) -> dict[str, Any]:
        lm = asked["model"]
        assert isinstance(lm, LM)
        assert (asked["tasks"], asked["limit"], asked["log_samples"]) == (["tiny"], 7, True)
        assert not asked["confirm_run_unsafe_code"]
        pairs = [SimpleNamespace(args=("a red", " cat")), SimpleNamespace(args=("a blue house and a", " dog"))]
        seen["pairs"] = lm.loglikelihood(pairs)
        seen["rolling"] = lm.loglikelihood_rolling([SimpleNamespace(args=("a red cat",))])
        until = {"until": ["\n"], "max_gen_toks": 5}
        seen["texts"] = lm.generate_until([SimpleNamespace(args=("Input: a red cat", until)), SimpleNamespace(args=("x", {"until": "z"}))])
        documents = [
            {"doc_id": n, "acc": float(n % 2), "acc_norm": float(n == 2), "filter": kind} for n in range(3) for kind in ("none", "strict")
        ]
        return {"samples": {"tiny": documents}}

    stand_in(evaluate)
    found = run(tmp_path, model, chat)
    assert [row.value for row in found.values()] == [0.0, 0.0, 1.0], "acc_norm before acc, each document once"
    assert {row.facts["document"] for row in found.values()} == {"tiny:0", "tiny:1", "tiny:2"}
    own = score_continuations(
        model, [continuation_tokens(chat, "a red", " cat", 512), continuation_tokens(chat, "a blue house and a", " dog", 512)]
    )
    assert seen["pairs"] == [(-one.nats, one.greedy) for one in own]
    (whole,) = score_continuations(model, [continuation_tokens(chat, "", "a red cat", 512)])
    assert seen["rolling"] == [pytest.approx(-whole.nats, rel=1e-6)]
    (batch,) = generate(model, chat, [chat.text_ids("Input: a red cat")], Limits(5, ("\n",)))
    assert seen["texts"][0] == batch[0][1].text
    stand_in(lambda **_: pytest.fail("measured a second time"))
    assert run(tmp_path, model, chat) == found


def test_what_the_harness_cannot_give(stand_in: Any, tiny_models: Any, chat: Any, tmp_path: Path) -> None:
    model = tiny_models("llama")

    def unknown(**_: Any) -> None:
        raise KeyError("no task called tiny")

    stand_in(unknown)
    with pytest.raises(RecipeError, match=r"no task called tiny.*lists the tasks"):
        run(tmp_path, model, chat)

    def offline(**_: Any) -> None:
        raise ConnectionError("no route")

    stand_in(offline)
    with pytest.raises(ModelError, match="where there is a network"):
        run(tmp_path, model, chat)
    stand_in(lambda **_: {"samples": {"tiny": [{"doc_id": 0, "word_perplexity": [1, 2]}]}})
    with pytest.raises(DataError, match="no number per document"):
        run(tmp_path, model, chat)
    stand_in(lambda **_: {"samples": {}})
    with pytest.raises(DataError, match="no documents"):
        run(tmp_path, model, chat)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, tiny_models: Any, chat: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModelError, match=r"lm-eval:tiny needs the extra `harness`.*pip install 'burnish\[harness\]'"):
        run(tmp_path, tiny_models("llama"), chat)


def test_the_real_library_agrees(tiny_models: Any, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lm-evaluation-harness is installed: a multiple-choice task over a local file gives, document by document, what our own suite of the same rows gives."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `harness`")
    from lm_eval.tasks import TaskManager

    rows = [{"query": f"Question: a red cat {n}", "choices": ["cat red", "dog blue house", "x"], "gold": n % 3} for n in range(9)]
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_mc.yaml").write_text(
        f"task: tiny_mc\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{query}}\\nAnswer:"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list: [{metric: acc_norm}]\n'
    )
    manager, evaluate = TaskManager(include_path=str(tmp_path)), lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **asked: evaluate(**asked, task_manager=manager))
    model = tiny_models("llama")
    found = run(tmp_path, model, chat, "tiny_mc", None)
    own = measure_suite(tmp_path / "own.jsonl", "w", lambda: model, read_suites([str(data)])[0], Ground(chat, 512, 4))
    assert [row.value for row in found.values()] == [row.value for row in own.values()]
