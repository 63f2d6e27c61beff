"""The figure of the order experiment, drawn from a store's content that is made up."""

import numpy as np
import pytest
import xarray as xr

from jaxkd import figures, pipelines

pytestmark = pytest.mark.loose
DRAWN_BY = figures

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


def test_each_algorithm_has_a_marker_of_its_own(drawn):
    figures.mog_order(content())
    _, outcomes, frontier = drawn[0].subfigs
    markers = {handle.get_marker() for handle in outcomes.legends[0].legend_handles}
    assert len(markers) == len(ALGORITHMS)
    for axis in outcomes.axes:
        medians = [line.get_marker() for line in axis.get_lines() if line.get_markerfacecolor() == "white"]
        assert {marker: medians.count(marker) for marker in markers} == dict.fromkeys(markers, len(pipelines.ARMS))
    assert "abscissae differ" in frontier.get_suptitle()


def lost(dataset, **where):
    """The content with some runs failed: nothing of them is a number."""
    dataset = dataset.copy(deep=True)
    for name in ("target_mass", "reward", "kl_to_base", "component_weight", "component_mean", "component_covariance"):
        dataset[name].loc[where] = np.nan
    return dataset


def test_an_arm_that_failed_in_the_seed_shown_is_said_to_have_failed(drawn):
    whole = content(["ppo"])
    # In every seed, so that the seed shown is one of them.
    figures.mog_order(lost(whole, stage="align_kd_sharpened"))
    figures.mog_order(whole)
    panels = [{axis.get_title(): axis for axis in figure.subfigs[0].axes} for figure in drawn]
    title = figures.LABELS["align_kd_sharpened"]
    for panel, is_drawn in zip(panels, (False, True), strict=True):
        told = [text.get_text() for text in panel[title].texts]
        assert (told == ["failed"]) is not is_drawn and bool(panel[title].collections) is is_drawn
        assert panel["student"].collections


def test_the_telling_seed_is_one_of_those_that_did_not_fail():
    dataset = content(["ppo"])
    of_each = xr.where(dataset.stage == "align_kd", 0.1 * (1 + dataset.seed), 0.0)
    dataset["target_mass"] = (of_each + 0 * dataset.target_mass).transpose(*DIMS)
    assert figures.telling_cell(dataset)[2] == 2
    # The median of seeds 3 to 5; were failures the smallest gains it would be among them.
    assert figures.telling_cell(lost(dataset, stage="kd_align", seed=[0, 1, 2]))[2] == 4
    assert figures.telling_cell(lost(dataset, stage="align_kd", seed=[3, 4, 5]))[2] == 1
    assert figures.telling_cell(lost(dataset, stage="align_kd"))[2] in range(6)


def test_a_larger_coefficient_has_the_smaller_marker_whatever_the_order_of_flags(drawn):
    dataset = content(["ppo"])
    for one in (dataset, dataset.isel(kl_coef=[2, 0, 1])):
        figures.mog_order(one)
    first, second = (figure.subfigs[2].axes[0].get_lines() for figure in drawn)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.get_xydata(), b.get_xydata())
        assert a.get_markersize() == b.get_markersize()


def test_one_algorithm_has_nothing_to_differ_from(drawn):
    figures.mog_order(content(["ppo"]))
    assert "abscissae differ" not in drawn[0].subfigs[2].get_suptitle()
