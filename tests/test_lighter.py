"What the site leaves out of its pages is repeated or unseen: text, links and anchors stay."
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
colours = pytest.importorskip("colours")
import lighter  # noqa: E402

CODE = ('<div class="highlight"><pre><span></span><span class="k">def</span><span class="w"> </span>'
        '<span class="nf">f</span><span class="p">(</span><span class="n">x</span><span class="p">:</span> '
        '<a class="sphinx-codeautolink-a" href="../reference/models.dit.html#dmp_wb.DiT" title="dmp_wb.DiT">'
        '<span class="n">DiT</span></a><span class="p">):</span>\n    <span class="k">return</span> '
        '<span class="s2">&quot;a </span><span class="s2">b&quot;</span>   <span class="c1"># &lt;why&gt;</span>\n'
        '</pre></div>')


class Seen(HTMLParser):
    "Text, links and anchors."
    def __init__(self, text: str):
        super().__init__()
        self.text, self.links, self.anchors, self.depth = "", [], [], 0
        self.feed(text)
        assert self.depth == 0, "an element has no end"

    def handle_starttag(self, tag, attrs):
        self.depth += tag not in ("input", "img", "br")
        if tag == "a": self.links.append(dict(attrs)["href"])
        if "id" in dict(attrs): self.anchors.append(dict(attrs)["id"])

    def handle_endtag(self, tag): self.depth -= tag not in ("input", "img", "br")

    def handle_data(self, data): self.text += data


def same(before: str, after: str) -> bool:
    a, b = Seen(before), Seen(after)
    return (a.text, a.links, a.anchors) == (b.text, b.links, b.anchors)


def test_a_block_of_code_keeps_its_text_and_links_in_half_the_bytes():
    after = lighter.lighter(CODE, "howto/patches.html")
    assert same(CODE, after) and len(after) < .6 * len(CODE)
    assert '<span class="s2">&quot;a b&quot;</span>' in after, "neighbours of one colour are one"
    assert '<pre tabindex="0">' in after and "title=" not in after


def test_only_spans_without_a_colour_go():
    from pygments.formatters import HtmlFormatter
    from pygments.token import STANDARD_TYPES
    kinds = {short: token for token, short in STANDARD_TYPES.items()}
    for look in (colours.Light, colours.Dark):
        text = dict(look)[kinds[""]]["color"]
        for short in lighter.PLAIN & kinds.keys():
            given = look.style_for_token(kinds[short])
            assert given["color"] == text and not given["bold"] and not given["italic"], short
        assert HtmlFormatter(style=look)


def test_a_signature_and_a_word_of_code_keep_their_text():
    page = ('<dt class="sig sig-object py" id="wb.f">\n<span class="sig-name descname">'
            '<span class="pre">f</span></span><em class="sig-param"><span class="n">'
            '<span class="pre">x</span></span><span class="o">'
            '<span class="pre">=</span></span></em></dt><p>A <code class="xref py py-obj docutils literal notranslate">'
            '<span class="pre">word</span></code> <a href="x.html#k" title="(in torch)">k</a></p>')
    after = lighter.lighter(page, "reference/x.html")
    assert same(page, after) and "sig-name" in after and 'class="literal notranslate">word<' in after


def test_contents_of_scripts_and_text_areas_are_left_alone():
    page = '<script>\n   let a = "<span></span>";\n</script><textarea>\n   x\n</textarea>'
    assert lighter.lighter(page, "index.html") == page


ROOMS = "".join(f'<li class="toctree-l3"><a class="reference internal" href="{h}">{n}</a></li>\n'
                for h, n in (("../core/00_errors.html", "errors"), ("../core/01_files.html", "files"), ("#", "gates"),
                             ("03_timesteps.html", "timesteps"), ("../cli/00_base.html", "base")))
TREE = ('<div class="sidebar-tree"><ul>\n<li class="toctree-l2 current has-children">'
        '<a class="reference internal" href="../../source.html">Source notebooks</a><input type="checkbox"/>'
        f'<label>+</label><ul class="current">\n{ROOMS}</ul>\n</li>\n'
        '<li><a href="../../data.html">Data</a></li></ul></div>')


def test_the_side_bar_of_a_source_notebook_shows_its_wing_and_a_line_for_each_other():
    seen = Seen(lighter.lighter(TREE, "source/look/02_gates.html"))
    assert seen.links == ["../../source.html", "../../source.html#core", "#", "03_timesteps.html",
                          "../../source.html#cli", "../../data.html"]


def test_the_side_bar_of_other_pages_leads_to_the_list_of_source_notebooks():
    after = lighter.lighter(TREE, "tutorials/digits.html")
    assert Seen(after).links == ["../../source.html", "../../data.html"] and "<input" not in after


@pytest.mark.parametrize("look", ["Light", "Dark"])
def test_every_colour_of_code_is_read_on_its_background(look):
    style = getattr(colours, look)
    page = {"Light": "#ffffff", "Dark": "#141518"}[look]     # outputs of cells have none of their own
    low = {str(token): round(colours.contrast("#" + given["color"], behind), 2) for token, given in style
           for behind in (style.background_color, page)
           if given["color"] and colours.contrast("#" + given["color"], behind) < 4.5}
    assert not low


def test_contrast_is_that_of_the_standard():
    assert round(colours.contrast("#000000", "#ffffff"), 2) == 21 == round(colours.contrast("#fff" "fff", "#000000"))
    assert round(colours.contrast("#777777", "#ffffff"), 2) == 4.48


def test_the_site_uses_these_colours():
    conf = (Path(colours.__file__).parent / "conf.py").read_text(encoding="utf-8")
    assert '"colours.Light", "colours.Dark"' in conf
    assert not re.search(r'color-code-background": "#', conf), "the background is that of docs/colours.py"
