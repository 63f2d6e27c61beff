"""The figure of the order experiment, drawn from a store's content that is made up."""

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt

from jaxkd import figures, pipelines

pytestmark = pytest.mark.loose

ALGORITHMS = ["ppo", "online_dpo", "offline_dpo_ref", "offline_dpo_data"]
DIMS = ("algorithm", "temperature", "kl_coef", "seed", "stage")


def content(algorithms=ALGORITHMS, seeds=6):
    """Every quantity that the figure shows, drawn at random, and models of two components."""
    stages = ["base", "student", "aligned_base", *pipelines.ARMS]
    coordinates = {"algorithm": algorithms, "temperature": [1.0, 0.25], "kl_coef": [0.3, 1.0, 1.5]}
    coordinates |= {"seed": list(range(seeds)), "stage": stages}
    shape = [len(coordinates[dim]) for dim in DIMS]
    generator = np.random.default_rng(0)
    dataset = xr.Dataset(coords=coordinates)
    for name, largest in (("target_mass", 1), ("gibbs_target_mass", 1), ("reward", 6), ("gibbs_reward", 6)):
        dataset[name] = DIMS, largest * generator.random(shape)
    widest = xr.DataArray(np.arange(1.0, 1 + len(algorithms)), dims="algorithm", coords={"algorithm": algorithms})
    dataset["kl_to_base"] = (dataset.reward * widest).transpose(*DIMS)
    for name in ("gibbs_kl", "gibbs_reward"):
        per_base = xr.DataArray(6 * generator.random((3, seeds)), dims=("kl_coef", "seed"))
        dataset[name] = (per_base + 0 * dataset.reward.isel(algorithm=0, drop=True)).transpose(*DIMS[1:])
    dataset["distance_to_gibbs"] = dataset.reward / 6
    dataset["gibbs_target_mass"] = dataset.gibbs_target_mass.isel(algorithm=0, drop=True)
    dataset["component_weight"] = (*DIMS, "component"), np.full((*shape, 2), 0.5)
    dataset["component_mean"] = (*DIMS, "coordinate", "component"), generator.uniform(-1, 1, (*shape, 2, 2))
    covariance = np.broadcast_to(0.05 * np.eye(2)[:, :, None], (*shape, 2, 2, 2))
    dataset["component_covariance"] = (*DIMS, "coordinate", "other_coordinate", "component"), covariance
    dataset["truth_weight"] = "mode", [0.9, 0.1]
    dataset["truth_mean"] = ("coordinate", "mode"), np.array([[-1.0, 1.0], [0.0, 1.0]])
    dataset["truth_variance"] = (), 0.025
    dataset["truth_is_target"] = "mode", [False, True]
    return dataset


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they were when they were to be written."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, paths: kept.append(figure))
    yield kept
    for figure in kept:
        plt.close(figure)


def test_each_algorithm_has_a_marker_of_its_own(drawn):
    figures.mog_order(content())
    _, outcomes, frontier = drawn[0].subfigs
    markers = {handle.get_marker() for handle in outcomes.legends[0].legend_handles}
    assert len(markers) == len(ALGORITHMS)
    for axis in outcomes.axes:
        medians = [line.get_marker() for line in axis.get_lines() if line.get_markerfacecolor() == "white"]
        assert {marker: medians.count(marker) for marker in markers} == dict.fromkeys(markers, len(pipelines.ARMS))
    assert "abscissae differ" in frontier.get_suptitle()


def test_one_algorithm_has_nothing_to_differ_from(drawn):
    figures.mog_order(content(["ppo"]))
    assert "abscissae differ" not in drawn[0].subfigs[2].get_suptitle()
