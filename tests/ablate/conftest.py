"""What tests of sweeps share: a stand-in for training."""

import pytest
import tiny_sweep

from attnlab.ablate import runs


@pytest.fixture
def pretended(monkeypatch):
    """Trains nothing, and notes what would be trained."""
    monkeypatch.setattr(runs, "train", tiny_sweep.pretend_train)
