"""The docs site in a real browser, from its built files:
search, links, pictures, both widths, both colour schemes, and not one request to the outside.

Needs `make docs` before, which CI runs, and a Chromium (Debian: apt-get install chromium).
Without them the tests are skipped, but not where $DMP_WB_REQUIRE_BROWSER is set, as in CI.
Screenshots go to $DMP_WB_SCREENSHOTS where it is set.
"""
import os
import re
import sys
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import needs_browser

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_docs"
if os.environ.get("DMP_WB_REQUIRE_BROWSER") and not (SITE / "index.html").exists():
    raise RuntimeError("no site: make docs")
pytestmark = [needs_browser, pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no site: make docs")]

SIZES = {"desktop": (1440, 900), "phone": (390, 844)}
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html")) if SITE.exists() else []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture
def visit(browser, url):
    """visit(path, size, scheme) → a page;
    at the end nothing may have been complained about, and nothing asked of another host."""
    contexts, faults = [], []

    def at(path="index.html", size="desktop", scheme="light"):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: faults.append(f"{page.url}: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: faults.append(f"{page.url}: {e}"))
        page.on("request", lambda r: faults.append(f"{page.url} asks for {r.url}")
                if not r.url.startswith((url, "data:", "blob:")) else None)
        page.on("response", lambda r: faults.append(f"{r.url}: {r.status}") if r.status >= 400 else None)
        page.goto(url + path, wait_until="load")
        return page
    yield at
    for context in contexts: context.close()
    assert not faults, "\n".join(faults)


def shot(page, name):
    if os.environ.get("DMP_WB_SCREENSHOTS"):
        page.screenshot(path=Path(os.environ["DMP_WB_SCREENSHOTS"]) / f"site-{name}.png")


LOOK = """async () => {
    for (const img of document.images) img.loading = 'eager';
    await Promise.all([...document.images].map(i => i.decode().catch(() => null)));
    const wide = [...document.querySelectorAll('article *')].filter(e =>
        e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest('pre, .table-wrapper, .cell_output, mjx-container, .math, .highlight'));
    const broken = [...document.images].filter(i => !i.naturalWidth).map(i => i.src);
    return {width: document.documentElement.scrollWidth, viewport: innerWidth, broken,
            pictures: document.images.length, wide: wide.map(e => e.tagName + '.' + e.className).slice(0, 3)};
}"""


@pytest.mark.parametrize("size", SIZES)
def test_every_page_fits_and_its_pictures_load(visit, url, size):
    page, pictures = visit("index.html", size), 0
    for path in PAGES:
        page.goto(url + path, wait_until="load")
        seen = page.evaluate(LOOK)
        assert not seen["broken"], (path, seen)
        assert seen["width"] <= seen["viewport"] and not seen["wide"], (path, seen)
        pictures += seen["pictures"]
    assert len(PAGES) > 40 and pictures > 40


def test_search_finds_names_and_words(visit):
    page = visit()
    page.fill("input[name=q]", "load_patch")
    page.press("input[name=q]", "Enter")
    page.wait_for_selector("#search-results li")
    results = page.locator("#search-results li > a")
    names = results.all_inner_texts()
    assert any("load_patch" in n for n in names), names
    results.nth(next(i for i, n in enumerate(names) if re.search(r"\bload_patch\b", n))).click()
    page.wait_for_load_state()
    assert "reference/methods.dmp.html" in page.url and "load_patch" in page.url
    assert page.locator("[id='dmp_wb.load_patch']").is_visible()
    page.fill("input[name=q]", "timestep embedding")
    page.press("input[name=q]", "Enter")
    page.wait_for_selector("#search-results li")
    page.wait_for_function("document.querySelectorAll('#search-results li > a').length > 5")
    shot(page, "search")


def test_links_lead_from_prose_and_code_to_the_reference_and_back_to_the_source(visit):
    page = visit("howto/patches.html")
    page.locator("article p a.reference:has(code)", has_text="unpatch").first.click()
    page.wait_for_url("**/reference/methods.patches.html#dmp_wb.unpatch")
    entry = page.locator("dl", has=page.locator("[id='dmp_wb.unpatch']"))
    entry.locator("a", has_text="methods/08_patches").first.click()
    page.wait_for_url("**/source/methods/08_patches.html#source-methods-patches-unpatch")
    assert page.locator("#source-methods-patches-unpatch").count() == 1
    dit = "article pre a[href$='reference/models.dit.html#dmp_wb.DiT']:visible"
    page.locator(dit).first.click()
    page.wait_for_url("**/reference/models.dit.html#dmp_wb.DiT")


def test_dark_mode_toggles_and_stays(visit, url):
    page = visit("source/look/02_gates.html", scheme="light")
    background = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = background()
    for _ in range(3):
        if page.evaluate("document.body.dataset.theme") == "dark": break
        page.locator(".theme-toggle:visible").first.click()
    assert page.evaluate("document.body.dataset.theme") == "dark" and background() != light
    page.goto(url + "index.html")
    assert page.evaluate("document.body.dataset.theme") == "dark", "the choice is lost on another page"
    dark = visit("source/look/02_gates.html", scheme="dark")
    assert (dark.evaluate("getComputedStyle(document.querySelector('.cell_output img')).backgroundColor")
            == "rgb(255, 255, 255)"), "figures are drawn on white"
    shot(dark, "dark")


def test_maths_is_typeset_without_a_network(visit):
    page = visit("concepts/dmp.html" if (SITE / "concepts" / "dmp.html").exists() else "source/methods/07_prompts.html")
    page.wait_for_selector("mjx-container svg")
    assert page.locator("mjx-container").count() == page.locator(".math").count()
    assert page.locator("mjx-merror").count() == 0


def test_phone_has_menu_and_copy_button(visit):
    page = visit("source/methods/07_prompts.html", "phone")
    assert not page.locator(".sidebar-drawer").first.evaluate("e => e.getBoundingClientRect().left >= 0")
    page.locator("label[for='__navigation']:visible").first.click()
    page.wait_for_function("document.querySelector('.sidebar-drawer').getBoundingClientRect().left >= 0")
    shot(page, "phone-menu")
    page.locator(".overlay.sidebar-overlay").click(position={"x": 380, "y": 400})
    assert page.locator("button.copybtn").count() > 5


def test_hidden_cells_and_directives_are_not_on_pages():
    for path in PAGES:
        text = re.sub(r"<[^>]+>", "", (SITE / path).read_text(encoding="utf-8"))
        assert not re.search(r"^#\| ?\w|\bnbdev_export\(\)|\bshow_doc\(|default_exp ", text, re.M), path


def test_every_public_name_has_an_anchor_and_stands_in_our_inventory():
    import dmp_wb
    raw = (SITE / "objects.inv").read_bytes()
    entries = {line.split()[0]: line.split()
               for line in zlib.decompress(raw.split(b"zlib.\n", 1)[1]).decode().splitlines()}
    for name in dmp_wb._PUBLIC:
        kind, page = entries[f"dmp_wb.{name}"][1], entries[f"dmp_wb.{name}"][3].split("#")[0]
        assert kind.startswith("py:") and f'id="dmp_wb.{name}"' in (SITE / page).read_text(encoding="utf-8"), name
    assert entries["optim.lr"][1] == "std:confkey" and entries["cli-train"][1] == "std:label"


def test_reference_tells_parameters_defaults_errors_and_links_types():
    page = (SITE / "reference" / "methods.dmp.html").read_text(encoding="utf-8")
    entry = page[page.index('id="dmp_wb.patch"'):page.index('id="dmp_wb.load_patch"')]
    text = re.sub(r"<[^>]+>", "", entry)
    assert ("a supported backbone" in text and "the paper’s settings if None" in text
            and "Raises BadInput if there is a patch of that name already" in text and "Returns PromptPatch" in text)
    assert ("docs.pytorch.org/docs/stable/generated/torch.nn.Module.html" in entry
            and 'href="methods.settings.html#dmp_wb.DMPConfig"' in entry)


def test_inventories_are_what_their_list_says():
    import subprocess
    done = subprocess.run([sys.executable, ROOT / "docs" / "make_inventories.py", "--check"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_checker_finds_what_is_wrong(tmp_path, monkeypatch, capsys):
    """A link to nowhere, an anchor that is not there, a request to the
    outside, a misspelt word, a directive, a page that is too large."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import check
    check.read.cache_clear()
    monkeypatch.setattr(check, "OUT", tmp_path)
    monkeypatch.setattr(check, "MAX_PAGE", 2000)
    (tmp_path / "index.html").write_text(
        '<article><p id="a">We recieve <a href="no.html">x</a><a href="#b">y</a><a href="#a">z</a><a '
        'href="https://arxiv.org/abs/12">p</a>'
        '<a href="https://arxiv.org/abs/2405.17825">q</a></p><pre>\n#| export\nteh code</pre><script '
        'src="https://cdn.example.org/x.js"></script></article>' + " " * 2000, encoding="utf-8")
    assert check.main() == 1
    said = capsys.readouterr().err.splitlines()
    for part in ("links no.html", "links #b", "abs/12", "loads https://cdn.example.org/x.js", "recieve ==> receive",
                 "shows '#| export'", "index.html has"):
        assert sum(part in line for line in said) >= 1, (part, said)
    assert not any("2405.17825" in line or "teh" in line or "#a" in line.split() for line in said)
    check.read.cache_clear()
