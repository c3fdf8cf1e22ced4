"Sphinx configuration; docs/build.py runs it on what nbdev wrote to _proc/."
import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent)]
from colours import BACKGROUND  # noqa: E402
from make_inventories import inventories  # noqa: E402

ini = ConfigParser(delimiters=["="])
ini.read(here.parent / "settings.ini", encoding="utf-8")

project, author, version = "dmp_wb", ini["DEFAULT"]["author"], ini["DEFAULT"]["version"]
copyright, release, language = ini["DEFAULT"]["copyright"], version, "en"
extensions = ["myst_nb", "sphinx.ext.intersphinx", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinx_design",
              "sphinx_codeautolink", "reference"]
exclude_patterns = [".doctrees", "**.ipynb_checkpoints"]
suppress_warnings = ["myst.header", "misc.highlighting_failure", "codeautolink.parse_block", "codeautolink.match_name"]
nitpick_ignore_regex = [("py:.*", r"(?!dmp_wb).*")]   # names of libraries that have no inventory here

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline", "attrs_block"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
mathjax_path = "mathjax/tex-svg.js"

intersphinx_mapping = {library: (address, str(here / "inventories" / f"{library}.inv"))
                       for library, (address, _) in inventories().items()}
intersphinx_disabled_reftypes = ["std:*"]
codeautolink_concat_default = True
codeautolink_warn_on_missing_inventory = False
codeautolink_warn_on_failed_resolve = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = "dmp_wb"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#8c2d2d", "color-brand-content": "#a33a2c",
                            "color-code-background": BACKGROUND["light"], "color-background-secondary": "#faf9f7",
                            "color-link-underline": "#d9c9c2", "color-brand-visited": "#a33a2c"},
    "dark_css_variables": {"color-brand-primary": "#f0998a", "color-brand-content": "#f0998a",
                           "color-code-background": BACKGROUND["dark"], "color-background-primary": "#141518",
                           "color-background-secondary": "#1a1b1f", "color-link-underline": "#5b4540",
                           "color-brand-visited": "#f0998a"},
}
pygments_style, pygments_dark_style = "colours.Light", "colours.Dark"
