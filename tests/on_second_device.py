"""What must hold where the model is on a GPU and the tensors of a user are not:
run by `test_second_device.py`, in a process of its own.

The device computes on the CPU and refuses to mix devices, so these tests need no GPU; and the figures are the CPU's.
"""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools" / "second_device"))
from second_device import DEVICE  # noqa: E402

from conftest import tiny_dit  # noqa: E402

import dmp_wb as wb  # noqa: E402
from dmp_wb.evaluation import distances
from dmp_wb.evaluation import evaluate
from dmp_wb.evaluation import extractors
from dmp_wb.evaluation import features as evaluation_features
from dmp_wb.tasks import affinity
from dmp_wb.tasks import intervals as tasks_intervals
from dmp_wb.diffusion import objectives
from dmp_wb.diffusion import sampling
from dmp_wb.diffusion import schedules
from dmp_wb.look import viz  # noqa: E402
from dmp_wb.core.errors import BadInput  # noqa: E402
from dmp_wb.look.explore import DenoiseExplorer, GateExplorer, RunExplorer, seen_x0  # noqa: E402

CPU = torch.device("cpu")
PAIRS = [(CPU, DEVICE), (DEVICE, CPU), (DEVICE, DEVICE)]
IMAGES = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.arange(24) % 10


def patched_dit(**changes):
    model = tiny_dit(**changes)
    wb.patch(model, wb.DMPConfig(init="random"))
    return model


def same(a, b): torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=1e-4, atol=1e-4)


def test_the_device_refuses_to_mix():
    with pytest.raises(RuntimeError, match="same device"): torch.ones(3, device=DEVICE) + torch.ones(3)
    assert torch.accelerator.current_accelerator() == torch.device("emu")


@pytest.mark.parametrize("a, b", PAIRS)
def test_extract_answers_where_the_images_are(a, b):
    network = evaluation_features.digit_classifier()
    expected = extractors.extract(network, IMAGES)
    found = extractors.extract(network.to(a), IMAGES.to(b))
    assert found.device == b
    same(found, expected)


@pytest.mark.parametrize("a, b", PAIRS)
def test_digits_are_measured_on_any_device(a, b):
    assert extractors.classifier_accuracy(IMAGES.to(a), LABELS.to(b)) == extractors.classifier_accuracy(IMAGES, LABELS)
    expected = extractors.evaluate_digits(IMAGES, LABELS)
    assert extractors.evaluate_digits(IMAGES.to(a), LABELS.to(b)) == pytest.approx(expected, rel=1e-4)
    features, strata = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), LABELS % 2
    intervals = lambda f, s: distances.frechet_bootstrap({"m": f}, features, strata=s, rounds=3)["m"]["interval"]
    assert intervals(features.to(a), strata.to(b)) == pytest.approx(intervals(features, strata))
    assert distances.bootstrap_mean(features[:, 0].to(a), 20, strata=strata.to(b)) == pytest.approx(
        distances.bootstrap_mean(features[:, 0], 20, strata=strata))


@pytest.mark.parametrize("place", [CPU, DEVICE])
def test_metrics_of_samples_on_any_device(place):
    settings = dict(metrics="fid,is,precision,density,kid", bootstrap=3, splits=2, cache=False, quiet=True,
                    strata=LABELS.to(place))
    found = evaluate.evaluate(IMAGES.to(place), -IMAGES.to(place), "digits", **settings)
    expected = evaluate.evaluate(IMAGES, -IMAGES, evaluation_features.digit_classifier(), "fid", cache=False,
                                 quiet=True)
    assert (found["fid"] == pytest.approx(expected["fid"], rel=1e-3)
            and found["intervals"].keys() == {"fid", "is", "precision", "density", "kid"})


@pytest.mark.parametrize("a, b", PAIRS)
@pytest.mark.parametrize("learned", [False, True])
def test_losses_where_the_models_answer_is(a, b, learned):
    output, t = torch.randn(24, 2 if learned else 1, 8, 8), torch.arange(24)
    noise = torch.randn(24, 1, 8, 8)
    expected = wb.diffusion_losses(output, IMAGES, noise, t, weighting="min-snr")
    for tables in ("linear", objectives.make_tables(), objectives.make_tables().to(DEVICE)):
        found = wb.diffusion_losses(output.to(a), IMAGES.to(b), noise.to(b), t, tables, weighting="min-snr")
        assert found["loss"].device == a
        for k in expected: same(found[k], expected[k])
        for where in (t, t.to(DEVICE)):
            assert wb.diffusion_losses(output.to(a), IMAGES.to(a), noise.to(a), where, tables)["loss"].device == a


@pytest.mark.parametrize("a, b", PAIRS)
def test_analysis_of_timesteps_on_any_device(a, b):
    t, clusters, losses = torch.arange(0, 1000, 50), schedules.timestep_intervals(1000, 4), torch.rand(20)
    assert schedules.snr("linear", t.to(a)).device == a
    same(schedules.snr("cosine", t.to(a)), schedules.snr("cosine", t))
    found = tasks_intervals.interval_losses(losses.to(a), t.to(b), clusters)
    assert found.device == a
    same(found, tasks_intervals.interval_losses(losses, t, clusters))
    values = schedules.snr().log()
    assert tasks_intervals.clusters_cost(values.to(a), clusters) == tasks_intervals.clusters_cost(values, clusters)
    assert tasks_intervals.timestep_clusters(values.to(a), 3) == tasks_intervals.timestep_clusters(values, 3)
    assert tasks_intervals.interval_of(t.to(a), clusters).device == a
    mask = wb.routing_mask(t.to(a), 64)
    assert mask.device == a and affinity.mask_overlap(mask).device == a
    # this device draws on the CPU
    assert tasks_intervals.balanced_timesteps(8, clusters, g := torch.Generator(a)).device == g.device
    assert affinity.spread_affinity(torch.eye(4, device=a), clusters).device == a
    x, output = IMAGES[:20].to(a), IMAGES[:20].to(b)
    assert sampling.posterior(output, x, t.to(b))[0].device == a


def test_pictures_of_tensors_on_a_device():
    t = torch.arange(0, 1000, 100, device=DEVICE)
    gates = torch.rand(10, 3, 16, device=DEVICE).softmax(-1)
    viz.gate_heatmaps(gates, t)
    viz.gate_entropy(-(gates * gates.log()).sum(-1), t, 16)
    viz.routing_masks({"dtr": wb.routing_mask(t, 64)}, t)
    viz.sample_grid(IMAGES.to(DEVICE).bfloat16())
    viz.compare_samples({"base": list(IMAGES.to(DEVICE)), "dmp": IMAGES.to(DEVICE)})
    viz.film_strip({"base": IMAGES[:4].to(DEVICE), "patched": IMAGES[4:8].to(DEVICE)}, t[:4])
    viz.timestep_affinities({"masks": affinity.mask_overlap(wb.routing_mask(t, 64))}, t)
    viz.loss_by_timestep(schedules.timestep_intervals(1000, 4),
                         {"base": torch.rand(4, device=DEVICE), "dmp": torch.rand(4)})
    viz.training_curves({"a": {"step": [1, 2], "mse": torch.rand(2, device=DEVICE)}})
    viz.prompt_similarity(torch.randn(3, 16, 8, device=DEVICE), gates)
    viz.gate_maps(gates, t, (4, 4))


@pytest.mark.parametrize("model", [patched_dit(), patched_dit(out_channels=2),
                                   wb.DiT(sample_size=8, in_channels=1, hidden_size=32, num_layers=1,
                                          num_attention_heads=2, num_classes=None)], ids=["dmp", "variance", "plain"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++", "heun"])
def test_images_are_those_of_the_cpu(model, sampler):
    settings = dict(num_images=3, sampler=sampler, num_inference_steps=3, quiet=True)
    expected = wb.sample(model.cpu(), **settings)
    same(wb.sample(model.to(DEVICE), **settings), expected)
    if model.config.num_classes:
        same(wb.sample(model, class_labels=torch.arange(3, device=DEVICE), **settings),
             wb.sample(model, class_labels=[0, 1, 2], **settings))
    model.cpu()


def test_routed_images_are_those_of_the_cpu():
    model = tiny_dit()
    wb.route(model)
    expected = wb.sample(model, 2, num_inference_steps=3, quiet=True)
    same(wb.sample(model.to(DEVICE), 2, num_inference_steps=3, quiet=True), expected)


def test_explorers_of_a_model_on_a_device():
    model = patched_dit().to(DEVICE)
    for image in (None, IMAGES[0], IMAGES[0].to(DEVICE)):
        explorer = GateExplorer(model, image)
        explorer.frame()
        explorer.static()
    explorer = DenoiseExplorer(model)
    explorer.frame()
    explorer.static()
    by_class = tiny_dit()
    wb.patch(by_class, wb.DMPConfig(gate_input="condition", init="random"))
    GateExplorer(by_class.to(DEVICE), IMAGES[0]).frame()
    x0 = seen_x0(model, IMAGES[:2], torch.tensor([3, 9]), objectives.make_tables(), class_labels=torch.tensor([1, 2]))
    assert x0.device == CPU


@pytest.mark.parametrize("overrides",
                         [[], ["routing.sharing_ratio=0.8"], ["method=dmp", "base=digits-base", "optim.lr=1e-3"],
                          ["multitask.method=uw", "multitask.k=2"]], ids=["pretrain", "dtr", "dmp", "uw"])
def test_a_run_trains_samples_and_is_measured(overrides, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    run = wb.train("digits-quick", ["name=second", "train.steps=3", "train.batch_size=8", "train.log_every=1",
                                    "train.cpu=false", *overrides])
    assert next(wb.load_model(run.folder).parameters()).device.type == DEVICE.type
    row = wb.evaluate_run(run.folder, 20, metrics="fid,is", num_inference_steps=2, splits=2, quiet=True)
    assert row["num_images"] == 20 and run.summary["evaluations"]
    folder = wb.sample_run(run.folder, 3, num_inference_steps=2, quiet=True)
    assert len(list(folder.glob("*.png"))) == 3
    RunExplorer([run.folder]).frame()


def test_affinities_of_a_model_on_a_device():
    settings = dict(clusters=schedules.timestep_intervals(1000, 2), quiet=True)
    expected = affinity.task_affinity(tiny_dit(), IMAGES[:4], LABELS[:4], **settings)
    same(affinity.task_affinity(tiny_dit().to(DEVICE), IMAGES[:4], LABELS[:4], **settings), expected)


def test_each_process_has_its_own_device(monkeypatch):
    from dmp_wb.store.run import usual_device
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert usual_device() == torch.device("emu:2")
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert usual_device() == torch.device("emu:1")
    monkeypatch.delenv("LOCAL_RANK")
    assert usual_device().type == "emu" and usual_device("cpu") == CPU
    for wrong in ("cuda:0", "emu:4", "gpu", 3.5):
        with pytest.raises(BadInput, match="device is"): usual_device(wrong)
