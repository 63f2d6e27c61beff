"""The engine over a grid, into a store, in one process and in many."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr
from cluster import run_cluster
from jax._src import clusters
from jax.experimental.compilation_cache import compilation_cache
from small import run

from jaxkd import checks, cli
from jaxkd.sweep import engine, store
from jaxkd.sweep.engine import run_sweep
from jaxkd.sweep.grid import Grid
from jaxkd.sweep.store import Label

SMALL = Path(__file__).with_name("small.py")
GRID = Grid(
    {"algorithm": ("plus", "minus"), "capacity": (1, 2, 4), "scale": (0.5, 2.0)},
    range(7),
    static=("algorithm",),
    per_block={"capacity": 1},
    runs_per_block=6,
)
LABELS = {
    "draws": Label("draws from the policy", "1", ("draw",)),
    "score.mean": Label("mean of the draws", "nat"),
    "scale": Label("spread", "reward/nat"),
}
SHARED = (jnp.float32(0.25),)


def one_run(key, hyperparameters, shift, *, algorithm, padding=4):
    """Components are the rows of an array padded to `padding`; a run's numbers do not depend on how far."""
    # Uniform draws and powers of two are exact, so that no number depends on how XLA fuses a multiply with an add.
    rows = jax.random.uniform(key, (5,))
    used = jnp.arange(padding) < hyperparameters["capacity"]
    draws = jnp.where(used[:, None], rows[None, :], jnp.float32(0)).sum(axis=0) * hyperparameters["scale"]
    draws = draws + shift if algorithm == "plus" else draws - shift
    return {"draws": draws, "score": {"mean": draws.mean()}, "failed": hyperparameters["capacity"] == 4}


def padding_of(block):
    return {"padding": int(block.axes["capacity"].max())}


def sweep(path, grid=GRID, function=one_run, **changes):
    settings = {"shared": SHARED, "labels": LABELS, "configuration": {"steps": 4}, "chunk": 2}
    return run_sweep(function, grid, path, **{**settings, "progress": False, **changes})


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """A compile cache of this module's own, for its subprocesses too."""
    folder, before = str(tmp_path_factory.mktemp("cache")), jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        jax.config.update("jax_compilation_cache_dir", folder)
        yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "sweep.zarr"
    report = sweep(path)
    assert report.runs == GRID.size == 84
    assert report.failed == 28
    return path


def load(path):
    with xr.open_zarr(path) as dataset:
        return dataset.load()


def assert_same(path, other):
    xr.testing.assert_identical(load(path).drop_attrs(), load(other).drop_attrs())


def test_a_store_is_labelled_and_opens_without_a_warning(finished):
    dataset = load(finished)  # warnings are errors
    assert dataset.draws.dims == ("algorithm", "capacity", "scale", "seed", "draw")
    assert dataset["score.mean"].dims == GRID.dims
    assert dataset.algorithm.values.tolist() == ["plus", "minus"]
    assert dataset["score.mean"].attrs == {"long_name": "mean of the draws", "units": "nat"}
    assert dataset.scale.attrs == {"long_name": "spread", "units": "reward/nat"}
    assert dataset.done.values.all()
    assert json.loads(dataset.attrs["configuration"])["steps"] == 4
    assert {"versions", "device", "git_commit", "jaxkd_store_version"} <= set(dataset.attrs)
    by_hand = one_run(
        jax.random.key(3), {"capacity": jnp.int32(2), "scale": jnp.float32(2)}, *SHARED, algorithm="minus"
    )
    stored = dataset.sel(algorithm="minus", capacity=2, scale=2.0, seed=3)
    np.testing.assert_allclose(stored.draws, by_hand["draws"], rtol=1e-6)


def test_zipped_axes_are_coordinates_of_one_dimension(tmp_path):
    grid = Grid({"a": (1, 2, 3), "b": (0.5, 1.0, 1.5)}, range(2), zips={"pair": ("a", "b")})
    run_sweep(lambda key, h: h["a"].astype(jnp.float32) * h["b"], grid, tmp_path / "s", chunk=1, progress=False)
    dataset = load(tmp_path / "s")
    assert dataset.result.dims == ("pair", "seed")
    assert dataset.a.dims == ("pair",)
    np.testing.assert_array_equal(dataset.result, np.repeat([[0.5], [2.0], [4.5]], 2, axis=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk": 1},
        {"chunk": 5},
        {"chunk": 100},
        {"chunk": None},
        {"chunk": None, "default_chunk": 3},
        {"devices": 1},
        {"settings": padding_of},
        {"settings": padding_of, "chunk": 3},
    ],
)
def test_neither_chunk_nor_devices_nor_padding_changes_a_number(finished, tmp_path, changes):
    sweep(tmp_path / "s", **changes)
    assert_same(finished, tmp_path / "s")


def test_the_generator_that_jax_takes_by_default_changes_no_number(finished, tmp_path):
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        sweep(tmp_path / "s")
    finally:
        jax.config.update("jax_default_prng_impl", before)
    assert_same(finished, tmp_path / "s")


def calls_of(monkeypatch):
    """The batches that are started, each as its pieces: block, begin and end."""
    calls, start = [], engine._Sweep.start

    def spy(self, program, pieces, runs):
        calls.append([(piece.block.index, piece.begin, piece.end) for piece in pieces])
        return start(self, program, pieces, runs)

    monkeypatch.setattr(engine._Sweep, "start", spy)
    return calls


def test_a_call_holds_runs_of_several_blocks_that_share_a_program(finished, tmp_path, monkeypatch, capsys):
    calls = calls_of(monkeypatch)
    sizes = [block.num_runs for block in GRID.blocks()]
    report = sweep(tmp_path / "a", chunk=7)
    assert report.chunk == 7
    assert [sum(end - begin for _, begin, end in pieces) for pieces in calls] == [28, 14] * 2
    assert [piece for pieces in calls for piece in pieces if piece[1] == 0][-1][0] == GRID.num_blocks - 1
    # Every run of every block once, in order, and no batch over two algorithms.
    runs = [(index, run) for pieces in calls for index, begin, end in pieces for run in range(begin, end)]
    assert runs == [(index, run) for index, size in enumerate(sizes) for run in range(size)]
    assert all(len({GRID.block(index).static["algorithm"] for index, *_ in pieces}) == 1 for pieces in calls)
    assert_same(finished, tmp_path / "a")
    assert capsys.readouterr().err == ""
    calls.clear()
    assert sweep(tmp_path / "b", chunk=100).chunk == 11
    told = capsys.readouterr().err.splitlines()
    assert told == ["b: chunk 100 cut to 11: no more than 42 runs in a row share a program, over 4 device(s)"]
    assert len(calls) == 2
    # With a program a capacity there are fewer in a row: one that is asked for by nobody is cut in silence.
    assert sweep(tmp_path / "c", settings=padding_of, chunk=None, default_chunk=100).chunk == 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("chunk", [2, 5])
def test_neither_order_nor_resuming_changes_a_number(finished, tmp_path, monkeypatch, chunk):
    path = tmp_path / "s"
    order = np.random.default_rng(0).permutation(GRID.num_blocks).tolist()
    monkeypatch.setattr(engine.hosts, "own_share", lambda count: order[: count // 2])
    assert sweep(path, chunk=chunk).runs < GRID.size
    half = load(path)
    assert half.done.sum() == GRID.num_blocks // 2
    assert np.isnan(half.draws).any()
    monkeypatch.undo()
    # The chunk of the store is used again.
    report = sweep(path, chunk=None, default_chunk=1)
    assert (report.chunk, report.runs + report.runs_before) == (chunk, GRID.size)
    assert_same(finished, path)
    again = sweep(path, chunk=None)
    assert (again.runs, again.runs_before) == (0, GRID.size)
    assert_same(finished, path)


def test_stores_of_other_seeds_are_joined_along_them(finished, tmp_path):
    parts = []
    for number, seeds in enumerate((range(3), range(3, 7))):
        sweep(tmp_path / str(number), grid=Grid(GRID.axes, seeds, {}, GRID.static, GRID.per_block, 6))
        parts.append(xr.open_zarr(tmp_path / str(number)))
    store.join(parts).to_zarr(tmp_path / "joined", zarr_format=3, consolidated=False)
    with xr.open_zarr(tmp_path / "joined", consolidated=False) as joined:
        xr.testing.assert_equal(joined.load().drop_vars("done"), load(finished).drop_vars("done"))
        assert joined.done.values.all() and joined.done.size == 6 + 12
        assert json.loads(joined.attrs["configuration"])["axis seed"] == ["0 to 2", "3 to 6"]
    with pytest.raises(ValueError, match="the stores share seeds: 0 to 2, 0 to 2"):
        store.join([parts[0], parts[0]])
    sweep(tmp_path / "other", configuration={"steps": 5}, grid=Grid(GRID.axes, [9], {}, GRID.static, GRID.per_block, 6))
    with pytest.raises(ValueError, match="different sweeps: steps: 4 there, 5 now"):
        store.join([parts[0], xr.open_zarr(tmp_path / "other")])
    function = scaled(2.0)
    sweep(tmp_path / "changed", function=function, grid=Grid(GRID.axes, [9], {}, GRID.static, GRID.per_block, 6))
    with pytest.raises(ValueError, match="different sweeps: other functions"):
        store.join([parts[0], xr.open_zarr(tmp_path / "changed")])


def test_a_run_that_goes_bad_stays_one_run(finished, tmp_path):
    def struck(key, hyperparameters, shift, **static):
        result = one_run(key, hyperparameters, shift, **static)
        is_hit = (jax.random.key_data(key)[1] == 3) & (hyperparameters["capacity"] == 2)
        return result | {"draws": jnp.where(is_hit, jnp.nan, result["draws"])}

    sweep(tmp_path / "s", function=struck)
    got, want = load(tmp_path / "s").draws, load(finished).draws
    hit = (got.seed == 3) & (got.capacity == 2)
    assert got.where(hit, drop=True).isnull().all()
    xr.testing.assert_equal(got.where(~hit), want.where(~hit))


@pytest.mark.loose  # strictness is a setting of this thread alone, and jax traces anew under other settings
def test_one_program_a_static_combination_and_the_cache_is_used(tmp_path):
    traces = []

    def counted(key, hyperparameters, shift, **static):
        traces.append(static)
        return one_run(key, hyperparameters, shift * jnp.float32(1.5), **static)

    first = sweep(tmp_path / "a", function=counted, settings=padding_of)
    assert first.programs == 6
    assert len(traces) == 6  # the shapes of the store come from the first
    second = sweep(tmp_path / "b", function=counted, settings=padding_of)
    assert second.cache_hits == second.programs == 6
    traces.clear()
    sweep(tmp_path / "c", function=counted, chunk=None)
    assert len(traces) == 2  # however many chunks are tried


def test_results_can_be_turned_into_variables_on_the_host(tmp_path):
    def finish(results, block):
        assert len(results["draws"]) == block.num_runs
        return {"largest": results["draws"].max(axis=1), "static": np.full(block.num_runs, len(block.static))}

    sweep(tmp_path / "s", finish=finish, labels={})
    dataset = load(tmp_path / "s")
    assert set(dataset.data_vars) == {"largest", "static", "done"}
    assert (dataset.static == 1).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chunk": 0}, ValueError, "--chunk must be a whole number of at least 1; got 0"),
        ({"chunk": None, "default_chunk": 0}, ValueError, "--chunk must be a whole number of at least 1; got 0"),
        ({"chunk": 3}, ValueError, "--chunk must be 2, with which .* was begun, or smaller, or be left out; got 3"),
        ({"devices": 0}, ValueError, "--devices .*at least 1 and at most 4; got 0"),
        ({"devices": 5}, ValueError, "--devices .*this process has 4.* at most 4; got 5"),
        ({"configuration": {"steps": 5}}, FileExistsError, r"\(steps: 4 there, 5 now\): choose another --out, or"),
        ({"configuration": {}}, FileExistsError, "steps: 4 there, None now"),
        ({"grid": Grid({**GRID.axes, "scale": (0.5, 3.0)}, GRID.seeds, {}, GRID.static, GRID.per_block, 6)},
         FileExistsError, r"\(axis scale: \[0.5, 2.0\] there, \[0.5, 3.0\] now\)"),
        ({"grid": Grid(GRID.axes, range(8), {}, GRID.static, GRID.per_block, 6)}, FileExistsError, r"\(axis seed: "),
        ({"grid": Grid(GRID.axes, GRID.seeds, {}, GRID.static, GRID.per_block, 4)}, FileExistsError, r"\(block shape:"),
        ({"finish": lambda results, block: {"draws": results["draws"][:, :3]}}, FileExistsError, r"\(variables: "),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_store_is_refused_and_changes_nothing(finished, changes, error, message):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        sweep(finished, **{"labels": {}, **changes} if "finish" in changes else changes)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_a_store_of_a_few_blocks_takes_a_chunk_that_something_speaks_for(finished, tmp_path, monkeypatch):
    path = tmp_path / "s"

    def begin(count, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(engine.hosts, "own_share", lambda _: range(count))
            return sweep(path, **changes)

    begin(0, chunk=2)
    begin(2)
    with pytest.raises(ValueError, match=r"--chunk must be 2, .*; got 3"):
        begin(4, chunk=3)
    assert begin(4, chunk=1).chunk == 1  # memory
    report = sweep(path, chunk=3, devices=2)  # other devices
    assert (report.chunk, report.devices) == (3, 2)
    assert_same(finished, path)


def scaled(factor, constant=()):
    """The run, in the algorithm "minus" with its draws multiplied, and with numbers that it closes over."""
    constants = np.asarray(constant, np.float32)

    def function(key, hyperparameters, shift, *, algorithm, padding=4):
        shift = jax.tree.leaves(shift)[0].reshape(-1)[0]
        result = one_run(key, hyperparameters, shift, algorithm=algorithm, padding=padding)
        if algorithm == "minus":
            result["draws"] = result["draws"] * jnp.float32(factor) + constants.sum()
        return result

    return function


@pytest.mark.parametrize("is_finished", [True, False])
def test_another_function_or_other_shared_arrays_are_refused(tmp_path, monkeypatch, is_finished):
    path, numbers = tmp_path / "s", np.arange(3)
    with monkeypatch.context() as patch:
        if not is_finished:
            patch.setattr(engine.hosts, "own_share", lambda count: range(count // 4))
        sweep(path, function=scaled(1.0, numbers))
    begun = load(path)
    # The algorithm whose numbers change is not the first one.
    for function in (scaled(2.0, numbers), scaled(1.0, numbers + 1)):
        with pytest.raises(FileExistsError, match=r"another sweep \(the function has changed\): choose another --out"):
            sweep(path, function=function)
    for shared, told in (
        ((jnp.float32(0.2501),), "shared array 0: other values"),
        ((np.full(2, 0.25, np.float32),), "shared array 0: other values"),
        (({"shift": jnp.float32(0.25)},), "shared array 0: only .*; shared array 0.shift: only there or only now"),
    ):
        with pytest.raises(FileExistsError, match=rf"\(.*{told}\)"):
            sweep(path, function=scaled(1.0, numbers), shared=shared)
    xr.testing.assert_identical(load(path), begun)
    # Another device may round what is shared in another way.
    nearly = (np.nextafter(SHARED[0], np.float32(1)),)
    sweep(path, function=scaled(1.0, numbers), shared=nearly, devices=1, settings=lambda block: {})
    assert load(path).done.all()


def test_a_store_that_tells_neither_function_nor_shared_arrays_is_gone_on_with(finished, tmp_path):
    path = tmp_path / "s"
    sweep(path)
    shutil.rmtree(path / store._SHARED)
    meta = path / "zarr.json"
    told = json.loads(meta.read_text())
    del told["attributes"][store.FUNCTION], told["consolidated_metadata"]
    meta.write_text(json.dumps(told))
    zarr.open_group(path, mode="r+")["done"][3] = 0
    assert sweep(path).runs == 6
    assert store.join([xr.open_zarr(path, consolidated=False)]).sizes["seed"] == 7


def contents(folder):
    """Names in a folder, without the claims beside the stores."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_store_that_another_process_is_writing_is_left_to_it(finished, tmp_path, monkeypatch, overwrite):
    path, others = tmp_path / "s", []
    compute = engine._compute

    def meanwhile(*arguments):
        before = {entry: entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}
        for configuration in ({"steps": 4}, {"steps": 5}) if overwrite else ({"steps": 4},):
            with pytest.raises(OSError, match=r"another process is writing .*s: wait .* delete .*/\.s\.lock"):
                sweep(path, configuration=configuration, overwrite=overwrite)
            others.append(configuration)
        assert before == {entry: entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}
        return compute(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_compute", meanwhile)
        sweep(path)
    assert others
    assert_same(finished, path)
    # Nothing is left of the claim.
    assert sweep(path, overwrite=overwrite).runs == (GRID.size if overwrite else 0)


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("key", ["jaxkd_store_version", "versions"])
def test_a_store_of_another_version_is_refused(tmp_path, key, is_finished):
    path = tmp_path / "s"
    run_sweep(one_value, TINY, path, progress=False)
    if not is_finished:
        zarr.open_group(path, mode="r+")["done"][0] = 0
    meta = path / "zarr.json"
    told = json.loads(meta.read_text())
    told["attributes"][key] = {"jaxkd_store_version": "0", "versions": json.dumps({"jaxkd": "0.0.1", "jax": "0.1"})}[
        key
    ]
    meta.write_text(json.dumps(told))
    advice = "it is finished: open it" if is_finished else "to finish it install jaxkd 0.0.1 with jax 0.1; else choose"
    expected = {
        "jaxkd_store_version": r"\(jaxkd_store_version: 0 there, 1 now\): choose another --out, or give --overwrite",
        "versions": rf"version of jax: 0.1 there.*\): {advice}",
    }
    with pytest.raises(FileExistsError, match=expected[key]):
        run_sweep(one_value, TINY, path, progress=False)
    run_sweep(one_value, TINY, path, progress=False, overwrite=True)
    assert load(path).done.all()
    assert contents(tmp_path) == ["s"]


TINY = Grid({"a": (1.0, 2.0)}, range(2))


def one_value(key, hyperparameters):
    return {"value": hyperparameters["a"] + jax.random.uniform(key)}


@pytest.mark.parametrize("path", ["gs://bucket/plane", Path("s3://bucket/plane")])
def test_a_bucket_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--out must be a folder, got .*: buckets are not supported, nor mounts of"):
        run_sweep(one_value, TINY, path, progress=False)
    for check in (store.check_writable, lambda path: store.write(xr.Dataset(), path, {})):
        with pytest.raises(ValueError, match="buckets are not supported"):
            check(Path(path))
    assert not list(tmp_path.iterdir())
    checks.folder("--out", "a/b:c/d")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_store_is_refused(tmp_path, overwrite):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="letters exists and is no store of jaxkd: choose another --out"):
        run_sweep(one_value, TINY, tmp_path / "letters", overwrite=overwrite, progress=False)
    assert (tmp_path / "letters" / "a.txt").read_text() == "dear"


def test_a_folder_that_cannot_be_written_is_one_error_before_any_compute(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(engine, "compile_runs", None)
    with pytest.raises(OSError, match=r"cannot write to .*file: File exists; choose another --out"):
        run_sweep(one_value, TINY, tmp_path / "file" / "s", progress=False)

    def denied(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # Made up, since the superuser may write everywhere.
    monkeypatch.setattr(store, "tempfile", SimpleNamespace(TemporaryFile=denied))
    with pytest.raises(OSError, match=r"cannot write to .*locked: Permission denied; choose another --out"):
        run_sweep(one_value, TINY, tmp_path / "locked" / "s", progress=False)
    assert not (tmp_path / "locked" / "s").exists()


def test_a_full_disk_is_one_error_and_the_sweep_goes_on_once_there_is_room(finished, tmp_path, monkeypatch):
    path = tmp_path / "s"
    # Four whole blocks of three variables and the ledger's entry; two variables of the fifth.
    left = [4 * 4 + 2]
    set_item, write_block = zarr.Array.__setitem__, store.Store.write_block

    def full(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        set_item(self, *arguments)

    def write_to_full_disk(self, block, values):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zarr.Array, "__setitem__", full)
            write_block(self, block, values)

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_block", write_to_full_disk)
        with pytest.raises(OSError, match=r"cannot write block .*: No space left on device; what was finished stays"):
            sweep(path)
    half = load(path)
    assert np.flatnonzero(half.done).tolist() == [0, 1, 2, 3]
    for block in GRID.blocks():
        if half.done[block.index]:
            region = tuple(block.region.values())
            np.testing.assert_array_equal(half.draws.values[region], load(finished).draws.values[region])
    sweep(path)
    assert_same(finished, path)


def test_names_that_clash_or_labels_that_do_not_fit_are_refused(tmp_path):
    for labels, message in (
        ({"draws": Label(dims=("draw", "too_many"))}, "'draws' has 1 dimensions of its own, its label names"),
        ({"drawn": Label()}, "labels names 'drawn'; the variables are draws"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(tmp_path / "s", labels=labels)
    with pytest.raises(ValueError, match="'draws' is 5 long along 'draw', which has 2 places"):
        sweep(tmp_path / "s", coordinates={"draw": (1, 2)})
    with pytest.raises(ValueError, match="'a' bears the name of an axis"):
        run_sweep(lambda key, h: {"a": h["a"]}, TINY, tmp_path / "s", progress=False)
    for name in ("block", "done"):
        with pytest.raises(ValueError, match=f"axis '{name}' bears a name that is the ledger's"):
            run_sweep(lambda key, h: 0.0, Grid({name: (1, 2)}, [0]), tmp_path / "s", progress=False)
        with pytest.raises(ValueError, match=f"axis '{name}' bears a name that is the ledger's"):
            sweep(tmp_path / "s", coordinates={name: (1, 2)})
        with pytest.raises(ValueError, match=f"'draws' has a dimension of its own named '{name}', which is taken"):
            sweep(tmp_path / "s", labels={"draws": Label(dims=(name,))})
    with pytest.raises(ValueError, match="coordinates names 'scale', which is an axis of the grid"):
        sweep(tmp_path / "s", coordinates={"scale": (1, 2, 3, 4, 5)})
    with pytest.raises(ValueError, match="'draws' has a dimension of its own named 'seed', which is taken"):
        sweep(tmp_path / "s", labels={"draws": Label(dims=("seed",))})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, 0), "go together; not given: --num-processes"),
        (("host", 2, 0), "--coordinator must be host:port"),
        (("host:99999", 2, 0), "a port from 1 to 65535"),
        (("host:1234", 2, 2), "--process-id must be from 0 .* got 2 of 2"),
    ],
)
def test_flags_of_several_hosts_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        engine.hosts.initialize(*arguments)


def small(path, *flags):
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, SMALL, path, *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "s"
    finish(small(path, "--chunk", 2))
    return path


@pytest.fixture
def fork(monkeypatch):
    """Starts a process of the small sweep that need not import anything first: that would take most of its time."""
    monkeypatch.setenv("XLA_FLAGS", "")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "xarray", "jaxkd.sweep.engine", "small"])

    def start(*flags):
        process = context.Process(target=run, args=flags)
        process.start()
        return process

    return start


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_data(uninterrupted, tmp_path, fork):
    path, draw = tmp_path / "s", random.Random(0)
    kills = after_progress = 0
    while kills < 20:
        before = done_in(path)
        # None: in the midst of making the store, or of reading what is there.
        wanted = before + draw.randint(0, 3)
        process = fork(path, "--chunk", 2, "--pause", 0.1)
        while process.is_alive() and not (path.exists() and done_in(path) >= wanted):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        after_progress += done_in(path) > before
        if done_in(path) == 12:
            # Finished before twenty kills: these data are right already; some blocks are taken away again.
            assert_same(uninterrupted, path)
            group = zarr.open_group(path, mode="r+")
            first = draw.randrange(12)
            group["done"][first:] = 0
            group["draws"][:, 2 * first :] = np.nan
    finish(small(path, "--chunk", 2))
    assert after_progress >= 3
    assert_same(uninterrupted, path)


def done_in(path):
    return int(zarr.open_group(path, mode="r")["done"][:].sum()) if path.exists() else 0


def small_cluster(path, *flags, own=((), ())):
    """Two processes of the small sweep, each with flags of its own too."""

    def start(address, index):
        cluster = ("--coordinator", address, "--num-processes", 2, "--process-id", index)
        return small(path, "--chunk", 2, *flags, *cluster, *own[index])

    return run_cluster(start)


@pytest.mark.slow
def test_two_processes_make_the_store_of_one(uninterrupted, tmp_path):
    path = tmp_path / "s"
    ended = small_cluster(path, "--progress", "--pause", 0.5, "--pausing", 1)
    assert [one.code for one in ended] == [0, 0], ended
    reports = [json.loads(one.out.splitlines()[-1]) for one in ended]
    assert [report["runs"] for report in reports] == [36, 36]
    assert [report["told"].partition(" in ")[0] for report in reports] == [
        f"process {index} of 2: 36 of 72 runs" for index in range(2)
    ]
    assert "s, process 0 of 2 (36 of 72 runs)" in ended[0].err
    # The other writes six blocks at half a second each; the last ones are waited for.
    waiting = ended[0].err.rpartition("waiting for the other processes")[2]
    assert "12/12" in waiting
    assert "waiting" not in ended[1].err
    assert_same(uninterrupted, path)


@pytest.mark.slow
def test_an_error_in_one_process_is_one_in_both(uninterrupted, tmp_path):
    path = tmp_path / "s"
    begin = time.monotonic()
    ended = small_cluster(path, "--disk-full-in", 1)
    assert time.monotonic() - begin < 60
    assert [one.code for one in ended] == [2, 2], ended
    own = f"cannot write block 1 to {path}: No space left on device; what was finished stays readable"
    assert ended[1].err.startswith(f"error: {own}")
    assert ended[0].err.startswith(f"error: process 1 could not finish the sweep: {own}")
    assert done_in(path) == 6
    assert [one.code for one in small_cluster(path)] == [0, 0]
    assert_same(uninterrupted, path)


@pytest.mark.slow
def test_too_few_devices_in_one_process_are_an_error_in_both(tmp_path):
    begin = time.monotonic()
    ended = small_cluster(tmp_path / "s", own=((), ("--devices", 3)))
    assert time.monotonic() - begin < 60
    assert [one.code for one in ended] == [2, 2], ended
    own = "--devices (this process has 2) must be a whole number of at least 1 and at most 2; got 3"
    assert [one.err.strip() for one in ended] == [
        f"error: process 1 could not begin the sweep: {own}",
        f"error: {own}",
    ]
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_folder_that_the_hosts_do_not_share_is_an_error_in_both(tmp_path):
    there, elsewhere = tmp_path / "there" / "s", tmp_path / "elsewhere" / "s"

    def start(address, index):
        cluster = ("--coordinator", address, "--num-processes", 2, "--process-id", index)
        return small((there, elsewhere)[index], "--chunk", 2, "--seen-within", 1, *cluster)

    ended = run_cluster(start)
    assert [one.code for one in ended] == [2, 2], ended
    told = f"process 1 does not see {elsewhere}: --out must be a folder that all hosts share"
    assert [one.err.strip() for one in ended] == [
        f"error: process 1 could not open the store: {told}",
        f"error: {told}",
    ]
    assert not elsewhere.exists()


@pytest.mark.slow
def test_a_process_without_a_block_is_told_of(tmp_path):
    ended = small_cluster(tmp_path / "s", "--seeds", 2)
    assert [one.code for one in ended] == [0, 0], ended
    assert [one.err for one in ended] == ["s: 1 of 2 processes have no block: there are 1\n", ""]
    assert [json.loads(one.out.splitlines()[-1])["runs"] for one in ended] == [6, 0]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_do_not_come_are_one_message(index):
    code = (
        "from jaxkd.sweep import hosts; hosts._JOIN_S = 2; import socket; free = socket.socket(); "
        f"free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]; free.close(); "
        f"hosts.initialize(f'127.0.0.1:{{port}}', 2, {index})"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: the other processes did not join within 2 s at 127.0.0.1:")
    assert len(answer.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("tasks", "flags", "expected"),
    [
        (1, (), []),
        (2, (), [((None, None, None), None)]),
        (1, ("host:1234", 2, 1), [(("host:1234", 2, 1), "deactivate")]),
        (2, ("host:1234", 2, 1), [(("host:1234", 2, 1), None)]),
    ],
)
def test_slurms_only_task_keeps_all_its_devices(tasks, flags, expected, monkeypatch):
    told = {"JOB_ID": 7, "STEP_NODELIST": "node001", "NTASKS": tasks, "PROCID": 0, "LOCALID": 0}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    # What jax makes of it: the one device of that number.
    assert detect(None, None, None, None, None, None)[1:] == (tasks, 0, [0])
    calls = []
    monkeypatch.setattr(
        jax.distributed,
        "initialize",
        lambda *given, cluster_detection_method, initialization_timeout: calls.append(
            (given, cluster_detection_method)
        ),
    )
    engine.hosts.initialize(*flags)
    assert calls == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_runs(tmp_path):
    # 32 KiB a run: all of them would be 3 GiB. Zeros take no room on the disk.
    report = finish(small(tmp_path / "s", "--seeds", 33_334, "--runs-per-block", 1024, "--ballast", 8192))
    assert report["runs"] == 100_002
    assert report["peak_kib"] < 2 * 1024**2
    print(report)


def heavy(key, hyperparameters):
    """Sorts an array of 16 TiB."""
    row = jax.random.uniform(key, (2**20,)) * hyperparameters["a"]
    return {"value": jnp.sort(jnp.broadcast_to(row[:, None], (2**20, 2**22)), axis=0)[0, 0]}


def test_a_chunk_that_memory_does_not_hold_is_one_message(tmp_path, capsys):
    for chunk, told in ((2, "2 runs a device: give a smaller --chunk"), (1, "1 run a device")):
        with pytest.raises(SystemExit) as ended, cli.exit_on_error():
            run_sweep(heavy, TINY, tmp_path / str(chunk), chunk=chunk, devices=1, progress=False)
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"error: out of memory with {told}\n"
    with pytest.raises(SystemExit), cli.exit_on_error():
        jax.block_until_ready(heavy(jax.random.key(0), {"a": jnp.float32(1)}))
    assert capsys.readouterr().err.startswith("error: out of device memory: give a smaller batch or chunk (")
    for error in (MemoryError(), MemoryError("Unable to allocate 3.00 TiB")):
        with pytest.raises(SystemExit) as ended, cli.exit_on_error():
            raise error
        told = capsys.readouterr().err
        assert ended.value.code == 2 and told.startswith("error: out of the host's memory: give a smaller")
        assert str(error) in told and "()" not in told
    with pytest.raises(RuntimeError, match="not of memory"), cli.exit_on_error():
        raise RuntimeError("not of memory")


def test_measuring_ends_at_the_last_chunk_that_memory_holds_and_going_on_measures_nothing(tmp_path, monkeypatch):
    tried, start = [], engine._Sweep.start

    def limited(self, program, pieces, runs):
        tried.append(runs)
        if runs > limit:
            jax.block_until_ready(heavy(jax.random.key(0), {"a": jnp.float32(1)}))
        return start(self, program, pieces, runs)

    monkeypatch.setattr(engine._Sweep, "start", limited)
    # Every chunk is faster than the one before, and worth trying.
    seconds = engine._seconds_a_run
    monkeypatch.setattr(engine, "_seconds_a_run", lambda *given: 1e3 / given[3] + 0 * seconds(*given))
    grid = Grid({"a": (1.0, 2.0)}, range(512), runs_per_block=32)
    limit = 4 * 8
    with monkeypatch.context() as patch:
        patch.setattr(engine.hosts, "own_share", lambda count: range(count // 2))
        begun = run_sweep(one_value, grid, tmp_path / "s", progress=False)
    assert (begun.chunk, begun.runs) == (8, 512)
    assert set(tried) == {8, 32, 128}
    tried.clear()
    ended = run_sweep(one_value, grid, tmp_path / "s", progress=False)
    assert (ended.chunk, ended.runs, ended.runs_before) == (8, 512, 512)
    assert set(tried) == {32}
    limit = 1
    with pytest.raises(cli.DeviceMemoryError, match="out of memory with 2 runs a device: give a smaller --chunk"):
        run_sweep(one_value, grid, tmp_path / "t", progress=False)
    assert not (tmp_path / "t").exists()


def test_a_script_prints_one_message_and_exits_with_2(tmp_path):
    (tmp_path / "s").mkdir()
    process = small(tmp_path / "s")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err.strip() == f"error: {tmp_path / 's'} exists and is no store of jaxkd: choose another --out"


def test_the_store_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.zarr, "consolidate_metadata", fails)
    with pytest.raises(OSError, match=r"cannot make the store .*: No space left on device"):
        run_sweep(one_value, TINY, tmp_path / "s", progress=False)
    assert not (tmp_path / "s").exists()
    monkeypatch.undo()
    run_sweep(one_value, TINY, tmp_path / "s", progress=False)
    assert contents(tmp_path) == ["s"]
