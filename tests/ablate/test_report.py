"""The report: what the rows say, in a table, in words and in pictures, also when little is there."""

import pytest

from attnlab.ablate import write_report


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
    assert "Is &lt;b&gt; better?" in page
    assert page.count("<svg") == 4
    assert "attnlab ablate sweep.gin" in page


def test_text_takes_the_pages_colour(tmp_path):
    page, _ = report([row("base", 0, 2.0), row("low", 0, 1.0)], tmp_path)
    assert "currentColor" in page
    assert "#010203" not in page
    assert "prefers-color-scheme: dark" in page


def test_one_seed_has_no_interval(tmp_path):
    page, table = report([row("base", 0, 2.0), row("low", 0, 1.0)], tmp_path)
    assert "-1.0000 (one seed: no interval)" in table
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
    assert "Quality against compute" in page
    assert "decode state" not in table.lower()


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
    assert "By group, at the end" in page
    assert page.count("4 pairs") == 1
