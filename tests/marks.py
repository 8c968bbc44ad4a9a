"""Marks for parametrised cases, and what several of them try."""

import pytest

# JSON that is nested more deeply than Python reads.
DEEP = 100_000 * "["


def short(case):
    """A name for a text that may be long, or no text."""
    return ascii(case)[:30]


def slow_but(quick, cases):
    """The cases, of which those that are not among `quick` are slow: more of the same."""
    assert not set(quick) - set(cases), "no such cases"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
