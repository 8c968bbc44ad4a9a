"""The report: what the rows hold, in a table, in words and in pictures, also when little is there."""

import base64
import csv
import itertools
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from attnlab.ablate import figures, results, write_report


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
    assert "| base | 2.1000 ± 0.1000 | baseline | 8 | 1.23 k | 1.5 k | 2.05 k | 3 |" in table
    assert "| low | 1.6033 ± 0.1002 | -0.4967 [-0.5110, -0.4823] |" in table
    assert "low ends 0.4967 below base, and the 95 % interval excludes no difference." in page
    assert "3 seeds cannot tell this from no difference; if it is real," not in page  # its mean is 0
    assert "3 seeds cannot tell this from no difference." in page
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("arm,seed,status,validation loss,parameters,flops,state_size")
    assert lines[1].startswith("base,0,finished,2.0,8,1234.0,2048")
    assert len(lines) == 1 + 9
    assert "low 50.0%, same 50.0%" in table
    # Resampled seeds give means between the smallest and the largest of the three differences.
    assert "95 % intervals by bootstrap" in table
    assert "low [-0.5000, -0.4900], same [-0.1000, +0.1000]." in table
    assert "Is &lt;b&gt; better?" in page
    assert page.count('<div role="img"') == 6
    assert "attnlab ablate sweep.gin" in page


def test_text_takes_the_pages_colour(tmp_path):
    page, _ = report([row("base", 0, 2.0), row("low", 0, 1.0)], tmp_path)
    assert "currentColor" in page
    assert "#010203" not in page
    assert "prefers-color-scheme: dark" in page


def test_one_seed_has_no_interval(tmp_path):
    page, table = report([row("base", 0, 2.0), row("low", 0, 1.0)], tmp_path)
    assert "-1.0000 (one seed: no interval)" in table
    assert "bootstrap" not in table
    assert "one seed, so no interval" in page


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
    assert "Quality against images/s" in page
    assert "decode state" not in table.lower()


def test_arms_that_do_not_decode_have_an_unknown_state(tmp_path):
    sizes = {"base": None, "low": 2048, "mute": None}
    rows = [row(arm, 0, loss, state_size=sizes[arm]) for arm, loss in (("base", 1.0), ("low", 0.9), ("mute", 0.5))]
    page, table = report(rows, tmp_path)
    head, _, *lines = (line.strip("| ").split(" | ") for line in table.split("\n\n")[1].splitlines())
    assert {line[0]: line[head.index("decode state")] for line in lines} == {"base": "", "low": "2.05 k", "mute": ""}
    assert "decode state: low;" in table
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


def test_arms_on_the_pareto_front_are_named(tmp_path):
    """Cheap and poor, dear and good, and one that is worse than the dear one in everything."""
    arms = {"base": (2.0, 100.0, 10.0), "good": (1.0, 500.0, 5.0), "poor": (1.5, 900.0, 4.0)}
    rows = [row(arm, 0, loss, flops=flops, items_per_second=speed) for arm, (loss, flops, speed) in arms.items()]
    page, table = report(rows, tmp_path)
    front = "FLOPs/token: base, good; decode state: good; tokens/s: base, good."
    assert front in page
    assert front in table
    assert "| arm | on the Pareto front of |\n" in table  # what was attended to is not known
    assert "| base | FLOPs/token, tokens/s |\n| good | FLOPs/token, decode state, tokens/s |\n| poor | none |" in table
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [line["pareto state_size"] for line in lines] == ["no", "yes", "no"]


def test_where_higher_is_better_the_front_is_that_of_the_highest():
    rows = [
        row(arm, 0, value, higher_is_better=True, flops=flops)
        for arm, value, flops in (("base", 0.9, 10.0), ("low", 0.6, 5.0), ("lost", 0.5, 20.0))
    ]
    flops, _, speed = results.costs(rows)
    assert results.front(rows, flops) == ["low", "base"]
    assert results.front(rows, speed) == ["base"]


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
    assert "| long | FLOPs/token, decode state, tokens/s |  |  |" in table
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [line["attention distance"] for line in lines] == ["2.0", "2.0", ""]


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
