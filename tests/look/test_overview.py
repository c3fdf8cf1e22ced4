"The page of all runs: every run with its state, safe against what names and files may hold, and readable offline."
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dmp_wb.cli import app
from dmp_wb.core.errors import BadInput
from dmp_wb.core.paths import assets_folder
from dmp_wb.look import overview, viz

EVIL = "<img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.pictures = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        assert not any(name.startswith("on") for name in attrs), attrs
        if tag == "a": self.links.append(attrs["href"])
        if tag == "img": self.pictures.append(attrs)


@pytest.fixture
def runs(runs_folder):
    "Two shipped runs as one's own, one with samples and a figure."
    for name in ("digits-base", "digits-dmp"): shutil.copytree(assets_folder() / name, runs_folder / name)
    grid = Image.fromarray(np.zeros((500, 900, 3), np.uint8))
    for file in ("samples/step-0000100.png", "samples/step-0000200.png", "figures/gates.png"):
        (runs_folder / "digits-dmp" / file).parent.mkdir(exist_ok=True)
        grid.save(runs_folder / "digits-dmp" / file)
    (runs_folder / "digits-dmp" / "run.html").write_text("page")
    return runs_folder


def page(folder, **kwargs): return overview.write_overview(folder, **kwargs).read_text(encoding="utf-8")


def test_every_run_has_its_state_results_pictures_and_links(runs):
    text = page(runs)
    seen = Tags(text)
    assert text.count('<span class="state') == 2 and "loss" in text
    assert seen.links.count("digits-dmp/run.html") == 1 and "digits-base" in seen.links
    assert [p["alt"] for p in seen.pictures] == ["digits dmp: step 0000200", "digits dmp: gates"]
    assert viz.run_colours(["digits-base", "digits-dmp"])["digits-dmp"] in text
    for link in seen.links: assert (runs / link).exists(), link


def test_results_have_words_for_names(runs):
    file = runs / "digits-dmp" / "summary.json"
    file.write_text(json.dumps({
        **json.loads(file.read_text()), "validation_loss": 0.25, "evaluations": [{"fid": 3.0, "extractor": "digits"}]}))
    text = page(runs)
    assert "held-out loss <b>0.25</b>" in text and "FID <b>" in text and "validation_loss" not in text
    assert f"<h1>Runs in {runs.parent.name}/{runs.name}</h1>" in text


def test_the_page_asks_for_nothing_and_runs_nothing(runs):
    text = page(runs)
    assert "default-src 'none'" in text and "<script" not in text and "@media (prefers-color-scheme: dark)" in text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text) and "url(" not in text
    assert all(p["src"].startswith("data:image/png;base64,") for p in Tags(text).pictures)


def test_names_are_text_whatever_they_hold(runs):
    shutil.copytree(runs / "digits-base", runs / EVIL)
    shutil.copytree(runs / "digits-base", runs / "javascript:alert(1)")
    (runs / "torn").mkdir()
    (runs / "torn" / "config.yaml").write_text(f"a: {EVIL}: [")
    text = page(runs)
    seen = Tags(text)
    assert EVIL not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    assert not any(link.startswith("javascript:") for link in seen.links)
    assert "Left out" in text and "torn" in text


def test_files_that_are_no_pictures_are_passed_over(runs, tmp_path):
    figures = runs / "digits-dmp" / "figures"
    (figures / "gates.png").write_text("no picture")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "private.png")
    (figures / "masks.png").symlink_to(tmp_path / "private.png")
    assert len(Tags(page(runs)).pictures) == 1


def test_the_command_writes_it_with_conditions(runs, tmp_path):
    done = CliRunner().invoke(app, ["list", "name=digits-dmp", "--html"])
    assert done.exit_code == 0, done.output
    assert (runs / "index.html").read_text(encoding="utf-8").count('<span class="state') == 1
    assert "index.html" in done.output
    with pytest.raises(BadInput, match="is no folder"): overview.write_overview(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "No runs yet" in page(tmp_path / "empty")
