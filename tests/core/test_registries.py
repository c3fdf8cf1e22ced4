"One registration makes a metric, an extractor or a sampler known everywhere."
import os
import subprocess
import sys

import pytest
import torch

import dmp_wb as wb
from dmp_wb.core import registries
from dmp_wb.core.errors import BadInput
from dmp_wb.core.registries import EXTRACTORS, METRICS, register_extractor, register_metric
from dmp_wb.core.settings import FLOW_SAMPLERS, SamplingConfig, SAMPLERS
from dmp_wb.diffusion.schedules import register_sampler

REAL, FAKE = (torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n)).clamp(-1, 1) for n in (40, 30))


@pytest.fixture(autouse=True)
def as_they_were():
    tables = (METRICS, EXTRACTORS, SAMPLERS)
    before = [dict(t) for t in tables]
    yield
    for table, old in zip(tables, before): table.clear(); table.update(old)
    FLOW_SAMPLERS.intersection_update({"flow-euler"})


def nearest(given): return torch.cdist(given.samples.rows, given.real.rows).min(1).values


def test_a_metric_of_ones_own_is_measured_with_an_interval_and_known_to_tables():
    register_metric("nearest", nearest, label="nearest", better="higher")
    row = wb.evaluate(FAKE, REAL, metrics="nearest", bootstrap=10, quiet=True)
    low, high = row["intervals"]["nearest"]
    assert low < row["nearest"] < high and not registries.lower_is_better("nearest")
    from dmp_wb.look import tables
    assert "nearest ↑" in tables.metrics_table({"a": row, "b": row | {"nearest": 0.0}}, ["a", "b"])
    from dmp_wb.store.listing import newest_metrics
    assert newest_metrics({"evaluations": [row]}) == {"nearest": row["nearest"]}


def test_a_metric_may_give_a_number_a_spread_and_an_interval():
    register_metric("two", lambda given: (2.0, 0.5), interval=lambda given, value: (value - 1, value + 1))
    register_metric("one", lambda given: 1)
    row = wb.evaluate(FAKE, REAL, metrics=["two", "one"], bootstrap=5, quiet=True)
    assert (row["two"], row["two_std"], row["one"], row["intervals"]) == (2.0, 0.5, 1.0, {"two": [1.0, 3.0]})
    register_metric("word", lambda given: "much")
    with pytest.raises(BadInput, match="metric word gave a str: expected a number"):
        wb.evaluate(FAKE, REAL, metrics="word", quiet=True)


def test_a_name_is_given_once_and_the_same_function_may_come_again():
    for _ in range(2): register_metric("nearest", nearest)
    with pytest.raises(BadInput, match="the metric 'fid' is registered already: expected another name"):
        register_metric("fid", nearest)
    with pytest.raises(BadInput, match="better is 'more' for metric m: expected lower or higher"):
        register_metric("m", nearest, better="more")
    with pytest.raises(BadInput, match="needs is 'pixels' for metric m"): register_metric("m", nearest, needs="pixels")
    with pytest.raises(BadInput, match="the name of a metric is 'a b'"): register_metric("a b", nearest)
    with pytest.raises(BadInput, match="unknown setting of evaluate 'bootstraps': did you mean 'bootstrap'"):
        wb.evaluate(FAKE, REAL, bootstraps=3)


def test_an_extractor_of_ones_own_is_known_by_its_name():
    register_extractor("pixels", lambda: torch.nn.Flatten())
    assert "fid" in wb.evaluate(FAKE, REAL, "pixels", "fid", quiet=True)
    with pytest.raises(BadInput, match="expected pixels, with nothing after it"): wb.load_extractor("pixels:file")


def test_a_sampler_of_diffusers_is_known_by_a_name():
    register_sampler("ancestral", "EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    model = wb.load_model("digits-base", device="cpu")
    draw = lambda **more: wb.sample(model, 2, sampler="ancestral", num_inference_steps=3, quiet=True, **more)
    assert draw().isfinite().all() and torch.equal(draw(), draw()) and not torch.equal(draw(), draw(seed=1))
    with pytest.raises(BadInput, match="expected a scheduler of diffusers"): register_sampler("x", "EulerScheduler")
    with pytest.raises(BadInput, match="the sampler 'ddim' is registered already"):
        register_sampler("ddim", "DDPMScheduler")


def test_presets_are_names_for_settings_that_keywords_come_before():
    model = wb.load_model("digits-base", device="cpu")
    settings = dict(num_inference_steps=3, quiet=True)
    by_hand = wb.sample(model, 2, guidance_scale=1.5, sampler="dpmsolver++", **settings)
    assert torch.equal(wb.sample(model, 2, preset="fast", **settings), by_hand)
    assert torch.equal(wb.sample(model, 2, config=SamplingConfig.of("fast", num_inference_steps=3), quiet=True),
                       by_hand)
    assert SamplingConfig.of("papers") == SamplingConfig("ddpm", 250, 1.5)
    with pytest.raises(BadInput, match="unknown preset 'fats': did you mean 'fast'"): wb.sample(model, 2, preset="fats")
    with pytest.raises(BadInput, match="unknown setting of sampling 'sampeler': did you mean 'sampler'"):
        wb.sample(model, 2, sampeler="ddim")


def test_a_file_of_ones_own_is_known_to_the_command(tmp_path):
    (tmp_path / "mine.py").write_text("from dmp_wb.core.registries import register_metric\n"
                                      "register_metric('zero', lambda given: 0.0)\n")
    done = subprocess.run([sys.executable, "-m", "dmp_wb", "evaluate", "no-such-run", "--metrics", "zero"],
                          env={**os.environ, "DMP_WB_PLUGINS": str(tmp_path / "mine.py")}, capture_output=True,
                          text=True)
    assert "unknown metric" not in done.stderr and "no-such-run" in done.stderr and done.returncode == 2
