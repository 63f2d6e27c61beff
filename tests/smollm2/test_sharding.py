"""Eight simulated devices need a process of their own: their number is fixed when the backend starts."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from cluster import run_cluster

from jaxkd.smollm2 import generate, policy, sharding, tokenization, weights
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model


@pytest.mark.slow
def test_eight_devices_give_the_single_devices_results():
    cases = ["tensor", "both", "data"]
    command = [sys.executable, "-W", "error", Path(__file__).with_name("on_eight_devices.py"), *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{case}: equal" for case in cases]


@pytest.mark.slow
def test_two_hosts_train_one_model_loaded_over_both(tmp_path):
    config = Config.tiny(hidden_size=64, num_layers=2)
    params = make_model(config).init(jax.random.key(0))
    weights.save_pretrained(tmp_path / "model", config, params, tokenization.byte_tokenizer())
    script = [sys.executable, str(Path(__file__).with_name("on_two_hosts.py")), str(tmp_path / "model")]

    def start(*cluster):
        return subprocess.Popen([*script, *cluster], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    ended = run_cluster(lambda address, index: start(address, "2", str(index)))
    folders = (tmp_path / "model", tmp_path / "model-again")
    saved, again = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert saved == again and "model.safetensors" in again
    ended = [*run_cluster(lambda address, index: start(), count=1), *ended]
    assert [outcome.code for outcome in ended] == [0, 0, 0], [outcome.err[-3000:] for outcome in ended]
    # An error of the first process, which writes, is one of all.
    refusals = [next(line for line in outcome.out.splitlines() if "refused: " in line) for outcome in ended]
    assert ["process 0 could not write" in refusal for refusal in refusals] == [False, False, True]
    # What draws and scores on the host takes the devices of one process.
    spread = [[line for line in outcome.out.splitlines() if "spread" in line] for outcome in ended]
    assert spread[0] == ["spread"] * 2
    assert all("here are those of 2 (jax.distributed)" in line for lines in spread[1:] for line in lines)
    # The collectives say hello first.
    told = [outcome.out.splitlines()[-1].split() for outcome in ended]
    assert [words[1] for words in told] == ["2", "4", "4"] and told[1] == told[2]
    alone, together = ([float(number) for number in words[3:]] for words in told[:2])
    assert together == pytest.approx(alone, rel=1e-5) and alone[1] < alone[0]


def test_a_checkpoint_is_loaded_in_its_shards(tmp_path):
    config = Config.tiny()
    params = make_model(config).init(jax.random.key(0))
    weights.save_pretrained(tmp_path, config, params, tokenization.byte_tokenizer())
    mesh = sharding.make_mesh(2, 2, devices=jax.devices()[:4])
    _, loaded = weights.load(tmp_path, mesh=mesh)
    wanted = sharding.param_shardings(config, mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, where: leaf.sharding == where, loaded, wanted))
    cut, whole = (tree["layers"]["mlp"]["gate_up"] for tree in (loaded, params))
    assert cut.addressable_shards[0].data.size * 4 == whole.size
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_mesh_that_does_not_divide_the_heads():
    mesh = sharding.make_mesh(model=4, devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="'model' of 4 devices does not divide the 2 heads of keys"):
        sharding.param_shardings(Config.tiny(), mesh)


def test_a_mesh_that_is_not_the_devices():
    with pytest.raises(ValueError, match="a mesh of 3 × 2 needs 6 devices; there are 4"):
        sharding.make_mesh(3, 2, devices=jax.devices()[:4])


def test_scripts_do_not_span_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"here are those of 2 \(jax.distributed\): start each process without it"):
        sharding.mesh_of_all_devices()


def test_a_batch_that_is_not_divided():
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="a batch of 6 is not divided"):
        sharding.shard_batch(mesh, jax.numpy.zeros((6, 2)))


def test_on_one_device_nothing_is_cut():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    specs = jax.tree.leaves(sharding.param_shardings(Config.tiny(), mesh))
    assert all(not any(sharding.spec) for sharding in specs)


_COLLECTIVE = re.compile(r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(")


def collectives(program) -> dict[str, list[str]]:
    """What a compiled program moves between devices, by the computation that does."""
    found, computation = {}, ""
    for line in program.as_text().splitlines():
        if line.endswith("{") and (name := re.match(r"(?:ENTRY )?%?([\w.]+)", line)):
            computation = name[1]
        elif moved := _COLLECTIVE.search(line):
            found.setdefault(computation, []).append(moved[1])
    return found


def placed_shapes(config, mesh):
    """Parameters as shapes, cut over the mesh."""
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, make_model(config).shapes(), sharding.param_shardings(config, mesh))


def test_a_gradient_gathers_weights_and_moves_no_activations(monkeypatch):
    # Several chunks of the head: 8 × 13 positions.
    monkeypatch.setattr(policy, "TOKEN_CHUNK", 36)
    config, mesh = Config.tiny(), sharding.make_mesh()
    texts = [jax.ShapeDtypeStruct((8, 14), kind, sharding=sharding.batch_sharding(mesh)) for kind in ("int32", "bool")]

    def moved(model):
        loss = jax.value_and_grad(lambda params, *x: policy.token_log_probs(model, params, *x).mean())
        lines = collectives(jax.jit(loss).lower(placed_shapes(config, mesh), *texts).compile())
        return re.findall(r"f32\[(?:112|104|105|35|8,14|8,13),\d+", str(lines))

    assert moved(make_model(config, mesh=mesh)) == []
    assert moved(make_model(config)), "the test sees nothing"


def test_decoding_gathers_weights_before_its_loop():
    mesh, config = sharding.make_mesh(), Config.tiny()
    prompts = [jax.ShapeDtypeStruct((8, 5), kind) for kind in ("int32", "bool")]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    batch = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)) for x in (*prompts, keys)]
    sampling = generate.made_ready(generate.Sampling())

    def in_loops(function, *given) -> Counter:
        program = jax.jit(function).lower(placed_shapes(config, mesh), *given).compile()
        return Counter(line for name, lines in collectives(program).items() if "region" in name for line in lines)

    def more_than_a_pass(model) -> Counter:
        """In the loops of sampling, without those that a pass over the prompts gathers layer by layer."""
        sample = in_loops(lambda params, *x: generate.continue_prompts(model, params, *x, 16, sampling), *batch)
        return sample - in_loops(model.hidden, *batch[:2])

    placed = jax.device_put(make_model(config).init(jax.random.key(0)), sharding.param_shardings(config, mesh))
    assert not placed["embedding"].sharding.is_fully_replicated
    decoding = generate.prepare(make_model(config, mesh=mesh), placed, 8).decoding
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(decoding))
    # Whether all sequences have ended is all that a step must know of the others.
    assert more_than_a_pass(make_model(config, mesh=mesh)) == {"pred[]": 1}
    assert len(more_than_a_pass(make_model(config))) > 1, "the test sees nothing"
