"""Every file of a checkpoint, flipped, emptied or deleted: harmless, or it is named and the one before is used."""

import shutil
import threading
from concurrent import futures

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import RunError, UserError
from attnlab.train import integrity, workdir

ROWS = [{"step": 1, "split": "train", "loss": 1.5}]


class Batches:
    """Stands in for an iterator over data."""

    def __init__(self):
        self.position = {"next_index": 0}

    def get_state(self):
        return self.position

    def set_state(self, state):
        self.position = state


def state_at(step):
    """Arrays of many dtypes, one of them large enough for a file of its own."""
    key = jax.random.key(step)
    return {
        "large": jax.random.normal(key, (40, 50)),
        "bfloat16": jnp.arange(6, dtype=jnp.bfloat16) + step,
        "integers": [jnp.arange(5, dtype=jnp.int8), jnp.full((2, 3), step, jnp.int32)],
        "bools": jnp.array([True, False]),
        "step": jnp.array(step),
    }


def reopened(folder):
    """The folder's checkpoint, as a run continues from it: its state, position, rows and what is pending."""
    opened, batches = workdir.Workdir(folder, {}, ""), Batches()
    with opened.owned():
        state, rows, pending = opened.restore(state_at(0), batches)
    return state, batches.position, rows, pending


def equal(found, step):
    state, position, rows, pending = found
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True)
    same = all(one.dtype == other.dtype and np.array_equal(one, other) for one, other in pairs)
    return same and (position, rows, pending) == ({"next_index": step}, ROWS, {"items": step})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    opened, batches = workdir.Workdir(folder, {}, ""), Batches()
    with opened.owned():
        opened.restore(state_at(0), batches)
        opened.write_row(ROWS[0])
        for step in (1, 2):
            batches.set_state({"next_index": step})
            opened.save(step, state_at(step), batches, ROWS, {"items": step})
    return folder


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def byte_changed(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


DAMAGES = {"a bit": flipped, "a byte": byte_changed, "emptied": lambda data: b"", "deleted": lambda data: None}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file(saved, tmp_path, damage, capfd):
    files = [path.relative_to(saved) for path in (saved / "checkpoints" / "2").rglob("*") if path.is_file()]
    assert len(files) > 8
    named = []
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        data = (folder / file).read_bytes()
        changed = DAMAGES[damage](data) if data else (None if damage == "deleted" else data)
        if changed is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(changed)
        capfd.readouterr()
        found = reopened(folder)
        printed = capfd.readouterr().err.splitlines()
        if printed:
            assert equal(found, 1), file
            (line,) = printed
            assert line.startswith(f"attnlab: checkpoint: {folder / 'checkpoints' / '2'} cannot be read (")
            assert line.endswith("); step 1 is used")
            assert [path.name for path in (folder / "damaged").iterdir()] == ["2"]
            named.append(file.name)
        else:
            assert equal(found, 2), file
    assert "manifest.ocdbt" in named
    assert "metadata" in named


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_of_the_arrays(saved, tmp_path, seed, capfd):
    """In the largest file, which holds the arrays."""
    random = np.random.default_rng(seed)
    for trial in range(8):
        folder = tmp_path / str(trial)
        shutil.copytree(saved, folder)
        file = max((folder / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
        data = bytearray(file.read_bytes())
        data[random.integers(len(data))] ^= int(random.integers(1, 256))
        file.write_bytes(data)
        found, printed = reopened(folder), capfd.readouterr().err
        assert equal(found, 1 if printed else 2)


def test_with_none_left_it_is_one_line_and_nothing_moves(saved, tmp_path, capfd):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "facts" / "metadata").write_text("{}")
    with pytest.raises(UserError, match=r"^checkpoint: .*/2 cannot be read \(.*\), nor can 1 older; move .* away"):
        reopened(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert not capfd.readouterr().err


def test_an_empty_folder_and_half_a_checkpoint_are_passed_over(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "999").mkdir()
    partial = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", partial)
    assert equal(reopened(tmp_path), 2)
    assert not partial.exists()


def test_only_the_newest_two_stay(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    opened, batches = workdir.Workdir(tmp_path, {}, ""), Batches()
    with opened.owned():
        opened.restore(state_at(0), batches)
        opened.save(3, state_at(3), batches, ROWS, {"items": 3})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


@pytest.mark.long
def test_runs_of_one_process_save_at_once(tmp_path):
    """As those of a sweep do, each in a thread of its own: of what orbax keeps once a process, nothing is mixed up."""
    runs = 4
    begins = threading.Barrier(runs, timeout=60)

    def save(run):
        opened, batches = workdir.Workdir(tmp_path / str(run), {}, ""), Batches()
        with opened.owned():
            opened.restore(state_at(0), batches)
            begins.wait()
            for step in range(run + 1, run + 6):
                batches.set_state({"next_index": step})
                opened.save(step, state_at(step), batches, ROWS, {"items": step})

    with futures.ThreadPoolExecutor(runs) as pool:
        for run in [pool.submit(save, run) for run in range(runs)]:
            run.result()
    assert all(equal(reopened(tmp_path / str(run)), run + 5) for run in range(runs))


@pytest.mark.parametrize("place", ["large", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_only_finite_states_are_kept(saved, tmp_path, place, value):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    opened, batches = workdir.Workdir(tmp_path, {}, ""), Batches()
    wild = state_at(3) | {place: state_at(3)[place].at[-1].set(value)}
    with opened.owned():
        opened.restore(state_at(0), batches)
        with pytest.raises(FloatingPointError, match=rf"'{place}'\] is not finite at step 3; the last .* is step 2 in"):
            opened.save(3, wild, batches, ROWS, {})
    assert equal(reopened(tmp_path), 2)


@pytest.mark.parametrize(
    "dtype", ["bool", "int4", "int8", "uint16", "int32", "float8_e5m2", "bfloat16", "float16", "float32", "complex64"]
)
def test_every_bit_counts_whatever_the_dtype(dtype):
    random, dtype = np.random.default_rng(0), jnp.dtype(dtype)
    values = random.integers(0, 2, size=(3, 4)).astype(dtype)
    before = integrity.examine([jnp.asarray(values)])
    for index in np.ndindex(values.shape):
        other = values.copy()
        other[index] = 0 if values[index] else 1
        assert integrity.examine([jnp.asarray(other)]) != before


def test_sums_of_keys_and_of_swapped_values():
    def total(array):
        return next(iter(integrity.examine([array]).values())).sum

    assert total(jax.random.key(0)) != total(jax.random.key(1))
    assert total(jnp.array([1.0, -1.0])) != total(jnp.array([-1.0, 1.0]))
    assert total(jnp.zeros((0,))) == 0


@pytest.mark.parametrize("spec", [("data",), ("data", "tensor"), (None, ("data", "tensor")), ()])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sums_do_not_depend_on_the_sharding(spec, kind):
    kinds = (jax.sharding.AxisType[kind],) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=kinds)
    array = jnp.arange(16.0 * 24).reshape(16, 24)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    with jax.set_mesh(mesh):
        assert integrity.examine([jax.device_put(array, sharding)]) == integrity.examine([array])


def test_what_cannot_be_written_is_one_line(saved, tmp_path, monkeypatch, capfd):
    """A writer that fails, as orbax does without room."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    opened, batches = workdir.Workdir(tmp_path, {}, ""), Batches()

    class Full:
        def save(self, path, args):
            path.with_name(f"{path.name}.orbax-checkpoint-tmp").mkdir()
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")

    with opened.owned():
        opened.restore(state_at(0), batches)
        monkeypatch.setattr(workdir, "_checkpointer", Full)
        shown = r"/3 cannot be written \(No space left on device\); the last checkpoint is step 2 in"
        with pytest.raises(RunError, match=shown):
            opened.save(3, state_at(3), batches, ROWS, {})
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    monkeypatch.undo()
    assert equal(reopened(tmp_path), 2)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_a_run(untouched, folder, damage):
    """From the command line: the run ends as if nothing had happened, or says that it cannot."""
    source = untouched / "train"
    newest = source / "checkpoints" / "20"
    for file in sorted(path.relative_to(source) for path in newest.rglob("*") if path.is_file()):
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(source, run)
        (run / "result.json").unlink()
        data = (run / file).read_bytes()
        changed = DAMAGES[damage](data) if data else None
        if changed is None:
            (run / file).unlink()
        else:
            (run / file).write_bytes(changed)
        command = commands.run(folder, "train", "train.gin", "--workdir", "run")
        command.check(0)
        commands.assert_equal_runs(run, source)
        assert len(command.lines) <= 1
