"""Matching: the knob's value at which an arm costs what the baseline does, and what is reported where there is none."""

import pytest
import tiny_sweep

from attnlab.ablate import matching, run_ablation, write_report
from attnlab.ablate.plan import Plan
from attnlab.errors import UserError

OTHERS = """{
    'softmax': 'experiments/mixers/softmax.gin',
    'local': ['experiments/mixers/local.gin', 'WINDOW = 4'],
    'gated_delta': 'experiments/mixers/gated_delta.gin',
}"""


def plan(folder, cost, knobs):
    arms = f"ablate.Ablation.arms = {OTHERS}"
    file = tiny_sweep.write(folder, arms, f"ablate.Ablation.match = '{cost}'", f"ablate.Ablation.knobs = {knobs}")
    return Plan(file, [])


def test_the_closest_integer_on_either_side():
    assert matching.closest(lambda value: 10 * value, 100, what="x") == 10
    assert matching.closest(lambda value: 10 * value, 104, what="x") == 10
    assert matching.closest(lambda value: 10 * value, 106, what="x") == 11
    assert matching.closest(lambda value: value**2, 1, what="x") == 1
    assert matching.closest(lambda value: min(value, 7), 7, what="x") == 7


def test_only_multiples_that_the_model_takes_are_looked_at():
    def cost_at(value):
        if value % 8:
            raise UserError("must divide")
        return value

    assert matching.closest(cost_at, 101, what="x") == 104


def test_few_are_tried():
    tried = []
    matching.closest(lambda value: tried.append(value) or 3 * value + 5, 3000, what="x")
    assert len(tried) == len(set(tried)) < 25


def refuses_above_10(value):
    if value > 10:
        raise UserError("more than 10")
    return value


def refuses_all(value):
    raise UserError(f"no {value}")


@pytest.mark.parametrize(
    ("cost_at", "target", "message"),
    [
        (lambda value: 5, 7, "the cost does not grow with it"),
        (lambda value: 100 - value, 200, r"the cost does not grow with it \(99 at 1, 98 at 2"),
        (lambda value: 10 * value, 3, "need 3, and 1 has 10 already"),
        (lambda value: min(value, 50), 70, "need 70, and 1048576 has 50 at most"),
        (refuses_above_10, 12, "need 12, and 10 has 10 at most; 11 gives: more than 10"),
        (refuses_all, 12, "no power of two up to 64 is taken; 1 gives: no 1"),
    ],
)
def test_what_cannot_be_reached_is_said(cost_at, target, message):
    with pytest.raises(UserError, match=f"^match: WINDOW of local: {message}"):
        matching.closest(cost_at, target, what="WINDOW of local")


@pytest.mark.parametrize("cost", ["parameters", "flops"])
@pytest.mark.long
def test_width_of_the_mlp_matches_parameters_and_flops(cost, tmp_path):
    matched = plan(tmp_path, cost, {"gated_delta": "models.LanguageModel.mlp_hidden"})
    costs = {arm: matched.run(arm, 0, None).costs[cost] for arm in matched.arms}
    assert abs(costs["gated_delta"] / costs["softmax"] - 1) < 0.01
    assert matched.matches["gated_delta"].off == pytest.approx(costs["gated_delta"] / costs["softmax"] - 1)
    assert matched.matches["gated_delta"].knob == "models.LanguageModel.mlp_hidden"
    hidden = matched.run("gated_delta", 1, None).experiment.model.layers[0].mlp_hidden
    assert hidden == matched.matches["gated_delta"].value != 48
    # No knob for this one: it stays, and how far it is off is reported.
    assert matched.matches["local"].knob is None
    assert matched.matches["local"].off == pytest.approx(costs["local"] / costs["softmax"] - 1)


@pytest.mark.long
def test_windows_and_heads_match_the_state(tmp_path):
    matched = plan(tmp_path, "state_size", {"local": "WINDOW", "gated_delta": "LinearAttention.head_dim"})
    states = {arm: matched.run(arm, 0, None).costs["state_size"] for arm in matched.arms}
    assert matched.matches["local"].value == 16
    assert matched.matches["local"].off == 0
    assert states["local"] == states["softmax"]
    found = matched.matches["gated_delta"]
    assert found.off == states["gated_delta"] / states["softmax"] - 1
    for neighbour in (found.value - 1, found.value + 1):
        other = Plan(
            tiny_sweep.write(tmp_path, f"ablate.Ablation.arms = {OTHERS}"), [f"LinearAttention.head_dim={neighbour}"]
        )
        there = other.run("gated_delta", 0, None).costs["state_size"] / states["softmax"] - 1
        assert abs(there) >= abs(found.off)


def test_a_knob_that_does_nothing_and_a_cost_that_is_not_there(tmp_path):
    with pytest.raises(
        UserError, match=r"match: LocalAttention\.window of gated_delta for the flops of softmax: the cost"
    ):
        plan(tmp_path, "flops", {"gated_delta": "LocalAttention.window"})
    leaking = "['experiments/mixers/routing.gin', 'RoutingAttention.membership = \"global\"']"
    mute = f"ablate.Ablation.arms = {{'softmax': {leaking}}}"
    with pytest.raises(UserError, match=r"SequenceTask has none, as the model does not decode: membership"):
        Plan(tiny_sweep.write(tmp_path, mute), ["Ablation.match=state_size", "Ablation.knobs=WINDOW"])
    images = "experiments/sweeps/digits.gin"
    with pytest.raises(UserError, match="match: got 'state_size'; ImageClassificationTask has none"):
        Plan(images, ["Ablation.match=state_size", "Ablation.knobs=WINDOW"])


@pytest.mark.slow
def test_the_report_gives_how_far_off(pretended, tmp_path):
    file = tiny_sweep.write(
        tmp_path, "ablate.Ablation.match = 'parameters'", "ablate.Ablation.knobs = 'LanguageModel.mlp_hidden'"
    )
    rows = run_ablation(file, ["LocalAttention.sinks=1"], tmp_path, report=lambda line: None)
    assert rows[1]["match"] == {"cost": "parameters", "off": 0.0, "knob": "LanguageModel.mlp_hidden", "value": 48}
    rows[1]["match"]["off"] = rows[3]["match"]["off"] = -0.0123
    page = write_report(rows, tmp_path).read_text()
    table = (tmp_path / "results.md").read_text()
    assert "Matched to softmax by parameters: local LanguageModel.mlp_hidden=48. Off: how far each still is." in table
    head, _, softmax, local = (line.split(" | ") for line in table.split("\n\n")[1].splitlines())
    assert (head[-2], softmax[-2], local[-2]) == ("off", "", "-1.23 %")
    assert "<th>off</th>" in page
