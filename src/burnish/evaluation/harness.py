"""Tasks of lm-evaluation-harness (extra `harness`) on a model that is in memory: an adapter between its `LM` and ours. Nothing here is written for one task.

The harness brings its own rows (it downloads them on first use), prompts, metrics and versions: a suite `lm-eval:TASK` is what others report under that name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from burnish.errors import DataError, ModelError, RecipeError, missing_extra
from burnish.models import Chat, Limits, continuation_tokens, generate, negative_log_likelihood, score_continuations

# The number of a document that counts, the first that a task gives. Of several answers the one with lengths taken into account, as in our own suites.
METRICS = ("acc_norm", "acc", "exact_match", "em", "f1", "mc2", "mcc")
MOST_NEW_TOKENS = 256  # where a task does not say when to end


def run_harness(model: Any, chat: Chat, task: str, *, window: int, rows: int | None, batch_size: int) -> Iterator[tuple[str, float, str]]:
    """(document, value, the metric's name) for each document of a task. `rows`: the first so many.

    Raises ModelError where the extra is not installed, RecipeError for a task the harness does not know, DataError where it gives no number per document.
    """
    with missing_extra("harness", f"the suite lm-eval:{task}"):
        import lm_eval
        import lm_eval.api.model
    adapter = adapter_of(lm_eval.api.model.LM, model, chat, window=window, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=adapter, tasks=[task], limit=rows, bootstrap_iters=0, log_samples=True, confirm_run_unsafe_code=False
        )
    except (KeyError, ValueError) as problem:
        raise RecipeError(f"retain.suites: lm-eval:{task}: {str(problem)[:300]}. `lm-eval ls tasks` lists the tasks") from problem
    except (OSError, ConnectionError) as problem:
        raise ModelError(
            f"lm-eval:{task}: its rows cannot be fetched: {str(problem)[:300]}. Run it once where there is a network"
        ) from problem
    samples = [(part, sample) for part, those in (found or {}).get("samples", {}).items() for sample in those]
    if not samples:
        raise DataError(f"lm-eval:{task}: the harness gave no documents")
    seen: set[str] = set()
    for part, sample in samples:
        metric = next((name for name in METRICS if isinstance(sample.get(name), int | float)), None)
        if metric is None:
            raise DataError(
                f"lm-eval:{task}: no number per document under any of {', '.join(METRICS)}; its metric is one of the whole task, which cannot be paired"
            )
        document = f"{part}:{sample['doc_id']}"
        if document not in seen:  # a document is told once for each of the task's filters
            seen.add(document)
            yield document, float(sample[metric]), metric


def adapter_of(base: Any, model: Any, chat: Chat, *, window: int, batch_size: int) -> Any:
    """Our model as the harness wants it: an instance of its `LM` (`base`)."""

    class Adapter(base):
        def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            """(log p(continuation | context), whether it is what greedy decoding writes) for each request."""
            sequences = [continuation_tokens(chat, request.args[0], request.args[1], window) for request in requests]
            return [(-found.nats, found.greedy) for found in score_continuations(model, sequences)]

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            """log p of each whole text, in windows."""
            return [-negative_log_likelihood(model, _without_end(chat.text_tokens(request.args[0], window))) for request in requests]

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            """Greedy answers, each cut where its request says."""
            answers: dict[int, str] = {}
            for settings, members in _alike(requests).items():
                prompts = [_last(chat.text_ids(requests[index].args[0]), window - settings.max_new_tokens) for index in members]
                for batch in generate(model, chat, prompts, settings, batch_size=batch_size):
                    answers |= {members[place]: answer.text for place, answer in batch}
            return [answers[index] for index in range(len(requests))]

    return Adapter()


def _last(ids: list[int], room: int) -> list[int]:
    """The first token and as many of the last as fit."""
    return ids if len(ids) <= max(room, 2) else [ids[0], *ids[-(max(room, 2) - 1) :]]


def _without_end(windows: list[Any]) -> list[Any]:
    """The harness scores the text alone: the stop token that ends our windows is no part of it."""
    last = windows[-1]
    if last.target_tokens <= 1 and len(windows) > 1:
        return windows[:-1]
    return [*windows[:-1], type(last)(last.input_ids[:-1], last.labels[:-1])]


def _alike(requests: Sequence[Any]) -> dict[Limits, list[int]]:
    """Requests that end alike are answered together."""
    found: dict[Limits, list[int]] = {}
    for index, request in enumerate(requests):
        options: Mapping[str, Any] = request.args[1] if isinstance(request.args[1], Mapping) else {}
        until = options.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        limits = Limits(int(options.get("max_gen_toks", MOST_NEW_TOKENS)), tuple(stop for stop in stops if stop))
        found.setdefault(limits, []).append(index)
    return found
