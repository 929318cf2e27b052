"""Training speed, memory, start-up and loss curves: Burnish, TRL, Unsloth and a plain transformers + PEFT loop, side by side.

    python benchmarks/train_speed.py                         everything (one to two hours on 2 cores)
    python benchmarks/train_speed.py --rounds 1 --steps 4 --cases plain --contestants burnish trl-fp32

Run it with the Python that Burnish is installed in, on a quiet machine (Linux). README.md here says what is measured. The last line is
`RESULT {…}`; results/train_speed.json and .md hold everything.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speed.contestants import BURNISH, CONTESTANTS, REFERENCE, default_field
from speed.environments import NotInstalled, ensure
from speed.launch import Order, Outcome, environment, run
from speed.summary import machine, markdown, rate, result_line, summarise_case

HERE = Path(__file__).resolve().parent
HELD_OUT_ROWS = {"plain": 64, "prefix": 16}  # at most; the long prompt makes each of them three times as dear
UNCAPPED_SECONDS = 3600.0
QUIET_SHARE = 0.03  # of the machine, that other processes may take


def main() -> None:
    asked = arguments()
    cases = {name: make_case(name, asked) for name in asked.cases}
    pythons, absent = find_pythons(asked)
    names = [name for name in asked.contestants if CONTESTANTS[name].environment in pythons]
    runs: dict[tuple[str, str, int], Outcome] = {}
    for number in range(1, asked.rounds + 1):  # in turn, so that a machine that drifts drifts for all
        for case in [case for case in cases if case == "plain" or number <= asked.prefix_rounds]:
            for name in names:
                if case in CONTESTANTS[name].cases:
                    order = make_order(name, case, number, asked=asked, python=pythons[CONTESTANTS[name].environment])
                    runs[case, name, number] = take_turn(order, cases[case], asked)
    held_out = {case: measure_held_out(case, runs, pythons, asked) for case in cases}
    tables = {case: summarise_case(case, runs, [n for n in names if case in CONTESTANTS[n].cases], held_out[case]) for case in cases}
    result = result_line(tables, runs)
    document = {
        "result": result, "result_json": json.dumps(result), "command": shlex.join(["python", *sys.argv]), "when": time.strftime("%Y-%m-%d"),
        "machine": machine(), "revision": revision(), "absent": absent, "cases": tables,
        "base_held_out_loss": {case: losses.get("") for case, losses in held_out.items()},
    }  # fmt: skip
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "train_speed.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (asked.output / "train_speed.md").write_text(markdown(document), encoding="utf-8")
    print(markdown(document).rsplit("```", 2)[0])
    print("RESULT " + json.dumps(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared/data/gsm8k/train.jsonl", help="GSM8K's train.jsonl")
    parser.add_argument(
        "--environments", type=Path, default=HERE.parent / ".venv-bench", help="where the peers' virtual environments are kept"
    )
    parser.add_argument("--torch-index", help="a package index with CPU builds of torch, where the usual one has only CUDA builds")
    parser.add_argument("--work", type=Path, default=Path("runs/train_speed"), help="cases, logs and adapters")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--cases", nargs="+", choices=("plain", "prefix"), default=["plain", "prefix"])
    parser.add_argument(
        "--contestants", nargs="+", choices=list(CONTESTANTS), default=default_field(), metavar="NAME", help=" ".join(CONTESTANTS)
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prefix-rounds", type=int, default=1, help="of the case with the long prompt, where a step takes minutes")
    parser.add_argument(
        "--steps", type=int, default=24, help="of Burnish and (in round 1) of the reference, plain case; at most 32, one epoch"
    )
    parser.add_argument("--peer-steps", type=int, default=6, help="of the others, plain case; the first is not timed")
    parser.add_argument("--prefix-steps", type=int, default=4, help="of everyone in the case with the long prompt; the first is not timed")
    parser.add_argument(
        "--order", choices=("buckets", "shuffled"), default="buckets",
        help="everyone's batches: like lengths together, which spares the padded peers their padding, or as shuffled (another --work for it)",
    )  # fmt: skip
    parser.add_argument("--cap", type=float, default=900, help="seconds after which a peer stops at the end of its step")
    parser.add_argument("--held-out-rows", type=int, default=64, help="on which adapters are measured after training; 0: none")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of Burnish's recipe")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --work holds already")
    asked = parser.parse_args()
    if not 2 <= asked.steps <= 32 or min(asked.peer_steps, asked.prefix_steps) < 2:
        parser.error("--steps is 2 to 32; --peer-steps and --prefix-steps at least 2: the first step is not timed")
    if not asked.data.is_file():
        parser.error(f"--data {asked.data}: not there; GSM8K's train.jsonl is at https://github.com/openai/grade-school-math (MIT)")
    asked.work, asked.environments = asked.work.resolve(), asked.environments.resolve()
    return asked


def make_case(name: str, asked: argparse.Namespace) -> Path:
    """The case's file, made in a process of its own: this one stays small, since a child's peak memory begins with its parent's."""
    file = case_file(name, asked)
    if not (asked.resume and file.exists()):
        command = [sys.executable, str(HERE / "speed" / "cases.py"), name, "--data", str(asked.data), "--folder", str(file.parent)]
        command += ["--shuffled"] if asked.order == "shuffled" else []
        subprocess.run(command, check=True, env=environment(BURNISH))
    return file


def case_file(name: str, asked: argparse.Namespace) -> Path:
    return Path(asked.work) / "cases" / name / "case.json"


def find_pythons(asked: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """(environment → its Python, contestant → why it is not here). The plain one is always made: it measures the held-out loss."""
    pythons, reasons = {"": Path(sys.executable)}, {}
    for name in dict.fromkeys(["plain", *(CONTESTANTS[name].environment for name in asked.contestants)]):
        if name not in pythons:
            try:
                pythons[name] = ensure(name, asked.environments, asked.torch_index)
            except NotInstalled as problem:
                reasons[name] = str(problem)
                print(problem, flush=True)
    return pythons, {name: reasons[CONTESTANTS[name].environment] for name in asked.contestants if CONTESTANTS[name].environment in reasons}


def make_order(name: str, case: str, number: int, *, asked: argparse.Namespace, python: Path) -> Order:
    long = name == BURNISH or (name == REFERENCE and number == 1)
    steps = asked.prefix_steps if case == "prefix" else asked.steps if long else asked.peer_steps
    return Order(
        name, case, number, steps, cap_seconds=UNCAPPED_SECONDS if long else asked.cap, python=python,
        folder=asked.work / f"{case}-{name}-{number}", overrides=tuple(asked.set),
    )  # fmt: skip


def take_turn(order: Order, file: Path, asked: argparse.Namespace) -> Outcome:
    kept = order.folder / "outcome.json"
    if asked.resume and kept.exists():
        outcome = Outcome(**json.loads(kept.read_text(encoding="utf-8")))
        if outcome.problem is None and len(outcome.steps) >= 2:
            return outcome
    print(f"round {order.round} · {order.case} · {CONTESTANTS[order.contestant].title}, {order.steps} steps ...", flush=True)
    outcome = run(order, json.loads(file.read_text(encoding="utf-8")), file)
    if len(outcome.steps) >= 2:
        speed = f"{rate(outcome, 'tokens'):.1f} tok/s · {rate(outcome, 'examples'):.3f} examples/s"
        print(
            f"    {speed} · {outcome.peak_bytes / 1e9:.1f} GB · first step {outcome.first_step_done} s · {len(outcome.steps)} steps",
            flush=True,
        )
    if (outcome.others_share or 0.0) > QUIET_SHARE:
        print(
            f"    not quiet: other processes took {outcome.others_share:.0%} of the machine meanwhile; these figures do not count for much",
            flush=True,
        )
    if outcome.problem:
        print(f"    {outcome.problem}", flush=True)
    return outcome


def measure_held_out(case: str, runs: Mapping[tuple[str, str, int], Outcome], pythons: Mapping[str, Path], asked: Any) -> dict[str, float]:
    """Contestant → loss of its first round's adapter on held-out rows; "" is the base model's. Long prompts: Burnish and the reference only."""
    done = {name: outcome.adapter for (c, name, number), outcome in runs.items() if (c, number) == (case, 1) and outcome.adapter}
    wanted = {name: folder for name, folder in done.items() if case == "plain" or name in (BURNISH, REFERENCE)}
    rows = min(HELD_OUT_ROWS[case], asked.held_out_rows)
    if not wanted or not rows or "plain" not in pythons:
        return {}
    print(f"{case} · loss of {len(wanted)} adapters on {rows} held-out rows ...", flush=True)
    job_file = asked.work / f"held-out-{case}.json"
    job = {"case": str(case_file(case, asked)), "rows": rows, "adapters": wanted}
    job_file.write_text(json.dumps(job), encoding="utf-8")
    command = [str(pythons["plain"]), str(HERE / "speed" / "held_out.py"), str(job_file)]
    done_process = subprocess.run(command, capture_output=True, text=True, env=environment(REFERENCE))
    if done_process.returncode:
        print(f"    failed: {done_process.stderr.strip()[-500:]}", flush=True)
        return {}
    return dict(json.loads(done_process.stdout.strip().splitlines()[-1]))


def revision() -> str | None:
    done = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
