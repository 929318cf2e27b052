"""Charts of what happens around a training: the range test of the learning rate, and the stages of a chain."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from burnish.report.figures import ACCENT, MUTED, NARROW, NEUTRAL, blank, dress, svg
from burnish.report.texts import is_number, visible


def rate_figure(test: dict[str, Any], *, width: int) -> Markup:
    """The range test: how far the loss had changed at each rate (thin: measured, thick: smoothed), and the rate chosen."""
    points = [point for point in test["points"] if is_number(point.get("rate")) and is_number(point.get("change"))]
    figure, axes = _axes(width, "range test: change of the loss, nats per token")
    rates = [point["rate"] for point in points]
    axes.plot(rates, [point["loss"] - point["before"] for point in points], color=NEUTRAL, linewidth=0.8, alpha=0.45, gid="measured")
    axes.plot(rates, [point["change"] for point in points], color=NEUTRAL, linewidth=1.8, gid="smoothed")
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.axvline(test["learning_rate"], color=ACCENT, linewidth=1.2, linestyle=(0, (3, 3)))
    axes.annotate(f"chosen: {test['learning_rate']:.2g}", (test["learning_rate"], 1), xycoords=("data", "axes fraction"), xytext=(6, -10),
                  textcoords="offset points", color=ACCENT, fontsize=12, va="center")  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e−").replace("-", "−"))
    axes.set_xlabel("learning rate", color=MUTED, fontsize=11, loc="right", labelpad=1)
    lowest, highest = min(point["change"] for point in points), max(point["change"] for point in points)
    axes.set_ylim(lowest - 0.2 * abs(lowest) - 0.05, min(highest, abs(lowest) + 0.5) + 0.05)
    return svg(figure, f"rate-{width}", f"Range test of the learning rate; chosen {test['learning_rate']:.2g}")


def stages_figure(stages: dict[str, Any], *, width: int) -> Markup:
    """The loss of each set of validation rows before the chain and after each stage."""
    figure, axes = _axes(width, "validation loss, nats per token")
    states = stages["states"]
    names = list(states[0]["losses"])
    shown = [name for name in names if all(is_number(state["losses"].get(name)) for state in states)]
    for index, name in enumerate(shown):
        losses = [state["losses"][name] for state in states]
        colour = ACCENT if index == len(shown) - 1 else NEUTRAL
        style = ["-", (0, (4, 2)), (0, (1, 1.5)), "-."][index % 4] if colour == NEUTRAL else "-"
        axes.plot(range(len(states)), losses, color=colour, linestyle=style, linewidth=1.8, marker="o", markersize=5)
        axes.annotate(visible(name)[:30], (0, losses[0]), xytext=(4, 7), textcoords="offset points", color=colour, fontsize=11)
    room = 12 if width <= NARROW else 30
    axes.set_xticks(range(len(states)), [visible(f"after {state['after']}" if state["after"] else "base")[:room] for state in states])
    axes.set_ylim(bottom=0)
    return svg(figure, f"stages-{width}", "Loss of each set of validation rows before the chain and after each stage")


def _axes(width: int, title: str) -> tuple[Any, Any]:
    height = 260
    figure = blank(width, height)
    axes = figure.add_axes([48 / width, 40 / height, (width - 66) / width, (height - 70) / height])
    dress(axes, title)
    return figure, axes
