"""Figures of the report, as SVG and PNG to be put into the page."""

import base64
import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import image, ticker

from attnlab.ablate.results import Cost, Row, by_seed, count, finished, front, mean_cost, weighed
from attnlab.ablate.statistics import paired_difference

# Okabe and Ito's colours, which colour-blind readers can distinguish too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
# The same, light enough for a dark page.
_COLOURS_IN_THE_DARK = ("#5ab0ea", "#f58a47", "#2fc79b", "#eba3cb", "#f3bd45", "#9bd8fa", "#cda862", "#b4b4b4")
# After the last colour the first comes again, with the next of these.
_LINES = (("solid", "o"), ("dashed", "s"), ("dotted", "^"), ("dashdot", "D"))
# Drawn in this colour, text and axes take the page's own (light or dark) by the replacement in `svg`.
_INK = "#010203"
# Inches; so narrow that the text of 10 points keeps about this size on a phone.
_WIDTH = 4.3

# Characters of a name in a figure; the tables have it whole.
_LONGEST = 36

Draw = Callable[[Any, Any], None]


class Style(NamedTuple):
    """How an arm is drawn, in every figure."""

    colour: str
    line: str
    marker: str


def styles(arms: Sequence[str]) -> dict[str, Style]:
    looks = itertools.cycle(Style(colour, *line) for line in _LINES for colour in _COLOURS)
    return dict(zip(arms, looks))


def dark_style() -> str:
    """The page's rule that makes figures and swatches lighter in the dark."""
    colours = "; ".join(f"--arm{number}: {colour}" for number, colour in enumerate(_COLOURS_IN_THE_DARK))
    return f"@media (prefers-color-scheme: dark) {{ :root {{ {colours} }} }}"


def _on_page(drawing: str) -> str:
    """With the page's own colours, light or dark, in place of those that it was drawn in."""
    for number, colour in enumerate(_COLOURS):
        drawing = drawing.replace(colour, f"var(--arm{number}, {colour})")
    return drawing.replace(_INK, "currentColor")


def _short(name: str, longest: int = _LONGEST) -> str:
    """On one line, and without its middle if it is long."""
    name = " ".join(name.split())
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-(longest // 2 - 1) :]}"


def swatch(style: Style) -> str:
    """An arm's line and marker, as in the figures, to stand before its name."""
    dashes = {"solid": "", "dashed": "4 2", "dotted": "1 2", "dashdot": "5 2 1 2"}[style.line]
    marker = {
        "o": '<circle cx="12" cy="6" r="4"/>',
        "s": '<rect x="8" y="2" width="8" height="8"/>',
        "^": '<path d="M12 1 17 10 7 10z"/>',
        "D": '<path d="M12 1 17 6 12 11 7 6z"/>',
    }[style.marker]
    line = f'<path d="M0 6H24" style="stroke: {style.colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
    drawn = f'style="fill: {style.colour}" aria-hidden="true">{line}{marker}</svg>'
    return f'<svg class="swatch" viewBox="0 0 24 12" {_on_page(drawn)}'


def svg(draw: Draw, *, title: str, height: float = 3.2) -> str:
    """A figure with its title, to be put into a page. draw(figure, axes) fills it; height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "legend.frameon": False,
        "text.parse_math": False,  # names are no formulas
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # Measured with a font that lacks the glyph, drawn with the reader's.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)  # which can measure text
        draw(figure, figure.subplots())
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = out.getvalue()
    body = _on_page(text[text.index("<svg") :])
    named = html.escape(title)
    return f'<figure><figcaption>{named}</figcaption><div role="img" aria-label="{named}">{body}</div></figure>'


def png(pixels: np.ndarray) -> str:
    """Pixels uint8 [Y, X, 1, 3 or 4] as the address of an image."""
    out = io.BytesIO()
    image.imsave(out, np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels, format="png")
    return data_address(out.getvalue())


def data_address(content: bytes) -> str:
    """A PNG file's content as the address of an image."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def weights_png(weights: np.ndarray) -> str:
    """Weights uint8 [Y, X], 0 drawn as nothing, as the address of an image."""
    colours = matplotlib.colormaps["viridis"](weights, bytes=True)
    colours[..., 3] = np.where(weights > 0, 255, 0)
    return png(colours)


def _legend(figure: Any, axes: Any) -> None:
    """Below the figure, which grows by as much, so that nothing is covered."""
    handles, names = axes.get_legend_handles_labels()
    if not names:
        return
    names = [_short(name) for name in names]
    columns = min(len(names), max(1, int(_WIDTH * 72 / (38 + 5.2 * max(map(len, names))))))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(names) / columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9, columnspacing=1)


def curves(rows: Sequence[Row], looks: dict[str, Style], split: str, metric: str) -> Draw:
    """One thin line per seed, and the mean over seeds, thick."""

    def draw(figure: Any, axes: Any) -> None:
        for arm, look in looks.items():
            lines = [
                np.array([(point["step"], point[metric]) for point in row["history"] if point["split"] == split])
                for row in finished(rows, arm)
            ]
            lines = [line for line in lines if len(line)]
            for line in lines if len(lines) > 1 else ():
                axes.plot(*line.T, color=look.colour, linewidth=1, alpha=0.6)
            if lines:
                steps = lines[0][:, 0]
                mean = np.mean([np.interp(steps, *line.T) for line in lines], axis=0)
                marks = {"marker": look.marker, "markersize": 4, "markevery": max(1, len(steps) // 8)}
                axes.plot(steps, mean, color=look.colour, linestyle=look.line, linewidth=1.8, label=arm, **marks)
        axes.set_xlabel("step")
        axes.set_ylabel(f"{metric} (nats)" if metric == "loss" else _short(metric))
        axes.grid(alpha=0.2)
        _legend(figure, axes)

    return draw


def differences(rows: Sequence[Row], looks: dict[str, Style], metric: str, others: Sequence[str]) -> Draw:
    """One dot per seed, and the mean with its interval, relative to the baseline."""
    baseline, side = rows[0]["baseline"], "right" if rows[0]["higher_is_better"] else "left"

    def draw(figure: Any, axes: Any) -> None:
        base = by_seed(rows, baseline)
        for height, arm in enumerate(reversed(others)):
            values, colour = by_seed(rows, arm), looks[arm].colour
            dots = [values[seed] - base[seed] for seed in values if seed in base]
            difference = paired_difference(values, base)
            axes.plot(dots, [height] * len(dots), "o", color=colour, alpha=0.5, markersize=5)
            if not math.isnan(difference.low):
                axes.plot([difference.low, difference.high], [height, height], color=colour, linewidth=2)
            axes.plot([difference.mean], [height], "D", color=colour, markersize=7)
        axes.axvline(0, color=_INK, linewidth=1)
        axes.set_yticks(range(len(others)), [_short(arm) for arm in reversed(others)])
        axes.set_ylim(-0.6, len(others) - 0.4)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5 if max(map(len, others)) < 20 else 2))
        # Below the figure, not the axes, which names of arms may leave little room.
        figure.supxlabel(f"validation {_short(metric)} minus\n{_short(baseline)}'s ({side} is better)", fontsize=10)
        axes.grid(alpha=0.2, axis="x")

    return draw


def digits_apart(numbers: Sequence[float]) -> int:
    """Digits of counts that tell numbers apart: three, or of costs that were matched more, one of which is to spare."""
    enough = next((n for n in range(3, 7) if len({count(x, n) for x in numbers}) == len(numbers)), 7)
    return enough + (enough > 3)


def against_cost(rows: Sequence[Row], looks: dict[str, Style], metric: str, cost: Cost) -> Draw:
    """One dot per arm, the metric's mean over seeds with its standard deviation, against a cost; the Pareto front."""

    def draw(figure: Any, axes: Any) -> None:
        best = front(rows, cost)
        shown = [arm for arm in looks if arm in weighed(rows, cost)]
        points = {arm: (mean_cost(rows, arm, cost), float(np.mean(list(by_seed(rows, arm).values())))) for arm in shown}
        deviations = {arm: _deviation(list(by_seed(rows, arm).values())) for arm in shown}
        for arm in shown:
            axes.errorbar(
                *points[arm],
                yerr=deviations[arm] or None,
                xerr=_quartiles(finished(rows, arm)[0]["rounds"]) if cost.column == "speed" else None,
                color=looks[arm].colour,
                marker=looks[arm].marker,
                markersize=8 if arm in best else 6,
                markeredgecolor=_INK if arm in best else looks[arm].colour,
                elinewidth=1,
                zorder=3,
            )
        across = [point[0] for point in points.values()]
        if max(across) > 3 * min(across) > 0:
            axes.set_xscale("log")
            ratio = max(across) / min(across)
            subs = (1.0,) if ratio > 300 else (1.0, 3.0) if ratio > 10 else (1.0, 2.0, 5.0)
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: count(value, digits_apart(axes.get_xticks())))
        axes.margins(0.12)
        axes.set_xlabel(
            {
                "flops": f"FLOPs per {rows[0]['unit']}, forward",
                "state_size": "decode state (numbers kept)",
                "speed": f"{rows[0]['unit']}s/s of training steps (right is faster)",
            }[cost.column]
        )
        axes.set_ylabel(f"validation {_short(metric)}")
        axes.grid(alpha=0.2)
        corners = _front_corners(axes, [points[arm] for arm in best], cost.more_is_better, rows[0]["higher_is_better"])
        axes.plot(*zip(*corners), color=_INK, linewidth=1, linestyle="dashed", alpha=0.6, zorder=1)
        bars = [
            [(across, mean - deviation), (across, mean + deviation)]
            for (across, mean), deviation in zip(points.values(), deviations.values())
        ]
        _place_labels(figure, axes, points, best, [*bars, *itertools.pairwise(corners)])

    return draw


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _quartiles(rounds: Sequence[float]) -> np.ndarray:
    """[2, 1]: how far the lower and the upper quartile are from the median."""
    low, middle, high = np.quantile(rounds, [0.25, 0.5, 0.75])
    return np.array([[middle - low], [high - middle]])


def _front_corners(
    axes: Any, points: Sequence[tuple[float, float]], more_is_better: bool, higher_is_better: bool
) -> list[tuple[float, float]]:
    """Corners of the border around all that the points of the front dominate. Fixes the axes' limits."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.autoscale(False)
    corners = [(points[0][0], low if higher_is_better else high), points[0]]
    for before, after in itertools.pairwise(points):
        corners += [(after[0], before[1]), after]
    return [*corners, (left if more_is_better else right, points[-1][1])]


def _place_labels(
    figure: Any,
    axes: Any,
    points: dict[str, tuple[float, float]],
    bold: Sequence[str],
    lines: Sequence[Sequence[tuple[float, float]]],
) -> None:
    """Names beside their points, inside the axes, clear of each other, the points and, if it can be, these lines.

    Every name is tried at positions around its point, and takes the one that covers least; a second round lets those
    that came first make room. lines: upright or level, from one point to another.
    """
    figure.draw_without_rendering()  # settles where the axes are
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    dots = {arm: axes.transData.transform(point) for arm, point in points.items()}
    obstacles = [_box(dot, (10 * scale, 10 * scale)) for dot in dots.values()]
    ends = [axes.transData.transform(line) for line in lines]
    strips = [np.array([np.min(line, axis=0) - scale, np.max(line, axis=0) + scale]) for line in ends]
    texts, sizes = {}, {}
    for arm in sorted(points, key=lambda arm: -dots[arm][1]):  # so that names of a heap come in its order
        texts[arm] = axes.annotate(
            _short(arm, 24),
            points[arm],
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            fontweight="bold" if arm in bold else "normal",
            arrowprops={"arrowstyle": "-", "color": _INK, "linewidth": 0.5, "alpha": 0.5, "shrinkA": 0, "shrinkB": 3},
            zorder=4,
        )
        texts[arm].set_in_layout(False)
        extent = texts[arm].get_window_extent(renderer)
        sizes[arm] = (extent.width + 3 * scale, extent.height + 1 * scale)
    placed: dict[str, np.ndarray] = {}
    angles = np.linspace(0, 2 * math.pi, 16, endpoint=False) + math.pi / 2
    for _ in range(2):
        for arm, size in sizes.items():
            others = [box for name, box in placed.items() if name != arm] + obstacles
            best = math.inf
            for reach, angle in itertools.product((8, 14, 22, 32, 44), angles):
                # The distance at which a ray in this direction leaves the name's box, grown by the reach.
                direction = np.array([math.cos(angle), math.sin(angle)])
                half = np.array(size) / 2 + (reach - 5) * scale
                along = min(half / np.maximum(np.abs(direction), 1e-9))
                box = _box(dots[arm] + along * direction, size)
                outside = np.prod(size) - _overlap(box, np.array([[inside.x0, inside.y0], [inside.x1, inside.y1]]))
                covered = 20 * (sum(_overlap(box, other) for other in others) + outside)
                covered += sum(_overlap(box, strip) for strip in strips)
                cost = covered / scale**2 + reach
                if cost < best:
                    best, placed[arm] = cost, box
    for arm, box in placed.items():
        offset = (box.mean(axis=0) - dots[arm]) / scale
        texts[arm].set_position(offset)
        if math.hypot(*np.maximum(np.abs(offset) - np.array(sizes[arm]) / scale / 2, 0)) < 10:
            texts[arm].arrow_patch.set_visible(False)


def _box(centre: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """[[left, bottom], [right, top]]."""
    return np.array([centre - np.array(size) / 2, centre + np.array(size) / 2])


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Area that two boxes share."""
    return float(np.prod(np.maximum(np.minimum(one[1], other[1]) - np.maximum(one[0], other[0]), 0)))


def by_group(
    rows: Sequence[Row], looks: dict[str, Style], names: Sequence[str], references: Sequence[Sequence[str]]
) -> Draw:
    """One line per arm over a metric's groups, "accuracy, 4 pairs" and so on: means over seeds, one dot per seed.

    Groups that differ in a number alone are drawn at it, in log scale. references: other metrics, which are the same
    for all arms; those with the same groups are drawn.
    """
    groups = [name.partition(", ")[2] for name in names]
    numbers = [re.findall(r"\d+", group) for group in groups]
    words = {re.sub(r"\d+", "", group).strip() for group in groups}
    numeric = len(words) == 1 and all(len(found) == 1 and int(found[0]) > 0 for found in numbers)
    positions = [int(found[0]) for found in numbers] if numeric else list(range(len(groups)))

    def draw(figure: Any, axes: Any) -> None:
        for arm, look in looks.items():
            done = finished(rows, arm)
            if done:
                values = np.array([[row["final"][name] for name in names] for row in done])
                mean = values.mean(axis=0)
                axes.plot(positions, mean, color=look.colour, linestyle=look.line, marker=look.marker, label=arm)
                for line in values if len(values) > 1 else ():
                    axes.plot(positions, line, look.marker, color=look.colour, alpha=0.4, markersize=3)
        for number, reference in enumerate(references):
            if [name.partition(", ")[2] for name in reference] == groups:
                final = next(row["final"] for row in rows if row["status"] == "finished")
                heights = [final[name] for name in reference]
                line, label = _LINES[1 + number % 3][0], reference[0].partition(", ")[0]
                axes.plot(positions, heights, color=_INK, linestyle=line, linewidth=1, alpha=0.7, label=label)
        if numeric:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.set_xlabel(_short(next(iter(words))))
        axes.set_xticks(
            positions, [str(position) for position in positions] if numeric else [_short(group) for group in groups]
        )
        axes.set_ylabel(_short(names[0].partition(", ")[0]))
        axes.grid(alpha=0.2)
        _legend(figure, axes)

    return draw


def by_setting(
    rows: Sequence[Row], looks: dict[str, Style], metric: str, option: str, families: Mapping[str, Mapping[float, str]]
) -> Draw:
    """One line per family over the numbers of an option (see results.settings), and a level one per arm without any.

    Means over seeds; one dot per seed.
    """
    numbers = sorted({number for members in families.values() for number in members})

    def draw(figure: Any, axes: Any) -> None:
        for family, members in families.items():
            look = looks[next(iter(members.values()))]
            seeds = {number: list(by_seed(rows, arm).values()) for number, arm in sorted(members.items())}
            means = {number: float(np.mean(values)) for number, values in seeds.items() if values}
            axes.plot(
                [*means], [*means.values()], color=look.colour, linestyle=look.line, marker=look.marker, label=family
            )
            for number, values in seeds.items():
                if len(values) > 1:
                    axes.plot([number] * len(values), values, look.marker, color=look.colour, alpha=0.4, markersize=3)
        for arm in looks:
            if "[" not in arm and (values := list(by_seed(rows, arm).values())):
                axes.axhline(np.mean(values), color=looks[arm].colour, linestyle=looks[arm].line, label=arm)
        if numbers[0] > 0 and numbers[-1] > 3 * numbers[0]:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axes.set_xlabel(_short(option))
        axes.set_ylabel(f"validation {_short(metric)}")
        axes.grid(alpha=0.2)
        _legend(figure, axes)

    return draw


def by_layer(looks: dict[str, Style], heads: dict[str, list[list[float | None]]], label: str) -> Draw:
    """One line per arm over the layers, means over heads, and one dot per head. heads: by arm, one list per layer."""

    def draw(figure: Any, axes: Any) -> None:
        for arm, layers in heads.items():
            look = looks[arm]
            values = [np.array(layer, dtype=float) for layer in layers]  # None becomes NaN
            means = [np.nan if np.isnan(layer).all() else np.nanmean(layer) for layer in values]
            axes.plot(range(len(means)), means, color=look.colour, linestyle=look.line, marker=look.marker, label=arm)
            for number, layer in enumerate(values):
                axes.plot([number] * len(layer), layer, look.marker, color=look.colour, alpha=0.35, markersize=3)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(x=0.1)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.grid(alpha=0.2)
        _legend(figure, axes)

    return draw
