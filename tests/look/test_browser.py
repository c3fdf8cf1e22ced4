"""JupyterLab in a real browser: the explorers' tutorial is run, sliders are moved by keyboard and maps by the mouse,
pictures change, everything has a name, and nothing is complained about.

Needs a Chromium on the machine (Debian: apt-get install chromium).
Without one the tests are skipped, but not where $DMP_WB_REQUIRE_BROWSER is set, as in CI.
Screenshots go to $DMP_WB_SCREENSHOTS, or to pytest's folder.
"""
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import needs_browser

pytestmark = needs_browser
ROOT = Path(__file__).parents[2]
EXPLORERS = ("GateExplorer(", "RoutingExplorer(", "DenoiseExplorer(", "RunExplorer(")
# a larger model, with a patch whose gates differ from timestep to timestep
FASHION = """import torch, dmp_wb as wb
from dmp_wb.look.explore import DenoiseExplorer, GateExplorer
model = wb.load_model("fashion-base", device="cpu")
patch = wb.patch(model, wb.DMPConfig(init="random"))
with torch.no_grad(): patch.gate.weight.normal_(std=1.0)
GateExplorer(model, image=torch.zeros(1, 28, 28))
#--
DenoiseExplorer(model)"""

# from the input event to the frame after the new picture has been decoded
WATCH = """(picture) => {
    window.found = [];
    let begun = 0;
    window.watching?.disconnect();
    window.listening?.abort();
    window.listening = new AbortController();
    const begin = (e) => { if (e.type === 'keydown' || e.buttons) begun ||= performance.now(); };
    for (const type of ['keydown', 'pointermove']) 
        document.addEventListener(type, begin, {capture: true, signal: window.listening.signal});
    window.watching = new MutationObserver(async () => {
        const since = begun;
        if (!since) return;
        begun = 0;
        await picture.decode();
        requestAnimationFrame(() => window.found.push(performance.now() - since));
    });
    window.watching.observe(picture, {attributes: true, attributeFilter: ['src']});
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "JupyterLab on a free port of the loopback, with a token; one folder for notebooks and settings."
    folder, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    shutil.copy(ROOT / "nbs" / "tutorials" / "explore.ipynb", folder / "explore.ipynb")
    cells = [nbformat.v4.new_code_cell(code) for code in FASHION.split("\n#--\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "fashion.ipynb")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder / "config"),
           "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
           "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
           "DMP_WB_RUNS": str(folder / "runs"), "IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT)}
    log = open(folder / "server.log", "w")   # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
         f"--ServerApp.root_dir={folder}", "--LabApp.news_url=",
         "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.collaborative=False"], env=env,
        stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/api?token={token}", timeout=5)
            break
        except OSError:
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.25)
    else: raise AssertionError((folder / "server.log").read_text())
    yield folder, url, token
    process.terminate()
    process.wait(20)
    log.close()


def screenshots(tmp_path):
    folder = Path(os.environ.get("DMP_WB_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def set_theme(folder, theme):
    file = folder / "settings" / "@jupyterlab" / "apputils-extension" / "themes.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"theme": theme}))
    file = folder / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    # all cells are in the page, not only those in view; no question about the kernel
    file.write_text(json.dumps({"windowingMode": "none", "autoStartDefaultKernel": True}))
    (folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False}))


def open_notebook(browser, server, theme, size=(1280, 800), name="explore", images=10):
    "A notebook, the tutorial, run from top to bottom; the page and what its console complained about."
    folder, url, token = server
    set_theme(folder, theme)
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    complaints = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.goto(f"{url}/lab/tree/{name}.ipynb?token={token}&reset", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120_000)
    page.wait_for_timeout(5_000)   # JupyterLab says idle before its kernel takes requests
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.jp-OutputArea-output img.widget-image').length >= "
                           f"{images}", timeout=180_000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120_000)
    return page, complaints


def cell_of(page, code):
    "The code cell that holds a line."
    return page.locator(".jp-CodeCell", has=page.locator(".cm-content", has_text=code))


def slide(page, cell, label, key, times=1):
    "Move a slider by keyboard."
    cell.locator(".widget-inline-hbox", has=page.locator(
        ".widget-label", has_text=re.compile(f"^{label}$"))).locator("[role=slider]").first.focus()
    for _ in range(times): page.keyboard.press(key)


def pictures(cell): return cell.locator("img.widget-image:visible")


def source(picture):
    "The bytes that an image shows, as text."
    return picture.evaluate("async (i) => { const b = await (await fetch(i.src)).blob(); return await new Promise(r => "
                            "{ const f = new FileReader(); f.onload = () => r(f.result); f.readAsDataURL(b); }); }")


def changes(page, picture, act):
    before = source(picture)
    act()
    for _ in range(100):
        if source(picture) != before: return True
        page.wait_for_timeout(50)
    return False


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_explorers_follow_the_keyboard(browser, server, theme, tmp_path):
    page, complaints = open_notebook(browser, server, theme)
    try:
        assert page.evaluate("document.body.dataset.jpThemeLight") == ("true" if theme == "JupyterLab Light"
                                                                       else "false")
        assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        for code, label, key, which in (("GateExplorer(", "timestep", "ArrowRight", (0, 1, 2, 3)),
                                        ("RoutingExplorer(", "α", "ArrowLeft", (0, 1)),
                                        ("RoutingExplorer(", "t₁", "ArrowRight", (0,)),
                                        ("DenoiseExplorer(", "step", "Arrow", (0, 1, 2, 3, 4, 5))):
            cell = cell_of(page, code)
            cell.scroll_into_view_if_needed()
            for n in which:
                way = key if key != "Arrow" else ("ArrowRight", "ArrowLeft")[n % 2]   # it opens somewhere in the middle
                assert changes(page, pictures(cell).nth(n),
                               lambda cell=cell, label=label, way=way: slide(page, cell, label, way, 6)), (code, label,
                                                                                                           n)
            assert cell.locator("select, [role=slider]").count() >= 2
        gates = cell_of(page, "GateExplorer(")
        assert changes(page, pictures(gates).nth(0), lambda: gates.locator("select").first.select_option(index=2))
        assert cell_of(page, "RunExplorer(").locator("img.widget-image").first.evaluate("i => i.naturalWidth") > 300
        for code in EXPLORERS:
            cell = cell_of(page, code)
            cell.evaluate("c => c.scrollIntoView({block: 'start'})")
            page.wait_for_timeout(400)
            name = f"{code[:-1]}-{'light' if 'Light' in theme else 'dark'}.png"
            page.screenshot(path=screenshots(tmp_path) / name)
            output = cell.locator(".jp-OutputArea").first
            assert output.evaluate("o => o.scrollWidth <= o.clientWidth + 1"), f"{code} is wider than 1280 pixels allow"
        noise = ("favicon", "ResizeObserver", "jupyterlab_pygments", "News", "401", "404")   # of JupyterLab itself
        assert [c for c in complaints if not any(n in c for n in noise)] == []
    finally: page.close()


NAMELESS = """root => [...root.querySelectorAll('[role=slider], select, input, textarea, button, .widget-readout')]
    .filter(e => e.getClientRects().length && !(e.getAttribute('aria-label') || e.textContent || '').trim())
    .map(e => e.outerHTML.slice(0, 200))"""

# a quick machine may take the sign away before a look at the page finds it
WATCH_SIGN = """(cell) => {
    window.signs = [];
    new MutationObserver(records => {
        for (const record of records) for (const node of record.addedNodes)
            if (node.classList?.contains('dmp-wb-busy')) window.signs.push(node.textContent);
    }).observe(cell, {childList: true, subtree: true});
}"""


def test_everything_has_a_name_and_can_be_taken_away(browser, server, tmp_path):
    page, _ = open_notebook(browser, server, "JupyterLab Light")
    try:
        for code in EXPLORERS:
            output = cell_of(page, code).locator(".jp-OutputArea").first
            assert output.evaluate(NAMELESS) == []
            alts = output.locator("img.widget-image:visible").evaluate_all("all => all.map(i => i.alt)")
            assert alts and all(len(alt.split()) > 2 for alt in alts), alts
            output.get_by_role("button", name="save figure").click()
            for kind, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
                link = output.get_by_role("link", name=f"{code[:-1]}.{kind}")
                with page.expect_download() as download: link.click()
                assert Path(download.value.path()).read_bytes()[:5].startswith(begins)
            output.get_by_role("button", name="copy as code").click()
            shown = output.locator(".dmp-wb-given pre")
            shown.wait_for()
            assert "viz." in shown.inner_text() and output.get_by_role("button", name="copy", exact=True).count() == 1
        gates = cell_of(page, "GateExplorer(").locator(".jp-OutputArea").first
        assert gates.get_by_label("timestep", exact=True).get_attribute("role") == "slider"
        # the pointer on a map says what is there, and a press moves the slider
        glass = gates.locator(".dmp-wb-glass:visible").first
        glass.scroll_into_view_if_needed()
        box = glass.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        words = gates.locator(".dmp-wb-tip:visible").first.inner_text()
        assert re.search(r"t = \d+.*block 0, prompt \d+: [≤≥]? ?× \d+\.\d\d", words), words
        asked = re.search(r"t = (\d+)", words)[1]
        before = source(pictures(gates).first)
        page.mouse.down()
        page.wait_for_function("([e, t]) => e.getAttribute('aria-valuenow').startsWith(t)",
                               arg=[gates.get_by_label("timestep", exact=True).element_handle(), asked])
        page.mouse.move(box["x"] + 5, box["y"] + 20)
        page.mouse.up()
        page.wait_for_timeout(1_000)
        assert source(pictures(gates).first) != before
        assert float(gates.get_by_label("timestep", exact=True).get_attribute("aria-valuenow")) != float(asked)
        # what takes a while says so
        walk = cell_of(page, "DenoiseExplorer(").locator(".jp-OutputArea").first
        walk.get_by_label("view").scroll_into_view_if_needed()
        walk.evaluate(WATCH_SIGN)
        walk.get_by_label("view").select_option("seeds × classes")
        page.wait_for_function("() => window.signs.some(words => words.startsWith('denoising'))", timeout=120_000)
        walk.locator(".dmp-wb-busy").wait_for(state="detached", timeout=120_000)
        for name, cell in (("grid", walk), ("saved", gates)):
            cell.evaluate("c => c.scrollIntoView({block: 'start'})")
            page.screenshot(path=screenshots(tmp_path) / f"{name}.png")
    finally: page.close()


def map_drags(page, code, picture, times):
    "Milliseconds from each movement of the mouse on a map to the new pixels of a picture."
    cell = cell_of(page, code)
    glass = cell.locator(".dmp-wb-glass:visible").first
    glass.evaluate("c => c.scrollIntoView({block: 'center'})")
    pictures(cell).nth(picture).evaluate(WATCH)
    box = glass.bounding_box()
    y, stride = box["y"] + box["height"] / 2, box["width"] * 0.8 / (times + 2)
    page.mouse.move(x := box["x"] + box["width"] * 0.9, y)
    page.mouse.down()
    page.wait_for_timeout(1_000)
    page.evaluate("window.found = []")
    for n in range(times):
        page.mouse.move(x := x - stride, y)
        page.wait_for_function(f"window.found.length > {n}", timeout=30_000)
        page.wait_for_timeout(50)
    page.mouse.up()
    return page.evaluate("window.found")


def drags(page, code, label, picture, way, times):
    "Milliseconds from each movement of a slider to the new pixels of a picture; `way` is a key, or mouse."
    cell = cell_of(page, code)
    cell.evaluate("c => c.scrollIntoView({block: 'start'})")
    slider = cell.locator(".widget-inline-hbox", has=page.locator(".widget-label", has_text=re.compile(f"^{label}$")))
    pictures(cell).nth(picture).evaluate(WATCH)
    handle, track = slider.locator("[role=slider]").first, slider.locator(".slider").first.bounding_box()
    y, x, stride = (track["y"] + track["height"] / 2, track["x"] + track["width"] * 0.9,
                    track["width"] * 0.8 / (times + 2))
    if way == "mouse":
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, y)
        page.mouse.down()
        page.mouse.move(x, y)
    else:
        handle.focus()
        page.keyboard.press("End")
    page.wait_for_timeout(1_000)   # what has been asked for so far is drawn
    page.mouse.move(x := x - stride, y) if way == "mouse" else page.keyboard.press(way)
    page.wait_for_timeout(500)
    page.evaluate("window.found = []")
    for n in range(times):
        page.mouse.move(x := x - stride, y) if way == "mouse" else page.keyboard.press(way)
        try: page.wait_for_function(f"window.found.length > {n}", timeout=30_000)
        except Exception as e:
            raise AssertionError(f"{code[:-1]}: movement {n} of {label} by {way}, to "
                                 f"{handle.get_attribute('aria-valuenow')}, drew nothing") from e
        page.wait_for_timeout(50)
    if way == "mouse": page.mouse.up()
    return page.evaluate("window.found")


def measured(report, name, found, times):
    assert len(found) == times
    report[name] = {"movements": times, "median_ms": round(statistics.median(found), 1),
                    "slowest_ms": round(max(found), 1)}


def walk_of_fifty(page):
    "Enough steps to move through."
    cell = cell_of(page, "DenoiseExplorer(")
    cell.get_by_label("steps", exact=True).select_option("50")
    cell.locator("[role=slider][aria-valuemax='50.0']").first.wait_for(timeout=120_000)


def test_every_movement_becomes_new_pixels(browser, server, tmp_path):
    """Not a timed test: every movement has to draw.
    How long each took is printed, and written beside the screenshots as latency.json."""
    report = {}
    for name, images in (("explore", 10), ("fashion", 8)):
        page, _ = open_notebook(browser, server, "JupyterLab Light", name=name, images=images)
        walk, title = "DenoiseExplorer(", {"explore": "digits", "fashion": "fashion"}[name]
        try:
            walk_of_fifty(page)
            moves = [("GateExplorer(", "timestep", 3, "PageDown", 40), ("GateExplorer(", "timestep", 3, "mouse", 40),
                     ("RoutingExplorer(", "α", 1, "ArrowLeft", 40), ("RoutingExplorer(", "t₂", 1, "mouse", 40),
                     (walk, "step", 2, "ArrowLeft", 20), (walk, "step", 2, "mouse", 30)]
            for code, label, picture, way, times in moves:
                if name == "fashion" and code == "RoutingExplorer(": continue
                found = drags(page, code, label, picture, way, times)
                measured(report, f"{title} {code[:-1]} {label} {way}", found, times)
            for code, picture, times in (("GateExplorer(", 2, 30), (walk, 2, 20)):
                measured(report, f"{title} {code[:-1]} map mouse", map_drags(page, code, picture, times), times)
        finally: page.close()
    (screenshots(tmp_path) / "latency.json").write_text(json.dumps(report, indent=2, ensure_ascii=False))
    print(json.dumps(report, indent=2, ensure_ascii=False))
