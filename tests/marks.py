"""Marks for parametrised cases."""

import pytest


def slow_but(quick, cases):
    """The cases, of which those that are not among `quick` are slow: more of the same."""
    assert not set(quick) - set(cases), "no such cases"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
