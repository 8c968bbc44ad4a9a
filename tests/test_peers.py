"""Times beside other libraries."""

from attnlab import peers


def test_calls_take_turns():
    order = []
    times = peers.interleaved([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert order == ["a", "b"] * 3
    assert len(times) == 2
