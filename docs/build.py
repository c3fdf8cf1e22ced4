"""Build the site: notebooks → _proc/ (nbdev) → _docs/ (Sphinx, MyST-NB).

    python docs/build.py            # warnings are errors
    python docs/build.py --serve    # build, then serve it on a free port of this machine
"""
import json
import shutil
import sys
import time
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]
import notebooks  # noqa: E402
import pages  # noqa: E402
import reference  # noqa: E402
from execnb.nbio import read_nb, write_nb  # noqa: E402
from sphinx.cmd.build import main as sphinx_build  # noqa: E402

PROC, OUT = ROOT / "_proc", ROOT / "_docs"
MAX_SITE, MAX_PAGE = 30 * 2**20, 3 * 2**20   # bytes; a page with the pictures it shows


def process():
    "What `nbdev_proc_nbs` does, without the Quarto that this command would first download: each notebook through our processors."
    shutil.rmtree(PROC, ignore_errors=True)
    for source in pages.notebooks():
        target = PROC / source.relative_to(notebooks.NBS)
        target.parent.mkdir(parents=True, exist_ok=True)
        nb = read_nb(source)
        notebooks.ForSite(source.relative_to(ROOT))(nb)
        write_nb(nb, target)
    for folder in ("images", "experiments"): shutil.copytree(notebooks.NBS / folder, PROC / folder, ignore=shutil.ignore_patterns("*.py"))
    pages.write(PROC)
    reference.write_pages(PROC / "reference")


def sizes() -> list[str]:
    "What is larger than it may be."
    site = sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file())
    faults = [f"the site has {site / 2**20:.1f} MiB, more than {MAX_SITE / 2**20:.0f}"] if site > MAX_SITE else []
    largest = (0, OUT)
    for page in OUT.rglob("*.html"):
        size = page.stat().st_size + sum((page.parent / src).stat().st_size for src in pages.pictures(page))
        largest = max(largest, (size, page))
        if size > MAX_PAGE: faults.append(f"{page.relative_to(OUT)} has {size / 2**20:.1f} MiB with its pictures, more than {MAX_PAGE / 2**20:.0f}")
    print(f"== {site / 2**20:.1f} MiB in all; the largest page, {largest[1].relative_to(OUT)}, has {largest[0] / 2**20:.2f} MiB with its pictures")
    return faults


def main() -> int:
    start = time.monotonic()
    process()
    shutil.rmtree(OUT, ignore_errors=True)
    status = sphinx_build(["-q", "-W", "--keep-going", "-n", "-j", "auto", "-c", str(DOCS), "-d", str(PROC / ".doctrees"), "-b", "html", str(PROC), str(OUT)])
    faults = [] if status else sizes()
    for fault in faults: print(f"error: {fault}", file=sys.stderr)
    if not status: print(f"== built {OUT.relative_to(ROOT)} in {time.monotonic() - start:.0f} s: open it with make serve-docs")
    return status or bool(faults)


def serve():
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(OUT))) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/   (Ctrl-C ends it)", flush=True)
        try: server.serve_forever()
        except KeyboardInterrupt: pass


if __name__ == "__main__":
    if "--serve" in sys.argv: serve()
    else: sys.exit(main())
