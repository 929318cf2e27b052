"""Charts as inline SVG, drawn by matplotlib in the page's own colours: they follow the light and the dark theme.

Each colour is drawn as a stand-in and replaced by a CSS variable of the page (`_COLOURS`). Text stays text, in the
page's font (`svg.fonttype: none`). The same numbers give the same bytes: the ids' salt is fixed, no date is written.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from typing import Any

from markupsafe import Markup

from burnish.report.texts import interval, is_number, loss, score, signed, visible

WIDE, NARROW = 960, 340  # CSS pixels; the page shows one or the other, so that letters keep their size on a telephone

_COLOURS = {  # stand-in → variable of report.css
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--accent)",
    "#050505": "var(--neutral)",
    "#060606": "var(--soft)",
    "#070707": "var(--surface)",
    "#080808": "var(--good)",
    "#090909": "var(--bad)",
}
INK, MUTED, LINE, ACCENT, NEUTRAL, SOFT, SURFACE, GOOD, BAD = _COLOURS
_ROW_HEIGHT, _MARGIN = 52, 1  # pixels
_TRACK = (0.02, 0.38)  # where a row's scale runs, below its name, in heights of a row from its middle
_VERDICT_COLOURS = {"BETTER": GOOD, "WORSE": BAD}


def scores_figure(candidates: list[dict[str, Any]], subject: str | None, *, percent: bool, width: int) -> Markup:
    """One row per candidate: its name, its score, and a dot with its interval on a common scale."""
    rows = [
        {
            "title": row["title"],
            "value": row["score"],
            "low": row["low"],
            "high": row["high"],
            "colour": ACCENT if row["name"] == subject else NEUTRAL,
            "text": score(row["score"], percent),
            "detail": interval(row["low"], row["high"], percent),
        }
        for row in candidates
    ]
    low, high = _span(rows, (0.0, 1.0) if percent else None)
    figure, axes = _row_axes(len(rows), width, low, high)
    ticks = [0, 0.25, 0.5, 0.75, 1] if percent else _ticks(low, high)
    _scale(axes, len(rows), ticks, [f"{100 * tick:.0f} %" if percent else f"{tick:.3g}" for tick in ticks])
    _draw_rows(axes, rows, width)
    label = "Scores with intervals. " + "; ".join(f"{row['title']}: {row['text']} ({row['detail']})" for row in rows)
    return svg(figure, f"scores-{width}", label)


def differences_figure(comparisons: list[dict[str, Any]], *, percent: bool, detectable: Any, width: int) -> Markup:
    """One row per pair, under its `title`: the paired difference and its interval; the band is what so few rows cannot show."""
    rows = [
        {
            "title": pair["title"],
            "value": pair["difference"],
            "low": pair["low"],
            "high": pair["high"],
            "colour": _VERDICT_COLOURS.get(str(pair["verdict"]), NEUTRAL),
            "text": signed(pair["difference"], percent),
            "detail": f"{signed(pair['low'], percent)} to {signed(pair['high'], percent)}",
        }
        for pair in comparisons
    ]
    low, high = _span(rows, None, around=detectable if is_number(detectable) else 0.0)
    figure, axes = _row_axes(len(rows), width, low, high)
    if is_number(detectable):
        for index in range(len(rows)):
            axes.fill_between([-detectable, detectable], index + _TRACK[0], index + _TRACK[1], color=SOFT, linewidth=0, zorder=0)
    ticks = _ticks(low, high)
    _scale(axes, len(rows), ticks, [signed(tick, percent).removesuffix(".0") if tick else "0" for tick in ticks])
    axes.vlines([0] * len(rows), *_tracks(len(rows)), color=MUTED, linewidth=1, zorder=1)
    _draw_rows(axes, rows, width)
    label = "Differences with intervals. " + "; ".join(f"{row['title']}: {row['text']} ({row['detail']})" for row in rows)
    return svg(figure, f"differences-{width}", label)


def training_figure(training: dict[str, Any], *, width: int) -> Markup:
    """Loss per step (thin: measured, thick: smoothed), validation losses, the best one ringed; below, the rate."""
    steps, checks, best = training["steps"], training["validations"], training["summary"]["best_step"]
    height = 360 if width > NARROW else 300
    figure = blank(width, height)
    left, right = 44 / width, (width - 2 * _MARGIN - 44) / width
    axes = figure.add_axes([left, 112 / height, right, (height - 132) / height])
    below = figure.add_axes([left, 34 / height, right, 50 / height], sharex=axes)
    if steps:
        at = [line["step"] for line in steps]
        axes.plot(at, [line["loss"] for line in steps], color=NEUTRAL, linewidth=0.8, alpha=0.45, gid="measured")
        axes.plot(at, [line["smoothed_loss"] for line in steps], color=NEUTRAL, linewidth=1.8, gid="smoothed")
        rates = [(line["step"], line["learning_rate"]) for line in steps if is_number(line["learning_rate"])]
        below.plot([step for step, _ in rates], [rate for _, rate in rates], color=MUTED, linewidth=1.2)
    if checks:
        at, losses = [line["step"] for line in checks], [line["validation_loss"] for line in checks]
        axes.plot(at, losses, color=ACCENT, linewidth=1.2, marker="o", markersize=5, gid="validation")
    for line in checks:
        if line["step"] == best:
            _mark_best(axes, best, line["validation_loss"])
            break
    axes.set_ylim(bottom=0)
    dress(axes, "loss, nats per token")
    dress(below, "learning rate")
    below.set_ylim(bottom=0)
    below.locator_params(axis="y", nbins=2)
    below.ticklabel_format(axis="y", style="plain")
    below.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e−").replace("-", "−") if value else "0")
    below.set_xlabel("step", color=MUTED, fontsize=11, loc="right", labelpad=1)
    axes.tick_params(labelbottom=False)
    return svg(figure, f"training-{width}", "Training loss per step, validation losses, and the learning rate")


# -------------------------------------------------------------------------------------------------------------- inside


def blank(width: int, height: int) -> Any:
    from matplotlib.figure import Figure  # slow to import, and only these functions need it

    return Figure(figsize=(width / 72, height / 72), facecolor="none")  # 72 units per inch: one SVG unit is one pixel


def _row_axes(count: int, width: int, low: float, high: float) -> tuple[Any, Any]:
    height = count * _ROW_HEIGHT + 26
    figure = blank(width, height)
    axes = figure.add_axes([_MARGIN / width, 26 / height, (width - 2 * _MARGIN) / width, 1 - 26 / height])
    axes.set_xlim(low, high)
    axes.set_ylim(count - 0.5, -0.5)
    return figure, axes


def _span(rows: list[dict[str, Any]], fixed: tuple[float, float] | None, *, around: float | None = None) -> tuple[float, float]:
    if fixed:
        return fixed
    values = [row[key] for row in rows for key in ("value", "low", "high") if is_number(row[key])] or [0.0]
    low, high = min([*values, 0.0]), max([*values, 0.0])
    room = 0.06 * (high - low) or 0.1
    if around is not None:  # both sides of zero stay in sight
        return min(low, -around) - room, max(high, around) + room
    return (low - room if low < 0 else low), high + room


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def _scale(axes: Any, count: int, ticks: list[float], labels: list[str]) -> None:
    axes.patch.set_visible(False)
    axes.set_yticks([])
    axes.set_xticks(ticks, labels, color=MUTED, fontsize=11)
    axes.tick_params(axis="x", length=0, pad=6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for tick in ticks:
        axes.vlines([tick] * count, *_tracks(count), color=LINE, linewidth=1, zorder=0.5, clip_on=False)
    # Labels at the ends of the scale stay inside the picture.
    for label, tick in zip(axes.get_xticklabels(), ticks, strict=True):
        low, high = axes.get_xlim()
        label.set_horizontalalignment("left" if tick == low else "right" if tick == high else "center")


def _tracks(count: int) -> tuple[list[float], list[float]]:
    """The upper and lower ends of the rows' scales: names and numbers stand free of lines."""
    return [index + _TRACK[0] for index in range(count)], [index + _TRACK[1] for index in range(count)]


def _draw_rows(axes: Any, rows: list[dict[str, Any]], width: int) -> None:
    room = (width - 100) // 8 if width <= NARROW else 70
    for index, row in enumerate(rows):
        title = visible(" ".join(str(row["title"]).split()))
        title = title if len(title) <= room else f"{title[: room - 1].rstrip()}…"
        place = {"transform": axes.get_yaxis_transform(), "parse_math": False, "va": "center"}
        detail = f"  ({row['detail']})" if row["detail"] and width > NARROW else ""
        axes.text(0, index - 0.22, title, color=INK, fontsize=13, ha="left", **place)
        axes.text(1, index - 0.22, row["text"] + detail, color=INK, fontsize=13, ha="right", **place)
        line = index + 0.2
        if is_number(row["low"]) and is_number(row["high"]):
            axes.plot([row["low"], row["high"]], [line, line], color=row["colour"], linewidth=7, alpha=0.28,
                      solid_capstyle="round", clip_on=False)  # fmt: skip
        if is_number(row["value"]):
            axes.plot([row["value"]], [line], "o", color=row["colour"], markersize=11, markeredgecolor=SURFACE,
                      markeredgewidth=2, clip_on=False)  # fmt: skip


def _mark_best(axes: Any, step: float, value: float) -> None:
    axes.axvline(step, color=ACCENT, linewidth=1, linestyle=(0, (3, 3)), alpha=0.7)
    axes.plot([step], [value], "o", markersize=11, markerfacecolor="none", markeredgecolor=ACCENT, markeredgewidth=1.8)
    low, high = axes.get_xlim()
    late = step > (low + high) / 2
    axes.annotate(f"best: {loss(value)} at step {step}", (step, 1), xycoords=("data", "axes fraction"),
                  xytext=(-8 if late else 8, -10), textcoords="offset points", ha="right" if late else "left",
                  color=ACCENT, fontsize=12, va="center")  # fmt: skip


def dress(axes: Any, title: str) -> None:
    axes.patch.set_visible(False)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, labelcolor=MUTED)
    axes.set_title(title, loc="left", color=MUTED, fontsize=11, pad=6)


def svg(figure: Any, name: str, label: str) -> Markup:
    """The figure as an <svg> element: ids unique in the page, colours as CSS variables, a text for screen readers."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": None}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # glyphs that matplotlib's own font lacks; the browser brings its fonts
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    width, height = (72 * inches for inches in figure.get_size_inches())
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    # Inside tags only: what stands between them is text, and no text can hold a bare < or >.
    body = re.sub(r"<[^>]+>", lambda match: _page_tag(match.group(), name), body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    head = Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">').format(width, height, visible(label))
    return head + Markup(body) + Markup("</svg>")  # matplotlib escaped every text


def _page_tag(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', tag)
    tag = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', tag)
    tag = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", tag)
    return re.sub(r"#0[1-9]0[1-9]0[1-9]", lambda match: _COLOURS.get(match.group(), match.group()), tag)
