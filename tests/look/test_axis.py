"Where timesteps lie in pictures: three axes, one piece of code, and colour scales that do not exaggerate."
import math
import warnings

import numpy as np
import pytest
import torch

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import ScheduleConfig
from dmp_wb.diffusion.schedules import sampler, snr
from dmp_wb.look import viz
from dmp_wb.look.axis import columns_of, tick_places, time_axis
from dmp_wb.look.canvas import new_figure, scale_ends
from dmp_wb.methods.base import Panel


def test_places_of_timesteps_on_each_axis():
    t = np.array([0, 10, 500, 999])
    assert np.array_equal(time_axis().of(t), t)
    want = snr("cosine").log().numpy()
    assert np.allclose(time_axis("log-snr", "cosine").of(t), want[t])
    flow = time_axis("log-snr", prediction_type="flow_prediction").of(np.arange(1000))
    assert np.isfinite(flow).all() and flow[0] > 0 > flow[-1] and flow[499] == pytest.approx(0, abs=1e-5)
    visited = sampler("dpmsolver++", "linear", 10).timesteps.numpy()
    assert np.array_equal(time_axis("step", steps=10).of(visited), np.arange(10))
    heun = time_axis("step", sampler="heun", steps=10)   # visits most of its timesteps twice
    assert np.array_equal(np.sort(heun.places), np.arange(len(heun.places))) and heun.places[-1] == 0
    with pytest.raises(BadInput, match="did you mean 'log-snr'"): time_axis("log_snr")


def test_columns_show_the_nearest_timestep():
    t = np.arange(1000)
    even = columns_of(time_axis(), t)
    assert np.array_equal(even.rows, t) and even.ends == (0, 999)
    axis = time_axis("log-snr")
    found = columns_of(axis, t)
    places = np.linspace(*found.ends, len(found.rows))
    assert all(abs(axis.of([r])[0] - p) == np.abs(axis.of(t) - p).min()
               for r, p in zip(found.rows[::50], places[::50], strict=True))
    assert found.at(found.ends[0]) == 0 and found.at(found.ends[1]) == len(found.rows) - 1
    steps = time_axis("step", steps=10)
    grid = np.linspace(0, 999, 334).round()
    found = columns_of(steps, grid)
    assert len(found.rows) == 10 and found.at(0) == 0 and found.at(9) == 9
    visited = sampler("dpmsolver++", "linear", 10).timesteps.numpy()
    assert (np.abs(grid[found.rows] - visited) <= 2).all()

    uneven = columns_of(time_axis(), [0, 1, 2, 999])   # its columns are of one width: most show one of the ends
    assert uneven.rows[0] == 0 and uneven.rows[-1] == 3 and (uneven.rows == 2).sum() > 200


def drawn(fig): return [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()]


@pytest.mark.parametrize("axis", ["timestep", "log-snr", "step"])
def test_pictures_over_timesteps_take_an_axis(axis):
    t = torch.arange(0, 1000, 20)
    gates, label = torch.rand(50, 2, 4).softmax(-1), time_axis(axis).label
    mask = wb.routing_mask(t, 16)
    figures = [viz.gate_heatmaps(gates, t, axis=axis), viz.gate_entropy(torch.ones(50, 2), t, 4, axis=axis),
               viz.routing_masks({"a": mask}, t, axis=axis),
               viz.timestep_affinities({"m": mask @ mask.T}, t, axis=axis),
               viz.affinity_lines(np.ones((1, 2)), [(0, 499), (500, 999)], [(0, 499)], axis=axis),
               viz.loss_by_timestep([(0, 499), (500, 999)], {"base": [1, 2], "dmp": [1, 1.5]}, axis=axis),
               *(viz.panel_figure(Panel(kind, "x", values, t), axis=axis)
                 for kind, values in (("gates", gates), ("mask", mask), ("lines", mask), ("matrix", mask)))]
    for fig in figures:
        assert label in drawn(fig)
        fig.canvas.draw()
    # a map's ends are the places of the timesteps at its edges
    left, right = figures[0].axes[0].images[0].get_extent()[:2]
    assert (left, right) == columns_of(time_axis(axis), t).ends and (left > right) == (axis == "log-snr")


def test_scales_do_not_exaggerate():
    low, high = scale_ends([48.99, 49.01])
    assert high / low == pytest.approx(1.25) and low < 48.99 < 49.01 < high
    assert scale_ends([1.0, 4.0, np.nan]) == (1.0, 4.0) and scale_ends([-2.0, -1.99])[0] < -2.1
    assert scale_ends([0.0, 0.0]) == (-0.5, 0.5)
    nearly = torch.full((20, 2, 4), 0.25) + 1e-4 * torch.randn(20, 2, 4)
    assert viz.relative_gates(nearly.numpy())[1].vmax == pytest.approx(math.log2(1.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = viz.panel_figure(Panel("matrix", "x", 48.999 + 1e-3 * torch.rand(20, 2), torch.arange(20)))
        entropy = viz.gate_entropy(torch.full((20, 2), math.log(49)) + 1e-5 * torch.randn(20, 2), torch.arange(20), 49)
        for f in (fig, entropy): f.canvas.draw()
    for ax in [*fig.axes, *entropy.axes]:
        for one in (ax.xaxis, ax.yaxis): assert one.get_offset_text().get_text() == ""
    low, high = entropy.axes[0].get_ylim()
    assert high / low > 1.2


def test_axes_show_values_and_no_offset():
    fig, axes = new_figure(1, 1, 3, 2)
    axes[0, 0].plot([0, 1], [48.9991, 48.9992])
    fig.canvas.draw()
    assert axes[0, 0].yaxis.get_offset_text().get_text() == ""


def test_ticks_are_round():
    assert tick_places((0, 999), 5) == [0, 200, 400, 600, 800]
    assert tick_places((9.2, -10.1)) == sorted(tick_places((9.2, -10.1)), reverse=True)
    assert time_axis("log-snr", ScheduleConfig("cosine", 100)).words(99).endswith("(t = 99)")
