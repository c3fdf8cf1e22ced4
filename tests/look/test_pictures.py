"Curves and gate pictures that say what they show, however little there is to show."
import re

import numpy as np
import pytest
from matplotlib.ticker import NullFormatter

from dmp_wb.look import viz


def curve(steps, values, **kwargs):
    figure = viz.training_curves({"mine": {"step": steps, "mse": values}}, **kwargs)
    figure.draw_without_rendering()
    return figure.axes[0]


def ticks(axis) -> list[str]:
    low, high = sorted(axis.get_view_interval())
    return [label.get_text() for at, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels())
            if low <= at <= high]


def test_one_logged_row_draws_a_mark_at_a_whole_step():
    ax = curve([7], [0.3])
    assert ax.lines[-1].get_marker() == "o" and ax.get_xlim()[0] < 7 < ax.get_xlim()[1]
    assert ticks(ax.xaxis) == ["6", "7", "8"]


def test_few_rows_draw_marks_and_many_a_line():
    assert curve(range(5), np.linspace(1, 2, 5)).lines[-1].get_marker() == "o"
    assert curve(range(500), np.linspace(1, 2, 500)).lines[-1].get_marker() in ("None", None)


def test_a_value_between_missing_ones_is_seen():
    nan = float("nan")
    assert curve([1, 2, 3], [nan, 0.5, nan]).lines[-1].get_marker() == "o"
    curve([1, 2], [nan, nan])   # nothing to see, and no error


@pytest.mark.parametrize("values", [[0.3, 0.3, 0.3], [0.3, 0.3001, 0.2999]])
def test_a_loss_that_stands_still_is_not_blown_up(values):
    low, high = curve([1, 2, 3], values).get_ylim()
    assert low < 0.3 < high and high - low >= 0.05 * 0.29


def test_steps_are_whole_numbers():
    for steps in ([100, 200, 300, 400], [0, 1, 2], range(0, 200_000, 1000)):
        shown = ticks(curve(steps, np.linspace(1, 2, len(steps))).xaxis)
        assert len({*shown}) == len(shown) >= 2 and all(re.fullmatch(r"[\d,]+", s) for s in shown), shown


def test_a_long_title_is_wrapped_to_its_figure():
    title = "sweep/optim.lr=0.0001-train.steps=1000-seed=3 " * 4
    for figure in (viz.training_curves({"a": {"step": [1], "mse": [1]}}, title=title),
                   viz.gate_heatmaps(np.full((4, 1, 2), 0.5), range(4), title=title)):
        renderer = figure._get_renderer()
        figure.draw_without_rendering()
        texts = [*figure.texts, *([figure._suptitle] if figure._suptitle else []), figure.axes[0].title]
        for text in texts:
            box = text.get_window_extent(renderer)
            assert box.width <= figure.bbox.width + 1, text.get_text()


def test_a_run_has_one_colour_on_every_page():
    together, alone = viz.run_colours(["digits-base", "digits-dmp", "mine", "b"]), viz.run_colours(["mine"])
    assert together["mine"] == alone["mine"]
    assert together["digits-dmp"] == viz.method_colour("dmp") and together["digits-base"] == viz.method_colour("base")
    many = viz.run_colours([f"run{i}" for i in range(16)])
    assert len({*many.values()}) == 16, "those of a picture differ"
    line = viz.training_curves({"mine": {"step": [1], "mse": [1]}}).axes[0].lines[-1]
    assert line.get_color() == alone["mine"]
    assert viz.run_colours(["mine"], {"mine": "#123456"}) == {"mine": "#123456"}


def gates(*share):   # of prompt 0 of two, over timesteps
    return np.array([[[s, 1 - s]] for s in share])


def test_the_verdict_says_whether_gates_are_uniform():
    assert viz.gate_verdict(gates(0.5, 0.51, 0.495), range(3)) == "Gates are uniform within 2 %."
    assert viz.gate_verdict(np.full((3, 2, 4), 0.25), range(3)) == "Gates are uniform within 0.1 %."


def test_the_verdict_names_the_largest_change_and_its_timesteps():
    said = viz.gate_verdict(gates(0.4, 0.5, 0.8), [0, 300, 999])
    assert said == "Gates change by up to 3.00 × between t = 0 and t = 999 (block 0, prompt 1)."
    assert "(middle, prompt 1)" in viz.gate_verdict(gates(0.4, 0.8), [0, 9], blocks=["middle"])
    assert "by more than 500 ×" in viz.gate_verdict(gates(1.0, 0.0), [0, 9])
    assert viz.gate_verdict(gates(0.8, 0.8), [0, 9]) == "Gates are the same at all timesteps, up to 1.6 × uniform."


def test_the_verdict_leaves_out_prompts_that_no_timestep_uses():
    hardly = np.array([[[1 - s - 1e-3, 1e-3, s]] for s in (1e-3, 1e-2)])   # a tenfold change of next to nothing
    assert viz.gate_verdict(hardly, [0, 9]).startswith("Gates are the same at all timesteps")


def test_a_loss_by_timestep_has_plain_numbers_at_its_ticks():
    def ticks(values):
        figure = viz.loss_by_timestep([(0, 499), (500, 999)], {"base": values})
        figure.draw_without_rendering()
        ax = figure.axes[0]
        return ax.get_yscale(), [t.get_text() for t in ax.get_yticklabels() if t.get_text()]
    assert ticks([0.25, 0.6])[0] == "linear"   # too narrow for a logarithm, whose ticks would be 3 and 4 × 10⁻¹
    scale, words = ticks([0.01, 0.3])
    assert scale == "log" and {"0.02", "0.05", "0.1"} <= set(words)


def test_the_verdict_counts_the_prompts_that_a_block_has():
    padded = np.zeros((3, 2, 4))
    padded[:, 0], padded[:, 1, :2] = 0.25, 0.5
    assert viz.gate_verdict(padded, range(3), counts=[4, 2]) == "Gates are uniform within 0.1 %."


def test_gate_pictures_carry_the_verdict_and_the_names_of_blocks():
    figure = viz.gate_heatmaps(np.tile(gates(0.4, 0.8), (1, 2, 1)), [0, 999], blocks=["down 0", 3])
    assert [ax.get_title() for ax in figure.axes[:2]] == ["down 0", "block 3"]
    assert figure._supxlabel.get_text().replace("\n", " ").startswith("Gates change by up to 3.00 ×")
    assert not isinstance(figure.axes[0].xaxis.get_major_formatter(), NullFormatter)
