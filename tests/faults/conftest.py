"""What the tests of faults share: configs, what the runs compile, and how they end when nothing happens to them."""

import commands
import pytest


@pytest.fixture(scope="session")
def untouched(tmp_path_factory):
    """A folder with the configs, a train run `train` and a sweep `sweep` that nothing happened to."""
    folder = tmp_path_factory.mktemp("untouched")
    commands.write_configs(folder)
    commands.run(folder, "train", "train.gin", "--workdir", "train", prepare=commands.keep_compiled).check(0)
    return folder


@pytest.fixture(scope="session")
def untouched_sweep(untouched):
    commands.run(untouched, "ablate", "sweep.gin", "--workdir", "sweep", prepare=commands.keep_compiled).check(0)
    return untouched


@pytest.fixture
def folder(tmp_path):
    commands.write_configs(tmp_path)
    return tmp_path
