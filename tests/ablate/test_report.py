"""The report: what the rows hold, in a table, in words and in pictures, also when little is there."""

import base64
import csv
import html.parser
import itertools
import json
import re
import warnings

import numpy as np
import pytest
from marks import DEEP, short, slow_but
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from attnlab.ablate import figures, results, write_report
from attnlab.ablate.attending import read_attending


def row(arm, seed, loss, **changes):
    history = [
        {"step": step, "split": split, "loss": loss + 10 / step}
        for step in (10, 20)
        for split in ("train", "validation")
    ]
    return {
        "question": "Is <b> better?",
        "baseline": "base",
        "metric": "loss",
        "higher_is_better": False,
        "arm": arm,
        "seed": seed,
        "status": "finished",
        "final": {"loss": loss},
        "history": history,
        "parameter_shapes": {"x": [2, 2], arm: [4]},
        "parameters": 8,
        "unit": "token",
        "units": 4,
        "flops": 1234.0,
        "state_size": 2048,
        "length": 4,
        "items_per_second": 1500.0,
        "seconds": 2.0,
        "compile_seconds": 1.0,
        "task": {"source": "text"},
        "implementations": ["local_attention runs everywhere: xla"],
        "environment": {"jax": "1.2.3"},
        "config": "models.LanguageModel.depth = 1",
        "command": "attnlab ablate sweep.gin",
        **changes,
    }


def report(rows, path):
    page = write_report(rows, path).read_text()
    return page, (path / "results.md").read_text()


def test_table_words_and_pictures(tmp_path):
    losses = {"base": (2.0, 2.1, 2.2), "low": (1.5, 1.61, 1.7), "same": (2.1, 2.0, 2.2)}
    page, table = report(
        [row(arm, seed, loss) for arm, both in losses.items() for seed, loss in enumerate(both)], tmp_path
    )
    assert "| base | 2.1000 ± 0.1000 | baseline |  | 8 | 1.23 k | 2.05 k | 3 |" in table
    assert "| low | 1.6033 ± 0.1002 | -0.4967 [-0.5110, -0.4823] | < 0.001 |" in table
    assert "low ends 0.4967 below base: a difference at 5 %, corrected for 2 comparisons (Holm)." in page
    assert "3 seeds cannot tell this from no difference." in page
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("arm,seed,status,validation loss,parameters,flops,state_size,seconds")
    assert lines[1].startswith("base,0,finished,2.0,8,1234.0,2048")
    assert len(lines) == 1 + 9
    assert "low 50.0%, same 50.0%" in table
    assert "p: two-sided paired t test, corrected by Holm for 2 comparisons with the baseline" in table
    assert "bootstrap" not in table
    assert "Is &lt;b&gt; better?" in page
    assert page.count('<div role="img"') == 5  # speed was not measured
    assert "attnlab ablate sweep.gin" in page


def test_text_takes_the_pages_colour(tmp_path):
    page, _ = report([row("base", 0, 2.0), row("low", 0, 1.0)], tmp_path)
    assert "currentColor" in page
    assert "#010203" not in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize(("seeds", "number"), [(1, "one seed"), (2, "two seeds")])
@pytest.mark.long
def test_one_and_two_seeds_have_no_interval(seeds, number, tmp_path):
    rows = [row(arm, seed, loss + 0.1 * seed) for arm, loss in (("base", 2), ("low", 1)) for seed in range(seeds)]
    page, table = report(rows, tmp_path)
    assert f"-1.0000 ({number}: no interval)" in table
    assert "Fewer than 3 seeds give no interval and no test." in table
    assert f"low ends 1.0000 below base ({number}, so no interval)." in page
    for word in ("bootstrap", "Student", "p (Holm)", "repeats"):
        assert word not in table + page


def test_ten_seeds_are_resampled(tmp_path):
    losses = {"base": [2.0] * 10, "low": [1.0 + 0.1 * seed for seed in range(10)]}
    _, table = report(
        [row(arm, seed, loss) for arm, some in losses.items() for seed, loss in enumerate(some)], tmp_path
    )
    assert "95 % intervals by bootstrap (10,000 resamples of the seeds): low [-0.7" in table
    assert "| p |" in table


@pytest.mark.long
def test_a_difference_that_holds_alone_but_not_among_many_is_named_as_such(tmp_path):
    """p is 0.02 of the one, and twice that and more of the three."""
    arms = {"base": (0, 0, 0), "low": (0.7, 1.0, 1.3), "x": (1, -1, 0.1), "y": (1, -1, 0.2)}
    rows = [row(arm, seed, loss) for arm, some in arms.items() for seed, loss in enumerate(some)]
    page, _ = report([row for row in rows if row["arm"] in ("base", "low")], tmp_path)
    assert "low ends 1.0000 above base, and the 95 % interval excludes 0." in page
    page, table = report(rows, tmp_path)
    assert (
        "low ends 1.0000 above base, and its interval alone excludes 0, but corrected for 3 comparisons (Holm)" in page
    )
    assert "| low | 1.0000 ± 0.3000 | +1.0000 [+0.2548, +1.7452] | 0.086 |" in table


@pytest.mark.long
def test_the_headline_groups_many_arms(tmp_path):
    noise = [0.1, -0.1, 0.02]
    rows = [row("base", seed, 2.0) for seed in range(3)]
    rows += [row(f"near{n}", seed, 2.0 + 0.01 * n + noise[seed]) for n in range(9) for seed in range(3)]
    for arm, loss in (("far", 1.0), ("worse", 3.0)):
        rows += [row(arm, seed, loss + 0.001 * noise[seed]) for seed in range(3)]
    page, _ = report([*rows, row("single", 0, 1.5), row("another", 0, 1.0)], tmp_path)
    assert "<li>Ends below base (at 5 %, corrected for 11 comparisons): far -1.0000.</li>" in page
    assert "<li>Ends above base (at 5 %, corrected for 11 comparisons): worse +1.0000.</li>" in page
    assert "<li>Not to be told from base with these seeds: near0 +0.0067, near1" in page
    assert "near5 +0.0567 and 3 more.</li>" in page
    assert "without an interval (fewer than 3 seeds): another -1.0000, single -0.5000.</li>" in page


@pytest.mark.parametrize("failed", ["low", "base"])
def test_a_failed_arm_is_said_and_the_rest_is_shown(failed, tmp_path):
    rows = [row("base", 0, 2.0), row("low", 0, 1.0)]
    rows = [
        {k: v for k, v in r.items() if k not in ("final", "history", "items_per_second", "seconds")}
        | {"status": "failed", "error": "loss is nan at step 3"}
        if r["arm"] == failed
        else r
        for r in rows
    ]
    page, table = report(rows, tmp_path)
    assert f"{failed}, seed 0, failed: loss is nan at step 3" in page
    assert f"| {failed} | failed |" in table


def test_images_have_no_decode_state(tmp_path):
    page, table = report(
        [row(arm, 0, 1.0, unit="image", state_size=None, length=None) for arm in ("base", "low")], tmp_path
    )
    assert "FLOPs/image" in table
    assert "Quality against FLOPs/image" in page
    assert "Speed was not measured, so no arm is ranked by it." in page
    assert "images/s" not in table
    assert "decode state" not in table.lower()


@pytest.mark.long
def test_arms_that_do_not_decode_have_an_unknown_state(tmp_path):
    sizes = {"base": None, "low": 2048, "mute": None}
    rows = [row(arm, 0, loss, state_size=sizes[arm]) for arm, loss in (("base", 1.0), ("low", 0.9), ("mute", 0.5))]
    page, table = report(rows, tmp_path)
    head, _, *lines = (line.strip("| ").split(" | ") for line in table.split("\n\n")[1].splitlines())
    assert {line[0]: line[head.index("decode state")] for line in lines} == {"base": "", "low": "2.05 k", "mute": ""}
    assert "decode state: low." in table
    assert "Decode state: numbers kept to decode after 4 tokens." in table
    assert "Quality against decode state" in page
    with (tmp_path / "results.csv").open() as file:
        assert [line["state_size"] for line in csv.DictReader(file)] == ["", "2048", ""]
    page, _ = report([row("base", 0, 1.0, state_size=None), row("low", 0, 1.0, status="failed", error="e")], tmp_path)
    assert "Quality against FLOPs/token" in page
    assert "Quality against decode state" not in page


def test_an_accuracy_is_better_when_higher_and_is_drawn_by_group(tmp_path):
    def accurate(arm, seed, accuracy):
        final = {"accuracy": accuracy, "accuracy, 1 pairs": 1.0, "accuracy, 4 pairs": 2 * accuracy - 1.0}
        history = [
            {"step": step, "split": split, "accuracy": accuracy} for step in (1, 2) for split in ("train", "validation")
        ]
        return row(arm, seed, 0.0, metric="accuracy", higher_is_better=True, final=final, history=history)

    page, table = report([accurate(arm, 0, value) for arm, value in (("base", 0.9), ("low", 0.6))], tmp_path)
    assert "Higher is better." in table
    assert "Validation accuracy, higher is better: low ends 0.3000 below base" in page
    assert "right is better" in page
    assert page.count("by group, at the end</figcaption>") == 1
    assert "Accuracy by group, at the end" in page
    assert ">pairs</text>" in page  # the axis; its ticks are the numbers
    assert "4 pairs" not in page


def test_groups_are_drawn_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    drawn = []
    draw = figures.by_group

    def by_group(rows, looks, names, references):
        drawn.append((names, references))
        return draw(rows, looks, names, references)

    monkeypatch.setattr(figures, "by_group", by_group)
    final = {f"{family}, distance {n}": 1.0 for family in ("accuracy", "loss") for n in (128, 16, 255, 64)} | {
        "loss": 1.0
    }
    rows = [
        row(arm, 0, 1.0, final=final | {"accuracy, distance 16": value}) for arm, value in (("base", 1.0), ("low", 0.5))
    ]
    report(rows, tmp_path)
    in_order = [[f"{family}, distance {n}" for n in (16, 64, 128, 255)] for family in ("accuracy", "loss")]
    assert drawn == [(in_order[0], in_order[1:])]


def test_a_metric_that_is_the_same_for_all_arms_is_a_reference_in_the_others_figure(tmp_path):
    """As what ridge regression leaves, beside the models' own error."""
    rows = [
        row(
            arm,
            0,
            loss,
            final={
                "loss": loss,
                **{f"error, {n} pairs": loss / n for n in (1, 4)},
                "ridge, 1 pairs": 1,
                "ridge, 4 pairs": 0,
            },
        )
        for arm, loss in (("base", 2.0), ("low", 1.0))
    ]
    page, _ = report(rows, tmp_path)
    assert "Error by group, at the end" in page
    assert "Ridge by group" not in page
    assert ">ridge</text>" in page


@pytest.mark.long
def test_other_metrics_have_a_table_of_their_own(tmp_path):
    finals = [{"loss": 2.0, "leak": leak, "leak, early": 1.0, "bits_per_byte": 3.0} for leak in (0.5, 0.7)]
    page, table = report(
        [row("base", seed, 2.0, final=final) for seed, final in enumerate(finals)]
        + [row("low", 0, 1.0, final=finals[0])],
        tmp_path,
    )
    assert (
        "| arm | validation leak | validation bits per byte |\n| --- | ---: | ---: |\n| base | 0.6000 ± 0.1414 |"
        in table
    )
    assert "| low | 0.5000 | 3.0000 |" in table
    assert "<th>validation leak</th>" in page
    assert report([row("base", 0, 2.0)], tmp_path)[1].count("| base |") == 2


@pytest.mark.long
def test_arms_that_differ_in_a_number_are_a_line_over_it(tmp_path):
    """And the others are level lines; one number is no line, two options in one arm are no number."""
    arms = ["base", *(f"local[WINDOW={w}]" for w in (16, 4, 64)), "sinks[WINDOW=8]", "wide[head_dim=4]", "two[A=1,B=2]"]
    assert results.settings(arms) == {
        "WINDOW": {
            "local": {16.0: "local[WINDOW=16]", 4.0: "local[WINDOW=4]", 64.0: "local[WINDOW=64]"},
            "sinks": {8.0: "sinks[WINDOW=8]"},
        }
    }
    page, _ = report([row(arm, seed, 2.0 - 0.1 * index) for index, arm in enumerate(arms) for seed in (0, 1)], tmp_path)
    assert page.count("Loss by WINDOW</figcaption>") == 1
    assert "by head_dim" not in page
    figure = Figure()
    looks = figures.styles(arms)
    rows = [row(arm, seed, 10.0 * index + seed) for index, arm in enumerate(arms) for seed in (0, 1)]
    axes = figure.subplots()
    figures.by_setting(rows, looks, "loss", "WINDOW", results.settings(arms)["WINDOW"])(figure, axes)
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["local"] == [[4.0, 20.5], [16.0, 10.5], [64.0, 30.5]]
    assert lines["base"] == [[0.0, 0.5], [1.0, 0.5]]  # from side to side
    assert "wide" not in lines


@pytest.mark.long
def test_arms_on_the_pareto_front_are_named(tmp_path):
    """Cheap and poor, dear and good, and one that is worse than the dear one in everything."""
    arms = {"base": (2.0, 100.0, 10.0), "good": (1.0, 500.0, 5.0), "poor": (1.5, 900.0, 4.0)}
    rows = [row(arm, 0, loss, flops=flops, run=arm) for arm, (loss, flops, _) in arms.items()]
    write_speeds(tmp_path, {arm: [speed] * 9 for arm, (*_, speed) in arms.items()})
    page, table = report(rows, tmp_path)
    front = "FLOPs/token: base, good; decode state: good; tokens/s: base, good."
    assert front in page
    assert front in table
    assert "| arm | on the Pareto front of |\n" in table  # what was attended to is not known
    assert "| base | FLOPs/token, tokens/s |\n| good | FLOPs/token, decode state, tokens/s |\n| poor | none |" in table
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [line["pareto state_size"] for line in lines] == ["no", "yes", "no"]


def write_speeds(folder, rounds):
    arms = {arm: {"run": arm, "items_per_second": speeds} for arm, speeds in rounds.items()}
    (folder / "speed.json").write_text(json.dumps({"device": "1 x cpu", "arms": arms}))


@pytest.mark.long
def test_speed_is_that_of_the_timing_and_ranks_only_what_it_tells_apart(tmp_path):
    """worse is slower than good once in nine rounds, even twice, and shaky by its median alone."""
    rows = [row(arm, 0, loss, run=arm) for arm, loss in (("base", 3.0), ("worse", 2.0), ("shaky", 2.5), ("good", 1.0))]
    rounds = {"good": [100.0] * 9, "worse": [101.0] * 8 + [99.0], "shaky": [102.0] * 7 + [99.0] * 2, "base": [50.0] * 9}
    write_speeds(tmp_path, rounds)
    page, table = report(rows, tmp_path)
    assert "| worse | 2.0000 | -1.0000 (one seed: no interval) | 8 | 1.23 k | 101 ± 0 % | 2.05 k | 1 |" in table
    assert "tokens/s: worse, good." in table
    assert "| 102 ± 0 %, tie | 2.05 k | 1 |" in table
    assert table.count(", tie |") == 1
    assert "Tie: not on the Pareto front, as it is not faster than every better arm." in page
    assert "timed after all runs on 1 x cpu, the arms in turn; median of 9 rounds ± half" in table
    assert "Quality against tokens/s" in page
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [line["speed"] for line in lines] == ["50.0", "101.0", "102.0", "100.0"]


@pytest.mark.parametrize(
    "text", slow_but(["[]", None], ["", "{}", "[]", '{"device": 1, "arms": {}}', DEEP, None]), ids=short
)
def test_speed_of_other_runs_and_damaged_speed_are_not_shown(text, tmp_path):
    rows = [row(arm, 0, 1.0, run=f"{arm}-new") for arm in ("base", "low")]
    write_speeds(tmp_path, {"base": [1.0] * 9, "low": [1.0] * 9})
    if text is not None:
        (tmp_path / "speed.json").write_text(text)
    page, table = report(rows, tmp_path)
    assert "tokens/s" not in page + table
    assert "Speed was not measured" in table


def test_where_higher_is_better_the_front_is_that_of_the_highest():
    rows = [
        row(arm, 0, value, higher_is_better=True, flops=flops)
        for arm, value, flops in (("base", 0.9, 10.0), ("low", 0.6, 5.0), ("lost", 0.5, 20.0))
    ]
    flops, state = results.costs(rows)
    assert results.front(rows, flops) == ["low", "base"]
    assert results.front(rows, state) == ["base"]


def many(count):
    """Arms that crowd: three costs, and losses near each other."""
    random = np.random.default_rng(0)
    losses = random.normal(2.0, 0.05, count)
    return [
        row(f"mechanism_{i}", 0, loss, flops=1e6 * (1 + i % 3), baseline="mechanism_0") for i, loss in enumerate(losses)
    ]


def test_names_of_many_arms_do_not_cover_each_other():
    rows = many(12)
    figure = Figure(figsize=(4.3, 3.6), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    figures.against_cost(rows, figures.styles(results.arms_of(rows)), "loss", results.costs(rows)[0])(figure, axes)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    inside = axes.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)


def test_arms_are_distinguished_when_colours_run_out():
    looks = list(figures.styles([row["arm"] for row in many(20)]).values())
    assert len(set(looks)) == 20
    assert looks[8].colour == looks[0].colour
    assert looks[8].line != looks[0].line


def packed(array):
    return {"shape": list(array.shape), "base64": base64.b64encode(array.tobytes()).decode()}


@pytest.fixture
def seen(tmp_path):
    """Two arms that left in their folders what they attend to, and one that could not."""
    layer = {
        "mixer": "LocalAttention",
        "is_signed": True,
        "map": packed(np.eye(4, dtype=np.uint8)),
        "middle": packed(np.ones((2, 2), np.uint8)),
        "distance": [1.0, 2.0],
        "entropy": [0.5, None],
    }
    rows = [row("base", 0, 2.0), row("low", 0, 1.0), row("long", 0, 1.0)]
    for arm in ("base", "low"):
        folder = tmp_path / "runs" / f"{arm}-seed0"
        folder.mkdir(parents=True)
        kept = {"example": {"text": "if a<b:"}, "prompt": "if", "layers": [layer, layer]}
        (folder / "attending.json").write_text(json.dumps(kept))
    (tmp_path / "runs" / "base-seed0" / "samples.txt").write_text(" a <script>")
    (tmp_path / "runs" / "low-seed0" / "samples.png").write_bytes(b"a picture")
    for known in rows[:2]:
        known["folder"] = f"runs/{known['arm']}-seed0"
        known["attending"] = {"distance": [1.5, 2.5], "entropy": [0.5, None]}
    rows[2]["attending"] = {"skipped": "length: an example has 900 positions"}
    return report(rows, tmp_path)


@pytest.mark.long
def test_what_arms_attend_to_is_shown_and_summarised(seen, tmp_path):
    page, table = seen
    assert "What each mechanism attends to" in page
    assert "Mean attention distance by layer" in page
    assert page.count("layer 1: LocalAttention") == 2
    assert page.count("layer 0: from the middle") == 2
    assert "Some weights of base, low are negative" in page
    assert "if a&lt;b:" in page
    assert "length: an example has 900 positions" in page
    assert "| base | none | 2.00 | 0.50 |" in table
    assert "| long | FLOPs/token, decode state |  |  |" in table
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [line["attention distance"] for line in lines] == ["2.0", "2.0", ""]


NASTY = (
    '<script>alert(1)</script>|$x_$ $\\frac{$ a$$ `tick` ```\n# h\n| x | y |\n"q" \'q\' onload="alert(1)" '
    "[l](javascript:alert(1)) **b** &lt; ü 漢 \x00\x1b[31m\ud800\u202e"
)


class Tags(html.parser.HTMLParser):
    """Names of a page's elements, and its attributes."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes = set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.attributes |= {(name, value) for name, value in attributes if name != "d"}


def nasty(value, name=""):
    """The same with that text after every text in it, but for words and addresses that the report goes by."""
    fixed = ("status", "split", "folder", "base64", "run")
    if isinstance(value, str):
        return value if name in fixed else value + NASTY
    if isinstance(value, list):
        return [nasty(item) for item in value]
    if isinstance(value, dict):
        return {key: nasty(item, key) for key, item in value.items()}
    return value


def nasty_rows(folder):
    """A sweep of arms, settings of an option, groups, failures and reasons, all with that text, in rows and files."""
    metric, rows = f"loss{NASTY}", []
    for arm in ("base", "low", "x[W=1]", "x[W=2]", "mute"):
        for seed in range(3):
            loss = len(arm) + 0.1 * seed * len(rows)
            final = {metric: loss, f"other{NASTY}": 1.0, f"e{NASTY}, {NASTY} a": loss, f"e{NASTY}, {NASTY} b": 2.0}
            history = [{"step": s, "split": split, **final} for s in (1, 2) for split in ("train", "validation")]
            changes = {"final": final, "history": history, "run": arm, "folder": f"runs/{arm}", "length": 4}
            changes |= {"searched_rates": [[0.1, 1.0], [0.2, None]], "learning_rate": 0.1, "search_seed": 1000}
            match = {"cost": "flops", "off": 0.0, "knob": None if arm == "base" else f"K.k{NASTY}", "value": 3}
            one = nasty(row(arm, seed, loss)) | changes | {"match": match}
            if arm.startswith("x"):  # an option's name, in place of the end of the arm's
                one["arm"] = arm
            if arm == "mute":
                one["attending"] = {"skipped": f"why{NASTY}"}
            elif seed == 0:
                one["attending"] = {"distance": [1.0], "entropy": [0.5]}
            rows.append(one)
        layer = {"mixer": "M", "is_signed": True, "map": packed(np.eye(4, dtype=np.uint8)), "distance": [1.0]}
        kept = {"example": {"text": "t"}, "prompt": "p", "layers": [layer | {"entropy": [0.5, None]}]}
        (folder / "runs" / arm).mkdir(parents=True)
        (folder / "runs" / arm / "attending.json").write_text(json.dumps(nasty(kept)))
        (folder / "runs" / arm / "samples.txt").write_text(NASTY, "utf-8", errors="replace")
    write_speeds(folder, {one["arm"]: [1.0 + index] * 9 for index, one in enumerate(rows)})
    speeds = json.loads((folder / "speed.json").read_text())
    for one in rows:
        speeds["arms"][one["arm"]]["run"] = one["run"]
    (folder / "speed.json").write_text(json.dumps(speeds | {"device": f"cpu{NASTY}"}))
    failed = {"status": "failed", "error": f"e{NASTY}", "arm": f"lost{NASTY}"}
    return [*rows, {name: value for name, value in rows[0].items() if name not in ("final", "history")} | failed]


@pytest.mark.long
def test_no_text_of_a_run_is_code_or_breaks_a_table(tmp_path):
    """Rows and files may be somebody else's: each text in them has marks of HTML, Markdown and mathtext, and worse."""
    rows = nasty_rows(tmp_path)
    page, table = report(json.loads(json.dumps(rows)), tmp_path)
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    plain, _ = report([row(arm, seed, 1.0 + seed) for arm in ("base", "low") for seed in (0, 1)], tmp_path)
    tags, usual = Tags(page), Tags(plain)
    drawn = {"h2", "h3", "pre", "img", "section", "br", "figcaption", "div", "ul", "li"}
    assert tags.names <= usual.names | drawn
    assert not [name for name, _ in tags.attributes if name.startswith("on") or name in ("srcdoc", "action")]
    addresses = [value for name, value in tags.attributes if "src" in name or "href" in name]
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert "Content-Security-Policy" in page
    assert "<script" not in page
    assert page.count("alert(1)") > 50  # as text
    assert "\x00" not in page + table
    # Markdown: every table has as many cells in each line as in its head, and outside code nothing is live.
    blocks = [block for block in table.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    for block in blocks:
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        assert len(lines) == 2 + 6
        assert {len(line) for line in lines} == {len(lines[0])}
    text, command = table.split("\n\nRepeat with:\n\n")
    assert all(line.startswith("    ") for line in command.splitlines())
    assert not re.search(r"(?<!\\)(<script|[$`*]|\]\()", text)
    assert sum(line.startswith("#") for line in text.splitlines()) == 1


def test_names_as_long_as_they_may_be_are_drawn(tmp_path):
    arms = ["base", *(f"{'long-' * 40}{n}" for n in range(3))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # constrained layout warns where the axes have no room left
        page, _ = report([row(arm, seed, 1.0 + seed) for arm in arms for seed in (0, 1)], tmp_path)
    assert arms[-1] in page


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [{}]},
        {"layers": 3},
        {"layers": [{"mixer": 1}]},
        {"example": {}},
        {"example": {"pixels": {"shape": [9], "base64": ""}}},
        {"skipped": 3},
        {"prompt": 3},
    ],
    ids=str,
)
def test_what_is_damaged_of_what_arms_attend_to_is_not_shown(change, tmp_path):
    (tmp_path / "attending.json").write_text(json.dumps({"example": {"text": "a"}, "layers": []}))
    assert read_attending(tmp_path) is not None
    (tmp_path / "attending.json").write_text(json.dumps({"example": {"text": "a"}, "layers": [], **change}))
    assert read_attending(tmp_path) is None
    known = {"folder": ".", "attending": {"distance": [1.0], "entropy": [1.0]}}
    page, _ = report([row("base", 0, 1.0, **known)], tmp_path)
    assert "Mean attention distance" not in page


def test_samples_are_embedded_and_escaped(seen):
    page, _ = seen
    assert " a &lt;script&gt;" in page
    assert f"data:image/png;base64,{base64.b64encode(b'a picture').decode()}" in page


def test_rows_that_know_nothing_of_it_have_no_such_section(tmp_path):
    page, table = report([row("base", 0, 2.0), row("low", 0, 1.0)], tmp_path)
    assert "attends to" not in page
    assert "Samples" not in page
    assert "entropy" not in table.lower()


def test_the_page_needs_nothing_beside_it(seen):
    page, _ = seen
    for address in ("http://", "https://", "<script", "<link", "@import"):
        assert address not in page.replace("http://www.w3.org/", "")  # names of SVG's own


def test_every_table_scrolls(seen):
    page, _ = seen
    assert page.count("<table") > 1
    assert len(re.findall(r'<div class="scroll"( tabindex="0")?><table', page)) == page.count("<table")
    assert re.search(r"\.scroll \{ overflow-x: auto;", page)


@pytest.mark.parametrize(
    ("numbers", "labels"),
    [
        ([1.2e3, 4e6, 20.0], ["1.2 k", "4 M", "20"]),
        ([13_384_000.0, 13_392_000.0, 13_400_000.0], ["13.384 M", "13.392 M", "13.4 M"]),  # costs that were matched
        ([5e6, 5e6], ["5 M", "5 M"]),
    ],
)
def test_ticks_of_an_axis_can_be_told_apart(numbers, labels):
    digits = figures.digits_apart(numbers)
    assert [results.count(number, digits) for number in numbers] == labels
