"""Build the site: notebooks → _proc/ (nbdev) → _docs/ (Sphinx, MyST-NB).

    python docs/build.py            # warnings are errors
    python docs/build.py --serve    # build, then serve it on a free port of this machine
"""
import os
import shutil
import sys
import time
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# it would list every class that needs a package we do not need
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path[:0] = [str(ROOT), str(DOCS)]
import check  # noqa: E402
import lighter  # noqa: E402
import notebooks  # noqa: E402
import pages  # noqa: E402
import reference  # noqa: E402
from execnb.nbio import read_nb, write_nb  # noqa: E402
from sphinx.cmd.build import main as sphinx_build  # noqa: E402

PROC, OUT = ROOT / "_proc", ROOT / "_docs"


def process():
    """What `nbdev_proc_nbs` does, without the Quarto that this command would first download:
    each notebook through our processors."""
    shutil.rmtree(PROC, ignore_errors=True)
    for source in pages.notebooks():
        target = PROC / source.relative_to(notebooks.NBS)
        target.parent.mkdir(parents=True, exist_ok=True)
        nb = read_nb(source)
        notebooks.ForSite(source.relative_to(ROOT))(nb)
        write_nb(nb, target)
    for folder in ("images", "experiments"):
        shutil.copytree(notebooks.NBS / folder, PROC / folder, ignore=shutil.ignore_patterns("*.py"))
    pages.write(PROC)
    reference.write_pages(PROC / "reference")


def main() -> int:
    start = time.monotonic()
    process()
    shutil.rmtree(OUT, ignore_errors=True)
    status = sphinx_build(["-q", "-W", "--keep-going", "-n", "-j", "auto", "-c", str(DOCS), "-d",
                           str(PROC / ".doctrees"), "-b", "html", str(PROC), str(OUT)])
    shutil.rmtree(ROOT / "jupyter_execute", ignore_errors=True)   # MyST-NB's copies
    for source_map in OUT.rglob("*.map"): source_map.unlink()   # of the theme, for those who change it
    lighter.lighten(OUT)
    status = status or check.main()
    if not status:
        print(f"== built {OUT.relative_to(ROOT)} in {time.monotonic() - start:.0f} s: look at it with make serve-docs")
    return status


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
