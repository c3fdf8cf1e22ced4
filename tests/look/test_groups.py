"Runs that differ in their seed alone are one setting; two settings that make a grid are a map."
import math
import re
import shutil

import numpy as np
import pytest
from conftest import run_cells

from dmp_wb.core.paths import assets_folder
from dmp_wb.look import groups, tables


def runs(**keys):
    "label → config, one for each seed of each setting."
    return {f"{lr} {ratio} {seed}": {"optim.lr": lr, "methods.dtr.sharing_ratio": ratio, "seed": seed}
            for lr in keys.get("lr", [1e-3]) for ratio in keys.get("ratio", [0.8]) for seed in keys.get("seed", [0])}


def test_runs_that_differ_in_their_seed_are_one_setting():
    found = groups.settings_of(runs(lr=[1e-3, 3e-3], seed=[0, 1, 2]))
    assert [s.name for s in found] == ["lr 0.001", "lr 0.003"] and [len(s.labels) for s in found] == [3, 3]
    assert [len(s.labels) for s in groups.settings_of(runs(seed=[0, 1]))] == [2], "one setting of two seeds"


def test_settings_have_names_of_their_own():
    long = {f"r{i}": {"data.path": "x" * 200, "optim.lr": float(i)} for i in range(3)}
    assert [s.name for s in groups.settings_of(long)] == ["lr 0", "lr 1", "lr 2"]
    alike = {"a": {"optim.lr": 1.0, "train.lr": 2.0}, "b": {"optim.lr": 1.0}}
    assert len({s.name for s in groups.settings_of(alike)}) == 2


def test_means_have_a_deviation_where_there_are_seeds():
    assert groups.mean_of([1.0]) == (1.0, None)
    mean, deviation = groups.mean_of([1.0, 2.0, 3.0])
    assert mean == 2 and deviation == pytest.approx(1), "of a sample"
    assert groups.spoken(0.42345, 0.0312) == "0.423 ± 0.031" and groups.spoken(12.3, 4.2) == "12.3 ± 4.2"
    assert groups.spoken(1.0, 0.0) == "1 ± 0" and groups.spoken(1234.5, 120.0) == "1234 ± 120"


def test_the_table_has_a_row_a_setting_and_the_best_in_bold():
    configs = runs(lr=[1e-3, 3e-3], seed=[0, 1])
    results = {label: {"frechet": 2 + 1000 * c["optim.lr"] + c["seed"], "precision": c["optim.lr"]}
               for label, c in configs.items()}
    html = groups.settings_table(groups.settings_of(configs), results)
    assert "<b>3.50 ± 0.71</b>" in html and "5.50 ± 0.71" in html and "<b>0.003 ± 0</b>" in html
    del results["0.001 0.8 0"]["frechet"]   # one that could not be measured
    assert "<b>4</b>" in groups.settings_table(groups.settings_of(configs), results)


def test_two_settings_that_make_a_grid_are_a_map():
    configs = runs(lr=[1e-2, 1e-3], ratio=[0.6, 0.8], seed=[0, 1])
    results = {label: {"frechet": 1 + c["seed"] + 100 * c["optim.lr"]} for label, c in configs.items()}
    ax = groups.grid_map(groups.settings_of(configs), results, "frechet").axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.001", "0.01"], "by size"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.6", "0.8"]
    assert np.allclose(ax.images[0].get_array(), [[1.6, 1.6], [2.5, 2.5]])
    assert {t.get_text() for t in ax.texts} == {"1.60\n± 0.71", "2.50\n± 0.71"}


@pytest.mark.parametrize("configs", [runs(lr=[1, 2, 3, 4.0]), runs(seed=[0, 1, 2, 3]), {}, runs(lr=[1, 2.0])])
def test_what_is_no_grid_has_no_map(configs):
    results = {label: {"loss": 1.0} for label in configs}
    assert groups.grid_map(groups.settings_of(configs), results, "loss") is None


def test_names_of_settings_are_text():
    html = groups.settings_table(groups.settings_of({"<b>": {"optim.lr": 1}}), {"<b>": {"loss": math.pi}})
    assert "&lt;b&gt;" in html and "3.142" in html


def test_the_page_groups_seeds(runs_folder):
    for seed in (0, 1):
        folder = runs_folder / f"seed{seed}"
        shutil.copytree(assets_folder() / "digits-dmp", folder)
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(re.sub(r"^seed: .*", f"seed: {seed}", text, flags=re.M))
    found = run_cells("compare", runs=["seed0", "seed1"], run="one", num_images=0, num_loss_images=0)
    assert [s.labels for s in found["settings"]] == [("seed0", "seed1")]
    compared = tables.open_compared(["seed0", "seed1"])
    assert groups.results_of(compared)["seed0"].keys() >= {"loss"}
