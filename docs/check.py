"""What the built site must hold: every link and picture inside it is there, links
to the outside have a known form, words are spelled right, and nothing is too large.

    python docs/check.py
"""
import html
import re
import subprocess
import sys
import tempfile
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

DOCS = Path(__file__).resolve().parent
OUT = DOCS.parent / "_docs"
MAX_SITE, MAX_PAGE = 28 * 2**20, 3 * 2**20   # bytes; a page with the pictures it shows
UNREAD = {"genindex", "search", "py-modindex"}   # pages without prose


class Page(HTMLParser):
    "Links, pictures, anchors and prose of a page."
    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []       # a reader may follow
        self.loads: list[str] = []       # a browser fetches by itself
        self.pictures: list[str] = []
        self.unnamed: list[str] = []     # pictures without a text for those who do not see them
        self.anchors, self.words, self._skip, self._main, self._tags = set(), [], 0, False, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.anchors |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag in ("script", "iframe", "source", "video") and a.get("src"): self.loads.append(a["src"])
        if tag == "link" and a.get("href") and a.get("rel") not in ("index", "search", "next", "prev", "genindex",
                                                                    "canonical"):
            self.loads.append(a["href"])
        if tag == "img" and a.get("src"):
            self.loads.append(a["src"]); self.pictures.append(a["src"])
            if not says_something(a.get("alt") or "", a["src"]): self.unnamed.append(a["src"])
        if tag == "article": self._main = True
        if tag in ("pre", "code", "script", "style", "svg"): self._skip += 1
        if "math" in (a.get("class") or "").split(): self._skip += 1; self._tags.append(tag)

    def handle_endtag(self, tag):
        if tag == "article": self._main = False
        if tag in ("pre", "code", "script", "style", "svg") or self._tags and self._tags[-1] == tag:
            self._skip -= 1
            if self._tags and self._tags[-1] == tag: self._tags.pop()

    def handle_data(self, data):
        if self._main and not self._skip: self.words.append(data)


def says_something(alt: str, source: str) -> bool:
    "Whether the text of a picture is one for readers: not empty, no file name, no digest."
    name = Path(urlsplit(source).path).name
    return len(alt.split()) >= 2 and name not in alt and not re.search(r"[0-9a-f]{16}", alt)


@cache
def read(path: Path) -> Page: return Page(path)


def pages() -> list[Path]: return sorted(OUT.rglob("*.html"))


def links() -> list[str]:
    "Links that lead nowhere."
    known = [re.compile(line) for line in (DOCS / "links.txt").read_text(encoding="utf-8").splitlines()
             if line and not line.startswith("#")]
    faults, outside = [], set()
    for page in pages():
        here = page.relative_to(OUT).as_posix()
        for load in read(page).loads:
            if re.match(r"(https?:)?//", load):
                faults.append(f"{here} loads {load}: everything a page needs must be in the site")
        for link in dict.fromkeys([*read(page).links, *read(page).loads]):
            url = urlsplit(html.unescape(link))
            if url.scheme in ("data", "mailto"): continue
            if url.scheme or url.netloc:
                outside.add(link)
                if not any(k.fullmatch(link) for k in known):
                    faults.append(f"{here} links {link}: no form of docs/links.txt; correct it, or add the form")
                continue
            there = (page.parent / unquote(url.path)).resolve() if url.path else page
            if there.is_dir(): there /= "index.html"
            if not there.is_file(): faults.append(f"{here} links {link}: there is no such file")
            elif (url.fragment and there.suffix == ".html"
                  and unquote(url.fragment) not in read(there).anchors | {"top"}):
                faults.append(f"{here} links {link}: the page has no such anchor")
    print(f"== links: {sum(len(read(p).links) for p in pages()):,} in {len(pages())} pages, {len(outside)} addresses "
          "outside")
    return faults


def spelling() -> list[str]:
    "codespell over the prose of every page."
    with tempfile.TemporaryDirectory() as folder:
        for page in pages():
            if page.stem in UNREAD: continue
            text = Path(folder) / page.relative_to(OUT).with_suffix(".txt")
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("".join(read(page).words), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "codespell_lib", "--builtin", "clear,rare", "--ignore-words",
                               str(DOCS / "words.txt"), folder], capture_output=True, text=True)
        return [f"spelling: {line.replace(folder + '/', '').replace('.txt:', ', line ', 1)}"
                for line in done.stdout.splitlines() if "==>" in line] + (
                    [f"codespell: {done.stderr.strip()}"] if done.returncode not in (0, 65) and not done.stdout else [])


def descriptions() -> list[str]:
    "Pictures without a text that says what they show."
    return [f"{page.relative_to(OUT)} shows {picture} without a text: give its cell a line #| fig-alt: …"
            for page in pages() if page.stem not in UNREAD for picture in read(page).unnamed]


def sizes() -> list[str]:
    "What is larger than it may be."
    site = sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file())
    faults = [f"the site has {site / 2**20:.1f} MiB, more than {MAX_SITE / 2**20:.0f}"] if site > MAX_SITE else []
    of = {page: page.stat().st_size
          + sum((page.parent / unquote(src)).stat().st_size for src in set(read(page).pictures) if "://" not in src
                and not src.startswith("data:") and (page.parent / unquote(src)).is_file()) for page in pages()}
    faults += [f"{page.relative_to(OUT)} has {size / 2**20:.1f} MiB with its pictures, more than {MAX_PAGE / 2**20:.0f}"
               for page, size in of.items() if size > MAX_PAGE]
    largest = max(of, key=of.get)
    print(f"== sizes: {site / 2**20:.1f} MiB in all; the largest page, {largest.relative_to(OUT)}, has "
          f"{of[largest] / 2**20:.2f} MiB with its pictures")
    return faults


def remnants() -> list[str]:
    "What nbdev and Jupyter need and a reader does not."
    faults = []
    for page in pages():
        text = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
        for pattern in (r"^#\| ?\w+", r"\bshow_doc\(", r"nbdev_export\(\)", r"application/vnd\.[\w.-]+\+json&quot;",
                        r"/tmp/\w+/|/root/|/work/\w+/"):
            found = re.search(pattern, text, re.M)
            if found: faults.append(f"{page.relative_to(OUT)} shows {found[0]!r}")
    return faults


def main() -> int:
    faults = [*links(), *spelling(), *descriptions(), *sizes(), *remnants()]
    for fault in faults: print(f"error: {fault}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__": sys.exit(main())
