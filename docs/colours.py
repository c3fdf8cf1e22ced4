"""The colours of code on the site, light and dark, and how well they are read.

Names, operators and brackets have the colour of text: what stands out is what differs.
`tests/test_lighter.py` asks for a contrast of 4.5 to 1 (WCAG AA) between each colour and its background.
"""
from pygments.style import Style
from pygments.token import (Comment, Error, Generic, Keyword, Literal, Name, Number, Operator, Punctuation, String,
                            Token)

BACKGROUND = {"light": "#f6f6f4", "dark": "#1d1f23"}


def style(text: str, comment: str, keyword: str, string: str, number: str, function: str, builtin: str,
          wrong: str, added: str) -> dict:
    "Colours by token; what is not named has the colour of text."
    return {Token: text, Comment: f"italic {comment}", Keyword: f"bold {keyword}", Operator.Word: f"bold {keyword}",
            String: string, String.Doc: f"italic {string}", String.Interpol: builtin, Number: number,
            Literal.Date: number, Name.Function: function, Name.Class: f"bold {function}",
            Name.Decorator: f"bold {comment}", Name.Builtin: builtin, Name.Exception: builtin,
            Name.Namespace: f"bold {function}", Name.Tag: f"bold {function}", Name.Attribute: string,
            Name.Variable: number, Name.Constant: number, Error: wrong, Generic.Prompt: f"bold {number}",
            Generic.Output: comment, Generic.Heading: "bold", Generic.Subheading: "bold", Generic.Emph: "italic",
            Generic.Strong: "bold", Generic.Deleted: wrong, Generic.Inserted: added, Generic.Error: wrong,
            Generic.Traceback: wrong, Punctuation: "", Name: "", Operator: ""}


class Light(Style):
    "Dark ink on paper."
    name = "light"
    background_color = BACKGROUND["light"]
    styles = style("#24262b", "#5d6470", "#8c2d2d", "#1d6a3a", "#8a4b08", "#1f4f8f", "#6d3f96", "#b3261e", "#1d6a3a")


class Dark(Style):
    "The same roles on a dark page."
    name = "dark"
    background_color = BACKGROUND["dark"]
    styles = style("#e2e4e8", "#9aa3b0", "#f0998a", "#9fd3a8", "#e8b86d", "#92bff5", "#cba8ee", "#ff8f85", "#9fd3a8")


def luminance(colour: str) -> float:
    "Of `#rrggbb`, from 0 (black) to 1 (white), as WCAG 2 defines it."
    parts = [int(colour.lstrip("#")[i:i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= .04045 else ((p + .055) / 1.055) ** 2.4 for p in parts]
    return .2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2]


def contrast(a: str, b: str) -> float:
    "Between two colours: 1 for equal ones, 21 for black on white."
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + .05) / (darker + .05)
