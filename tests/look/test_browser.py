"""JupyterLab in a real browser: the explorers' tutorial is run, sliders
are moved by keyboard, pictures change, and nothing is complained about.

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

import pytest
from conftest import needs_browser

pytestmark = needs_browser
ROOT = Path(__file__).parents[2]

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


def open_notebook(browser, server, theme, size=(1280, 800)):
    "The tutorial, run from top to bottom; the page and what its console complained about."
    folder, url, token = server
    set_theme(folder, theme)
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    complaints = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.goto(f"{url}/lab/tree/explore.ipynb?token={token}&reset", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=120_000)
    page.wait_for_timeout(5_000)   # JupyterLab says idle before its kernel takes requests
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.jp-OutputArea-output img.widget-image').length >= 10",
                           timeout=180_000)
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


def pictures(cell): return cell.locator("img.widget-image")


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
                                        ("DenoiseExplorer(", "step", "ArrowLeft", (0, 1, 2, 3, 4))):
            cell = cell_of(page, code)
            cell.scroll_into_view_if_needed()
            for n in which:
                assert changes(page, pictures(cell).nth(n),
                               lambda cell=cell, label=label, key=key: slide(page, cell, label, key, 6)), (code, label,
                                                                                                           n)
            assert cell.locator("select, [role=slider]").count() >= 2
        gates = cell_of(page, "GateExplorer(")
        assert changes(page, pictures(gates).nth(0), lambda: gates.locator("select").first.select_option(index=2))
        assert cell_of(page, "RunExplorer(").locator("img.widget-image").first.evaluate("i => i.naturalWidth") > 300
        for code in ("GateExplorer(", "RoutingExplorer(", "DenoiseExplorer(", "RunExplorer("):
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


def test_every_movement_becomes_new_pixels(browser, server, tmp_path):
    """Not a timed test: every movement has to draw.
    How long each took is printed, and written beside the screenshots as latency.json."""
    page, _ = open_notebook(browser, server, "JupyterLab Light")
    report = {}
    try:
        cell_of(page, "DenoiseExplorer(").locator("select").last.select_option("50")
        # enough of them to move through
        cell_of(page, "DenoiseExplorer(").locator("[role=slider][aria-valuemax='50.0']").first.wait_for(timeout=60_000)
        for code, label, picture, way, times in (
                ("GateExplorer(", "timestep", 3, "PageDown", 40), ("GateExplorer(", "timestep", 3, "mouse", 40),
                ("RoutingExplorer(", "α", 1, "ArrowLeft", 40),
                ("RoutingExplorer(", "t₂", 1, "mouse", 40), ("DenoiseExplorer(", "step", 2, "ArrowLeft", 20),
                ("DenoiseExplorer(", "step", 2, "mouse", 30)):
            found = drags(page, code, label, picture, way, times)
            assert len(found) == times
            report[f"{code[:-1]} {label} {way}"] = {"movements": times, "median_ms": round(statistics.median(found), 1),
                                                    "slowest_ms": round(max(found), 1)}
    finally: page.close()
    (screenshots(tmp_path) / "latency.json").write_text(json.dumps(report, indent=2, ensure_ascii=False))
    print(json.dumps(report, indent=2, ensure_ascii=False))
