"""What a built page repeats and no reader sees, taken out of it.

Sphinx wraps each word of code in elements of its own, and writes the whole tree of pages into every page.
Nothing that is read, searched, clicked or linked to goes: `tests/test_lighter.py` compares before and after.
"""
import re
from pathlib import Path

PLAIN = {"n", "p", "o", "w", "pre", "default_value", ""}   # classes of a span that no style colours
_TAG = re.compile(r"(<[^>]+>)")
_CODE = re.compile(r"(<pre\b.*?</pre>|<textarea\b.*?</textarea>|<script\b.*?</script>)", re.S)
_SIGNATURE = re.compile(r'<dt class="sig.*?</dt>', re.S)
_TREE = re.compile(r'(?<=<div class="sidebar-tree">).*?(?=</div>)', re.S)


def unwrapped(text: str) -> str:
    "HTML without the spans that have no colour; neighbours of one colour become one span."
    out: list[str] = []
    open_spans: list[bool] = []           # is the span kept?
    for piece in _TAG.split(text):
        if piece.startswith("<span"):
            name = re.fullmatch(r'<span(?: class="([^"]*)")?>', piece)
            open_spans.append(name is None or (name[1] or "") not in PLAIN)
            if not open_spans[-1]: continue
            if out[-2:] == ["</span>", ""] and _opener(out) == piece: del out[-2:]; continue
        elif piece == "</span>" and not open_spans.pop(): continue
        out.append(piece)
    return "".join(out)


def _opener(out: list[str]) -> str:
    "The tag that opened the span which the last pieces close, if there is only text in it."
    return next((piece for piece in reversed(out[:-2]) if piece.startswith("<")), "")


def code_block(text: str) -> str:
    "A `<pre>` that can be reached with the keyboard, each of its links as short as it can be."
    text = text.replace('<a class="sphinx-codeautolink-a"', "<a")
    return unwrapped(without_titles(text)).replace("<pre>", '<pre tabindex="0">', 1)


def without_titles(text: str) -> str:
    "Without the tooltips that repeat the end of their own link, or say which library it leads to."
    text = re.sub(r'(#([^"]*)") title="\2"', r"\1", text)
    return re.sub(r' title="\(in [^"]*\)"', "", text)


def prose(text: str) -> str:
    "What stands between blocks of code: no blanks at the start of a line, no wrapper around a word of code."
    text = _SIGNATURE.sub(lambda m: unwrapped(m[0]), text)
    text = re.sub(r'<code class="(?:xref py py-\w+ )?docutils literal notranslate">'
                  r'<span class="pre">([^<]*)</span></code>', r'<code class="literal notranslate">\1</code>', text)
    text = re.sub(r"\n\s+", "\n", text)
    return without_titles(text)


def branch(tree: str, page: str) -> str:
    """The side bar of a page: source notebooks only beside source notebooks, and there those of the page's own wing.

    The other wings are one line each, which leads to their place in the list of source notebooks.
    """
    start = re.search(r'<li class="toctree-l2[^"]*"><a class="[^"]*" href="[^"]*source\.html">', tree)
    if not start or page == "source.html": return tree
    end = _end_of_list(tree, start.start())
    entry = tree[start.start():end]
    head, _, rooms = entry.partition("<ul>") if "<ul>" in entry else entry.partition('<ul class="current">')
    link = re.search(r'href="([^"]*source\.html)"', head)[1]
    if not page.startswith("source/"):
        leaf = re.sub(r"<input.*", "", head, flags=re.S).replace(" has-children", "")
        return tree[:start.start()] + leaf + "</li>" + tree[end:]
    own, lines, seen = page.split("/")[1], [], set()
    for room in re.findall(r"<li.*?</li>", rooms, re.S):
        href = re.search(r'href="([^"]*)"', room)[1]
        wing = re.match(r"\.\./([^/.]+)/", href)
        if wing is None: lines.append(room)
        elif wing[1] not in seen:
            seen.add(wing[1])
            lines.append(f'<li class="toctree-l3"><a class="reference internal" href="{link}#{wing[1]}">{wing[1]} …</a>'
                         "</li>")
    assert own not in seen, (page, own)
    return tree[:start.start()] + head + '<ul class="current">' + "\n".join(lines) + "</ul></li>" + tree[end:]


def _end_of_list(tree: str, start: int) -> int:
    "Where the `<li>` ends that begins at a place."
    depth = 0
    for tag in re.finditer(r"<(/?)li\b[^>]*>", tree[start:]):
        depth += -1 if tag[1] else 1
        if not depth: return start + tag.end()
    raise ValueError("a list of the side bar has no end")


def lighter(text: str, page: str) -> str:
    "The HTML of a page of the site. `page`: its path in the site."
    text = re.sub(r'<symbol id="svg-(?:pencil|eye)".*?</symbol>\n?', "", text, flags=re.S)
    text = _TREE.sub(lambda m: branch(m[0], page), text, count=1)
    return "".join(code_block(piece) if piece.startswith("<pre") else piece if i % 2 else prose(piece)
                   for i, piece in enumerate(_CODE.split(text)))


def lighten(out: Path) -> None:
    "Every page of a built site."
    for page in out.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        page.write_text(lighter(text, page.relative_to(out).as_posix()), encoding="utf-8")
