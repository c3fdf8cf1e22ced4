"""Feature extractors: the FID Inception in the published layout, DINOv2
and CLIP through transformers, digits, a network of one's own."""
import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.core.paths import project_root
from dmp_wb.data.load import load_data
from dmp_wb.evaluation.extractors import extract, load_extractor
from dmp_wb.evaluation.features import digit_classifier
from dmp_wb.evaluation.inception import (
    INCEPTION_FILES, inception_weights, InceptionFeatures, InceptionNetwork, resize_tf1,
)


def random_inception(seed=0):
    "Weights in the published layout, scaled so that activations neither vanish nor explode."
    g, state = torch.Generator().manual_seed(seed), {}
    for name, t in sorted(InceptionNetwork().state_dict().items()):
        if name.endswith("num_batches_tracked"): state[name] = torch.tensor(7)
        elif name.endswith("running_var"): state[name] = 0.5 + torch.rand(t.shape, generator=g)
        elif t.ndim == 4: state[name] = torch.randn(t.shape, generator=g) * (2 / t[0].numel()) ** 0.5
        elif t.ndim == 2: state[name] = torch.randn(t.shape, generator=g) * 0.05
        else: state[name] = torch.randn(t.shape, generator=g) * 0.1 + name.endswith("bn.weight")
    return state


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_inception(), file)
    return file


@pytest.fixture(scope="module")
def inception(weights_file): return InceptionFeatures(weights_file)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    "A machine without Inception's weights."
    monkeypatch.delenv("DMP_WB_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "nbs" / "experiments").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bytes_of(*shape, seed=1):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_inception_has_the_published_layout():
    "Names and shapes of every tensor, hashed from torch-fidelity 0.4.0's own network."
    state = InceptionNetwork().state_dict()
    lines = "\n".join(f"{k} {tuple(v.shape)}" for k, v in sorted(state.items()))
    assert len(state) == 566 and hashlib.sha256(lines.encode()).hexdigest()[:16] == "760681d791cb624e"


def test_inception_computes_what_torch_fidelity_computed(inception):
    "Outputs of torch-fidelity 0.4.0 with the same random weights on the same random bytes, recorded."
    out = inception(bytes_of(2, 3, 40, 40, seed=5).float() / 127.5 - 1)
    assert torch.allclose(out["features"][:, ::512].flatten(),
                          torch.tensor([2.69777, 0.12605, 0.62143, 0.69889, 2.70605, 0.13976, 0.59361, 0.6892]),
                          rtol=1e-3, atol=1e-4)
    assert torch.allclose(out["logits"][:, ::252].flatten(),
                          torch.tensor([-2.24787, -3.40743, 4.09808, 1.85604, -2.33567, -3.4421, 3.95685, 1.72262]),
                          rtol=1e-3, atol=1e-3)
    assert {k: tuple(v.shape) for k, v in out.items()} == {"features": (2, 2048), "spatial": (2, 2023),
                                                           "logits": (2, 1008)}


def test_inception_against_torch_fidelity(weights_file, inception):
    ref = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3",
                              exc_type=ImportError).FeatureExtractorInceptionV3
    ref, seen = ref("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights_file)), []
    ref.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.append(o))
    for shape in ((3, 3, 32, 32), (1, 3, 310, 299)):
        x = bytes_of(*shape)
        features, logits = ref(x)
        out = inception(x.float() / 127.5 - 1)
        for mine, theirs in ((out["features"], features), (out["logits"], logits),
                             (out["spatial"], seen[-1][:, :7].permute(0, 2, 3, 1).flatten(1))):
            assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_spatial_features_are_seven_channels_of_the_first_branch_of_mixed_6(inception):
    """TensorFlow's mixed_6 is the fourth block after the reduction to 17 × 17's first;
    its `conv` is the 1 × 1 branch; order H, W, C."""
    seen = {}
    hooks = [inception.network.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.update(o=o)),
             inception.network.Mixed_6d.register_forward_hook(lambda m, i, o: seen.update(shape=o.shape))]
    out = inception(bytes_of(1, 3, 64, 64).float() / 127.5 - 1)["spatial"]
    for h in hooks: h.remove()
    assert seen["o"].shape == (1, 192, 17, 17) and seen["shape"] == (1, 768, 17, 17)
    assert torch.equal(out.view(17, 17, 7)[3, 5], seen["o"][0, :7, 3, 5])


def test_resize_is_tensorflow_ones():
    "By the definition, pixel by pixel, for up- and downscaling and unequal sides."
    rng = np.random.default_rng(0)
    for height, width, size in ((8, 8, 13), (5, 9, 20), (40, 30, 11), (7, 7, 7), (1, 1, 4)):
        x = rng.normal(size=(height, width))
        want = np.zeros((size, size))
        for i in range(size):
            for j in range(size):
                y, z = i * height / size, j * width / size
                a, b = int(y), int(z)
                c, d = min(a + 1, height - 1), min(b + 1, width - 1)
                want[i, j] = (1 - y + a) * ((1 - z + b) * x[a, b] + (z - b) * x[a, d]) + (y - a) * (
                    (1 - z + b) * x[c, b] + (z - b) * x[c, d])
        assert np.allclose(resize_tf1(torch.tensor(x)[None, None], size)[0, 0], want, atol=1e-5)
    corner = resize_tf1(torch.tensor([[0.0, 1.0]])[None, None], 4)[0, 0, 0]
    # no half-pixel shift
    assert torch.allclose(corner, torch.tensor([0.0, 0.5, 1.0, 1.0]))
    assert not torch.allclose(corner,
                              F.interpolate(torch.tensor([[0.0, 1.0]])[None, None], (4, 4), mode="bilinear")[0, 0, 0])


def test_inception_preprocessing(inception):
    grey = bytes_of(2, 1, 16, 16).float() / 127.5 - 1
    # grey is RGB with equal channels
    assert torch.equal(inception(grey)["features"], inception(grey.expand(-1, 3, -1, -1))["features"])
    # 8 bits: less than half a level is nothing
    assert torch.equal(inception(grey + 0.003)["features"], inception(grey)["features"])
    assert not torch.equal(inception(grey * 0.9)["features"], inception(grey)["features"])
    assert not inception.training and not any(p.requires_grad for p in inception.parameters())


def test_inception_weights_are_found_where_the_docs_say(nowhere, monkeypatch, weights_file):
    with pytest.raises(MissingFile) as e: load_extractor("inception", "cpu")
    for part in (*INCEPTION_FILES, str(nowhere / "hub" / "checkpoints"), str(nowhere / "data"), "$DMP_WB_INCEPTION",
                 "curl -L", "https://github.com/toshas/torch-fidelity/releases"):
        assert part in str(e.value)
    assert "\n" not in str(e.value)
    (nowhere / "data").mkdir()
    (nowhere / "data" / INCEPTION_FILES[1]).write_bytes(weights_file.read_bytes())
    assert inception_weights() == project_root() / "data" / INCEPTION_FILES[1]
    (nowhere / "hub" / "checkpoints").mkdir(parents=True)
    (nowhere / "hub" / "checkpoints" / INCEPTION_FILES[0]).write_bytes(b"")
    # the hub's cache comes first
    assert inception_weights().parent == nowhere / "hub" / "checkpoints"
    with pytest.raises(BadInput, match="is damaged or no file of weights"): load_extractor("inception", "cpu")
    monkeypatch.setenv("DMP_WB_INCEPTION", str(weights_file))
    assert inception_weights() == weights_file and load_extractor("inception", "cpu").name == "inception"
    monkeypatch.setenv("DMP_WB_INCEPTION", str(nowhere / "gone.pth"))
    with pytest.raises(MissingFile, match=r"gone.pth, which \$DMP_WB_INCEPTION names"):
        load_extractor("inception", "cpu")
    with pytest.raises(MissingFile, match="no file .*other.pth"):
        load_extractor(f"inception:{nowhere / 'other.pth'}", "cpu")


class Trap:
    def __reduce__(self): return (print, ("code from a weights file ran",))


@pytest.mark.parametrize("damage,message", [
    (lambda s: {k: v for k, v in s.items() if k != "fc.weight"}, "1 tensors differ, first fc.weight"),
    (lambda s: {**s, "extra.weight": torch.zeros(1)}, "first extra.weight"),
    (lambda s: {**s, "fc.weight": torch.zeros(1000, 2048)}, "first fc.weight"),
    (lambda s: {**s, "fc.weight": "text"}, "first fc.weight"),
    (lambda s: [1, 2], "holds a list"),
    (lambda s: Trap(), "is damaged or no file of weights"),
], ids=["missing", "more", "torchvision", "text", "list", "pickle"])
def test_inception_refuses_other_files(damage, message, tmp_path, capsys):
    torch.save(damage({k: v for k, v in random_inception().items()}), tmp_path / "w.pth")
    with pytest.raises(BadInput, match=message) as e: InceptionFeatures(tmp_path / "w.pth")
    assert "\n" not in str(e.value) and "code from" not in capsys.readouterr().out


def test_inception_takes_old_files_without_counters(tmp_path, inception):
    torch.save({k: v for k, v in random_inception().items() if not k.endswith("num_batches_tracked")},
               tmp_path / "w.pth")
    x = bytes_of(1, 3, 8, 8).float() / 127.5 - 1
    old = InceptionFeatures(tmp_path / "w.pth")
    assert torch.equal(old(x)["logits"], inception(x)["logits"])


def test_cut_off_weights(weights_file, tmp_path):
    (tmp_path / "w.pth").write_bytes(weights_file.read_bytes()[:100_000])
    with pytest.raises(BadInput, match="is damaged or no file of weights") as e: InceptionFeatures(tmp_path / "w.pth")
    assert "\n" not in str(e.value)


def test_digits_are_the_shipped_classifier():
    images, e = load_data("digits").images[:50], load_extractor("digits", "cpu")
    assert torch.equal(e(images)["features"], digit_classifier().features(images)) and torch.equal(
        e(images)["logits"], digit_classifier()(images))
    assert (torch.equal(extract("digits", images), extract(digit_classifier(), images))
            and e.weights == load_extractor("digits", "cpu").weights)
    with pytest.raises(BadInput,
                       match="images are 3 × 32 × 32: expected 1 × 8 × 8 for the extractor digits; inception"):
        e.check((3, 32, 32))


def test_unknown_and_wrong_extractors():
    with pytest.raises(BadInput, match="unknown extractor 'incepton': did you mean 'inception'"):
        load_extractor("incepton")
    with pytest.raises(BadInput, match="extractor is a int"): load_extractor(3)
    with pytest.raises(BadInput, match="expected digits, whose weights ship"): load_extractor("digits:file.pth")


class Own(nn.Module):
    def forward(self, x): return x.flatten(1)


class OwnDict(nn.Module):
    def features(self, x): return {"features": x.flatten(1), "logits": x.mean((2, 3))}


def test_a_network_of_ones_own():
    x = torch.rand(4, 3, 5, 5)
    e = load_extractor(Own().train(), "cpu")
    assert (torch.equal(e(x)["features"], x.flatten(1)) and e.name == "Own" and not e.network.training
            and e.weights is None)
    assert set(load_extractor(OwnDict(), "cpu")(x)) == {"features"}
    assert load_extractor(digit_classifier(), "cpu").features(torch.zeros(2, 1, 8, 8)).shape == (2, 64)
    from dmp_wb.evaluation.features import ModuleFeatures
    assert set(load_extractor(ModuleFeatures(OwnDict(), ("features", "logits")), "cpu")(x)) == {"features", "logits"}
    with pytest.raises(BadInput, match="extractor Own gave \\['features'\\]: expected logits as well"):
        ModuleFeatures(Own(), ("features", "logits"))(x)


transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    "Tiny random models, as their owners would save them."
    root, small = tmp_path_factory.mktemp("vision"), dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                          image_size=28, patch_size=14)
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**small)).save_pretrained(root / "dinov2")
    clip = transformers.CLIPVisionConfig(**small, intermediate_size=64, projection_dim=24)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(root / "clip-vision")
    text = transformers.CLIPTextConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                       vocab_size=50, projection_dim=24)
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text.to_dict(), vision_config=clip.to_dict(),
                                                   projection_dim=24)).save_pretrained(root / "clip")
    for name, side in (("dinov2", {"height": 42, "width": 42}), ("clip", 28)):
        facts = {"image_processor_type": "CLIPImageProcessor", "crop_size": side, "size": {"shortest_edge": 64},
                 "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        (root / name / "preprocessor_config.json").write_text(__import__("json").dumps(facts))
    return root


@pytest.mark.parametrize("family,folder,width,size",
                         [("dinov2", "dinov2", 32, 42), ("clip", "clip", 24, 28), ("clip", "clip-vision", 24, 28)])
def test_vision_models(vision, family, folder, width, size):
    e = load_extractor(f"{family}:{vision / folder}", "cpu")
    assert (e.width, e.size, e.gives) == (width, size, ("features",)) and not e.training and not any(
        p.requires_grad for p in e.parameters())
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = F.interpolate((images + 1) / 2, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]) if folder != "clip-vision"
                 else ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
    x = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    # the normalised class token
    if family == "dinov2": want = transformers.Dinov2Model.from_pretrained(vision / folder)(x).pooler_output
    elif folder == "clip":
        want = (m := transformers.CLIPModel.from_pretrained(vision / folder)).visual_projection(
            m.vision_model(x).pooler_output)
    else: want = transformers.CLIPVisionModelWithProjection.from_pretrained(vision / folder)(x).image_embeds
    assert torch.allclose(e.features(images), want, atol=1e-5)
    assert torch.equal(e.features(images[:, :1]), e.features(images[:, :1].expand(-1, 3, -1, -1)))


def test_bicubic_is_pillows(vision):
    "What the models' own processors do, to the rounding of 8 bits."
    from PIL import Image
    x = bytes_of(1, 3, 50, 50)
    pil = np.asarray(Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((28, 28), Image.Resampling.BICUBIC),
                     dtype=float)
    ours = F.interpolate(x.float() / 255, (28, 28), mode="bicubic",
                         antialias=True).clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(pil - ours).max() < 1.6 and np.abs(pil - ours).mean() < 0.5   # Pillow rounds after each direction


def test_vision_fingerprint_tells_preprocessing_apart(vision, tmp_path):
    import shutil
    shutil.copytree(vision / "clip", tmp_path / "clip")
    one, same = (load_extractor(f"clip:{p}", "cpu").weights for p in (vision / "clip", tmp_path / "clip"))
    facts = (tmp_path / "clip" / "preprocessor_config.json").read_text()
    (tmp_path / "clip" / "preprocessor_config.json").write_text(facts.replace("0.5", "0.6"))
    assert one == same != load_extractor(f"clip:{tmp_path / 'clip'}", "cpu").weights


def test_vision_models_that_are_not_there_or_of_another_family(vision, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="extractor clip cannot be loaded from .*found a dinov2") as e:
        load_extractor(f"clip:{vision / 'dinov2'}", "cpu")
    assert "\n" not in str(e.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="extractor dinov2 cannot be loaded from") as e:
        load_extractor(f"dinov2:{tmp_path / 'empty'}", "cpu")
    assert "\n" not in str(e.value)
    with pytest.raises(BadInput, match="hf download facebook/dinov2-large") as e: load_extractor("dinov2", "cpu")
    assert "\n" not in str(e.value)
    import shutil
    shutil.copytree(vision / "dinov2", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(BadInput, match="extractor dinov2 cannot be loaded") as e:
        load_extractor(f"dinov2:{tmp_path / 'cut'}", "cpu")
    assert "\n" not in str(e.value)


@pytest.mark.filterwarnings("ignore:(fid|sfid) from")
def test_inception_statistics_are_kept_whole(weights_file, runs_folder, monkeypatch):
    """All three outputs of Inception through the cache;
    sFID of shuffled patches sees what pooled features do not need to."""
    from dmp_wb.evaluation.evaluate import evaluate
    from dmp_wb.evaluation.statistics import reference_statistics
    e, real, fake = (load_extractor(f"inception:{weights_file}", "cpu"), bytes_of(9, 3, 16, 16),
                     bytes_of(8, 3, 16, 16, seed=2))
    from dmp_wb.evaluation.images import Images
    opened = Images("bytes", 9, (3, 16, 16), real.split, lambda: "nine")
    first = reference_statistics(opened, e, quiet=True)
    monkeypatch.setattr("dmp_wb.evaluation.statistics.collect", lambda *a, **kw: pytest.fail("computed again"))
    again = reference_statistics(opened, e, quiet=True)
    monkeypatch.undo()
    assert again.rows.shape == (9, 2048) and again.spatial.width == 2023 and torch.allclose(again.spatial.covariance,
                                                                                            first.spatial.covariance)
    row = evaluate(fake, again, e, metrics="sfid kid is precision", splits=2, quiet=True)
    assert set(row) == {"sfid", "kid", "kid_std", "is", "is_std", "precision", "num_images", "num_reference",
                        "extractor"} and row["sfid"] > 0 and row["extractor"] == "inception"
