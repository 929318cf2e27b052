"""One sub-command per door; no logic. Exit codes: 0 done · 1 our fault · 2 the user's input · 3 a gate said no · 4 can't tell.

The doors are imported inside the commands: `burnish --help` must not wait for torch.

    app.py    the application and its shared options    steps.py, decide.py, estimate.py, search.py, rows.py, retain.py, look.py    the commands
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback

import typer

from burnish.cli import decide, estimate, judge, look, retain, rows, search, steps
from burnish.cli.app import Interrupted, app, is_launched, rank
from burnish.errors import EXIT_DONE, EXIT_OUR_FAULT, EXIT_USER_INPUT, BurnishError, Stopped

COMMANDS = (steps, decide, estimate, judge, search, rows, retain, look)  # importing a module adds its commands


def main() -> None:
    """The command `burnish`."""
    # Threads that spin while they wait lose all where another process wants the same cores: a step of 20 s took 72 s. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # oneDNN keeps the code of its last 1,024 products, megabytes each; packed rows have new lengths at every step. A step has some 150.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # --debug counts wherever it stands: people add it at the end of the line that failed.
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except BurnishError as problem:
        code = _report_error(str(problem), problem.exit_code, debug)
    except typer.Abort:
        code = _report_error("stopped", EXIT_OUR_FAULT, debug)
    except (KeyboardInterrupt, Interrupted) as caught:
        stop = caught.__cause__ if isinstance(caught, Interrupted) else caught
        text = str(stop) or "stopped: finished steps are kept"
        code = stop.exit_code if isinstance(stop, Stopped) else 130
        if is_launched():
            # The launcher says how to go on; the other processes have nothing to add to what the first says.
            code = code if rank() else _report_error(text, code, debug)
        else:
            code = _report_error(f"{text}\ngo on with:  {_again()}", code, debug)
    except BrokenPipeError:
        code = EXIT_DONE
    except Exception as problem:
        # Usage errors come from typer's own click; they know how to print themselves.
        if hasattr(problem, "show") and hasattr(problem, "exit_code"):
            problem.show()
            code = EXIT_USER_INPUT
        else:
            code = _report_error(
                f"burnish failed: {type(problem).__name__}: {problem}. This is our fault; --debug shows where", EXIT_OUR_FAULT, debug
            )
    sys.exit(code or EXIT_DONE)


def _report_error(text: str, code: int, debug: bool) -> int:
    from burnish.cli.terminal import complain

    if debug:
        traceback.print_exc()
    complain(text)
    return code


def _again() -> str:
    """The command that goes on: this one, without what would delete what is there."""
    return shlex.join(["burnish", *(argument for argument in sys.argv[1:] if argument != "--fresh")])
