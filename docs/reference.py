"""The reference pages, written from the package itself:
signatures, docments, the command line, the keys of an experiment.

As a Sphinx extension it also makes the links:
names in backticks, names in types, and the cells where names are defined.
"""
import ast
import builtins
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import typing
from functools import cache
from pathlib import Path

import dmp_wb
from docutils import nodes
from fastcore.docments import docments
from notebooks import NBS, anchor, rooms_of, wings
from sphinx import addnodes
from sphinx.domains.python._annotations import _parse_annotation
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxRole

# Words that are names of ours and mean something else in prose as well, unless written with brackets or a dot.
PLAIN_WORDS = {"app", "new", "main", "flat", "like", "whole", "live", "short", "resume", "export", "extract", "collect",
               "batches", "digits", "sampler", "betas", "snr", "anatomy", "data", "config",
               "core", "schedules", "routing", "training", "sampling", "metrics", "runs", "hooks", "objectives",
               "patching", "checkpoints", "multitask", "distributed", "explore", "cli", "viz", "dit",
               "name", "method", "run", "seed", "base", "format", "model", "patch.mode"}


# -- what the package holds --------------------------------------------------------------------------------------------
@cache
def modules() -> dict:
    return {name: importlib.import_module(f"dmp_wb.{name}") for name in source_notebooks() if "__" not in name}


@cache
def source_notebooks() -> dict[str, str]:
    "module → the page of its notebook, e.g. methods.hooks → source/methods/02_hooks; in the order of the wings"
    return {room: path.relative_to(NBS).with_suffix("").as_posix() for wing in wings()
            for room, path in rooms_of(wing).items()}


def title_of(page: str) -> str: return page.removeprefix("source/")


def names_of(module) -> list[str]: return list(dict.fromkeys(module.__all__))


def is_entry(value, module) -> bool:
    "A class or function that the module defines; what else it exports is a value."
    return ((inspect.isclass(value) or callable(value) and hasattr(value, "__wrapped__") or inspect.isfunction(value))
            and getattr(value, "__module__", "") == module.__name__)


@cache
def trees(module_name: str) -> ast.Module:
    return ast.parse(Path(sys.modules[module_name].__file__).read_text(encoding="utf-8"))


def definition(module, qualname: str):
    "The node of a class, function or method in its module's source."
    body, node = trees(module.__name__).body, None
    for part in qualname.split("."):
        node = next((n for n in body
                     if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and n.name == part), None)
        if node is None: return None
        body = node.body
    return node


# -- types and signatures ----------------------------------------------------------------------------------------------
def full_name(expression: str, module) -> str | None:
    "The documented name of what an expression in a module's annotations stands for: nn.Module → torch.nn.Module."
    head, *rest = expression.split(".")
    if not hasattr(module, head): return head if hasattr(builtins, head) and not rest else None
    value = getattr(module, head)
    if inspect.ismodule(value): return ".".join([value.__name__, *rest])
    for part in rest: value = getattr(value, part, None)
    if value is None: return "None"
    name, home = (getattr(value, "__qualname__", None) or getattr(value, "__name__", None),
                  getattr(value, "__module__", None))
    if not (name and home): return None
    if home == "builtins": return name
    parts = home.split(".")
    for i in range(1, len(parts) + 1):                  # where users import it from
        short = sys.modules.get(".".join(parts[:i]))
        if (short and getattr(short, name, None) is value and not any(p.startswith("_") for p in parts[:i])
                and parts[0] != "dmp_wb"):
            return ".".join([*parts[:i], name])
    if home == "torch.nn.modules.module": return f"torch.nn.{name}"
    return f"{home}.{name}"


class _Full(ast.NodeTransformer):
    def __init__(self, module): self.module = module

    def _name(self, node):
        full = full_name(ast.unparse(node), self.module)
        if full is None or full == "None": return node
        return ast.Name(id=("~" if "." in full else "") + full)
    visit_Name = visit_Attribute = _name

    def visit_Constant(self, node):                    # a forward reference, 'DiT'
        if isinstance(node.value, str) and node.value.isidentifier() and hasattr(self.module, node.value):
            return self._name(ast.Name(id=node.value))
        return node

    def visit_Subscript(self, node):
        node.value = self.visit(node.value)
        if not ast.unparse(node.value).endswith("Literal"): node.slice = self.visit(node.slice)
        return node


def type_text(node: ast.expr | None, module) -> str:
    if node is None: return ""
    if isinstance(node, ast.Constant) and isinstance(node.value, str): node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Annotated"): node = node.slice.elts[0]
    return ast.unparse(_Full(module).visit(ast.parse(ast.unparse(node), mode="eval").body))


def plain_type(node: ast.expr | None) -> str: return "" if node is None else ast.unparse(node).strip("'\"")


@dataclasses.dataclass
class Row:
    "A parameter: of a function, a dataclass, a config."
    name: str
    type: str
    default: str | None   # None: required
    meaning: str
    star: str = ""


def parameters(value, module, qualname: str) -> tuple[list[Row], str, str]:
    "The rows of a callable's table, the type of what it returns and what it says of it."
    node = definition(module, qualname)
    if isinstance(node, ast.ClassDef):
        if dataclasses.is_dataclass(value):
            docs = docments(value, full=True)
            fields = {f.target.id: f
                      for n in (definition(sys.modules[c.__module__], c.__qualname__)
                                for c in reversed(value.__mro__) if c.__module__.startswith("dmp_wb")) if n
                      for f in n.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}
            shown = {f.name: f for f in dataclasses.fields(value) if f.init and not f.name.startswith("_")}
            return [Row(name, type_text(f.annotation, module), _field_default(f.value), _docment(docs, name))
                    for name, f in fields.items() if name in shown], "", ""
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None: return [], "", ""
        docs, node, drop = docments(value.__init__, full=True), init, 1
    else:
        static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
        docs, drop = (docments(inspect.unwrap(getattr(value, "__func__", value)), full=True),
                      int("." in qualname and not static))
    a = node.args
    rows = []
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
    for arg, default in list(zip(plain, defaults))[drop:]: rows.append(_row(arg, default, docs, module))
    if a.vararg: rows.append(_row(a.vararg, None, docs, module, "*"))
    elif a.kwonlyargs: rows.append(Row("", "", None, "", "*"))
    for arg, default in zip(a.kwonlyargs, a.kw_defaults): rows.append(_row(arg, default, docs, module))
    if a.kwarg: rows.append(_row(a.kwarg, None, docs, module, "**"))
    returns = (type_text(node.returns, module) if not isinstance(getattr(node, "returns", None), ast.Constant)
               or node.returns.value is not None else "")
    return rows, returns, _docment(docs, "return")


def _row(arg, default, docs, module, star=""):
    return Row(arg.arg, type_text(arg.annotation, module), None if default is None else ast.unparse(default),
               _docment(docs, arg.arg), star)


def _docment(docs, name) -> str:
    entry = docs.get(name) or {}
    return " ".join((entry.get("docment") or "").split())


def _field_default(node) -> str | None:
    if node is None: return None
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("field"):
        for keyword in node.keywords:
            if keyword.arg == "default": return ast.unparse(keyword.value)
            if keyword.arg == "default_factory":
                return (ast.unparse(keyword.value.body) if isinstance(keyword.value, ast.Lambda)
                        else f"{ast.unparse(keyword.value)}()")
        return None
    return ast.unparse(node)


def signature(rows: list[Row], returns: str) -> str:
    parts = [r.star + r.name + (f": {r.type}" if r.type else "")
             + ("" if r.default is None else f" = {r.default}" if r.type else f"={r.default}") for r in rows]
    return f"({', '.join(parts)})" + (f" -> {returns}" if returns else "")


# -- Markdown ----------------------------------------------------------------------------------------------------------
def prose(text: str) -> str:
    "Text of a docstring as Markdown: what is not code is taken literally."
    pieces = re.split(r"(``.+?``|`[^`]+`|\$[^$\n]+\$)", text)
    return "".join(p if i % 2 else re.sub(r"([<*_\\])", r"\\\1", p) for i, p in enumerate(pieces))


def in_cell(text: str) -> str: return text.replace("|", r"\|").replace("\n", " ")


def code(text: str) -> str:
    ticks = "``" if "`" in text else "`"
    return f"{ticks}{text}{ticks}"


def table(rows: list[Row], first: str = "parameter") -> str:
    rows = [r for r in rows if r.name]
    if not any(r.meaning for r in rows): return ""     # the signature says as much
    defaults, types = any(r.default is not None for r in rows), any(r.type for r in rows)
    head = [first, *(["type"] if types else []), *(["default"] if defaults else []), "meaning"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [code(r.star + r.name)]
        if types: cells.append(f"{{anno}}`{in_cell(r.type)}`" if r.type else "")
        if defaults:
            cells.append("required" if r.default is None and not r.star else "" if r.default is None
                         else code(in_cell(r.default)))
        lines.append("| " + " | ".join([*cells, in_cell(prose(r.meaning))]) + " |")
    return ":::{div} parameters\n\n" + "\n".join(lines) + "\n\n:::\n"


def summary(value) -> str:
    "The first sentence of a docstring."
    doc = inspect.getdoc(value) or ""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])|\n\n", doc.strip(), maxsplit=1)[0].replace("\n", " ")


def own_doc(value) -> str:
    doc = value.__dict__.get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    # dataclasses writes the signature there
    if doc and inspect.isclass(value) and dataclasses.is_dataclass(value) and doc.startswith(f"{value.__name__}("):
        doc = None
    return inspect.cleandoc(doc) if doc else ""


def source_link(module_name: str, name: str, label: str = "") -> str:
    page = source_notebooks()[module_name]
    return f"[{label or title_of(page)}](#{anchor(module_name, name)})"


def entry(kind: str, name: str, canonical: str, value, module, qualname: str, colons: int, inner: str = "",
          options=()) -> str:
    rows, returns, meaning = (parameters(value, module, qualname) if kind in ("function", "class", "method")
                              else ([], "", ""))
    text = own_doc(value)
    if kind == "class" and not rows and value.__init__ is object.__init__: sig = ""
    else: sig = signature(rows, returns) if kind in ("function", "class", "method") else ""
    if issubclass(value, Exception) if inspect.isclass(value) else False: kind, sig = "exception", ""
    fence = ":" * colons
    out = [f"{fence}{{py:{kind}}} {name}{sig}", *([f":canonical: {canonical}"] if canonical != name else []), *options,
           ""]
    raises = [s.strip()
              for s in re.findall(r"(?:^|(?<=[.!?\s]))(Raises `.+?(?:\.(?=\s|$)|$))", text, flags=re.S | re.M)]
    for sentence in raises: text = text.replace(sentence, "")
    if text.strip(): out += [prose(re.sub(r"[ \t]+\n", "\n", text).strip()), ""]
    if rows:
        out.append(table(rows, "field" if inspect.isclass(value) and dataclasses.is_dataclass(value) else "parameter"))
    facts = []
    if returns and returns != "None":
        facts.append(f"**Returns** {{anno}}`{returns}`" + (f": {prose(meaning)}" if meaning else ""))
    if kind in ("property", "attribute") and qualname: facts += _property_fact(value, module, qualname)
    facts += [f"**Raises** {prose(' '.join(s.split())[7:])}" for s in raises]
    if "." not in qualname: facts.append(f"**Source** {source_link(module.__name__.removeprefix('dmp_wb.'), qualname)}")
    out += [f + "\n" for f in facts]
    return "\n".join([*out, inner, fence, ""])


def _property_fact(value, module, qualname) -> list[str]:
    node = definition(module, qualname)
    returns = type_text(node.returns, module) if node else ""
    comment = (_docment(docments(inspect.unwrap(getattr(value, "fget", None) or value.func), full=True), "return")
               if node else "")
    return [f"**Value** {{anno}}`{returns}`" + (f": {prose(comment)}" if comment else "")] if returns else []


def members(cls, module, name: str) -> str:
    out = []
    for key, raw in cls.__dict__.items():
        if key.startswith("_"): continue
        qualname, options = f"{cls.__qualname__}.{key}", []
        value = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
        if isinstance(raw, property) or type(raw).__name__ == "cached_property": kind = "property"
        elif inspect.isfunction(value) or hasattr(value, "__wrapped__"):
            kind = "method"
            if isinstance(raw, classmethod): options.append(":classmethod:")
            if isinstance(raw, staticmethod): options.append(":staticmethod:")
        else: continue
        node = definition(module, qualname)
        if node is None: continue
        documented = inspect.getdoc(value) if "__doc__" in dir(value) else ""
        inherited = any(key in base.__dict__ for base in cls.__mro__[1:] if not base.__module__.startswith("dmp_wb"))
        # torch's and diffusers' own methods, done in our way
        if inherited and not ast.get_docstring(node): continue
        if not documented and not node.args.args[1:] and kind == "method" and inherited: continue
        out.append(entry(kind, f"{name}.{key}", f"{cls.__module__}.{qualname}", value, module, qualname, 4,
                         options=options))
    return "\n".join(out)


def public_name(module_name: str, name: str) -> str:
    return f"dmp_wb.{name}" if dmp_wb._PUBLIC.get(name) == module_name else f"dmp_wb.{module_name}.{name}"


def module_page(module_name: str, module) -> str:
    doc = (module.__doc__ or "").strip()
    page = source_notebooks()[module_name]
    names = names_of(module)
    entries = [n for n in names if is_entry(getattr(module, n), module)]
    values = [n for n in names if n not in entries]
    # not in the side bar of every page, which a hundred modules would fill: the table of the Python page leads here
    out = ["---", "orphan: true", "---", "", f"# {module_name}", "", f"> {prose(doc)}", "",
           f"Source notebook: [{title_of(page)}](../{page}.ipynb)", "",
           f"```{{py:module}} dmp_wb.{module_name}", "```", "", "```{py:currentmodule} None", "```", ""]
    if entries:
        out += [":::{div} names", "", "| name | |", "|---|---|"]
        out += [f"| {{py:obj}}`{n} <{public_name(module_name, n)}>` | {in_cell(prose(summary(getattr(module, n))))} |"
                for n in sorted(entries, key=lambda n: public_name(module_name, n).count("."))]
        out += ["", ":::", ""]
    for n in entries:
        value, name = getattr(module, n), public_name(module_name, n)
        is_class = inspect.isclass(value)
        out.append(entry("class" if is_class else "function", name, f"dmp_wb.{module_name}.{n}", value, module, n, 5,
                         inner=members(value, module, name) if is_class else ""))
    if values:
        out += ["## Values", ""]
        for n in values:
            text = repr(getattr(module, n))
            shown = textwrap.shorten(text, 160, placeholder=" …")
            out += [f"::::{{py:data}} {public_name(module_name, n)}", "",
                    *([code(shown), ""] if " at 0x" not in shown and "\\n" not in shown and "/" != shown[:1]
                      and "PosixPath" not in shown else []),
                    f"**Source** {source_link(module_name, n)}", "::::", ""]
    return "\n".join(out)


def reference_index() -> str:
    "The names users type, by module, and the modules."
    out = ["# Python", "", "> Everything that `import dmp_wb as wb` gives, and the modules behind it", "",
           "Names of the first table load on first use, from the module beside them.", "", ":::{div} names", "",
           "| name | | module |", "|---|---|---|"]
    for name, module_name in dmp_wb._PUBLIC.items():
        out.append(
            f"| {{py:obj}}`wb.{name} <dmp_wb.{name}>` | "
            f"{in_cell(prose(summary(getattr(modules()[module_name], name))))} | [{module_name}]({module_name}.md) |")
    out += ["", ":::", "", "## Modules", "", ":::{div} names", "", "| module | | source notebook |", "|---|---|---|"]
    out += [f"| [{n}]({n}.md) | {in_cell(prose((m.__doc__ or '').strip()))} | "
            f"[{title_of(source_notebooks()[n])}](../{source_notebooks()[n]}.ipynb) |" for n, m in modules().items()]
    out += ["", ":::", "", "```{py:module} dmp_wb", "```", ""]
    return "\n".join(out)


@cache
def cli():
    import typer
    return typer.main.get_command(importlib.import_module("dmp_wb.cli").app)


def commands() -> dict: return dict(sorted(cli().commands.items()))


def cli_page() -> str:
    out = ["# Command line", "", "> `dmp-wb`, and `python -m dmp_wb`, which is the same", "", prose(cli().help or ""),
           "", "| command | |", "|---|---|"]
    out += [f"| [`dmp-wb {name}`](#cli-{name}) | {in_cell(prose(summary_text(command.help or '')))} |"
            for name, command in commands().items()]
    out += ["", "`dmp-wb --version` prints the version, `dmp-wb --install-completion` sets up your shell's completion, "
            "and `--help` after any command prints what stands below.", ""]
    for name, command in commands().items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = " ".join([f"dmp-wb {name}", *(_metavar(p, command) for p in arguments),
                          *(f"{p.opts[0]} {_metavar(p, command)}".strip() for p in options if p.required),
                          *(["[OPTIONS]"] if any(not p.required for p in options) else [])])
        out += [f"(cli-{name})=", f"## dmp-wb {name}", "", "```console", f"$ {usage}", "```", "",
                prose(inspect.cleandoc(command.help or "")), ""]
        for title, params in (("argument", arguments), ("option", options)):
            if not params: continue
            lines = [f"| {title} | default | meaning |", "|---|---|---|"]
            for p in params:
                label = (code(in_cell(_metavar(p, command))) if title == "argument"
                         else " ".join(code(o) for o in [*p.opts, *p.secondary_opts])
                         + ("" if p.is_flag else f" {code(in_cell(_metavar(p, command)))}"))
                default = ("required" if p.required else "" if p.default is None or p.is_flag or callable(p.default)
                           else code(str(p.default)))
                lines.append(f"| {label} | {in_cell(default)} | {in_cell(prose(p.help or ''))} |")
            out += [":::{div} parameters", "", *lines, "", ":::", ""]
    return "\n".join(out)


def _metavar(param, command) -> str:
    "What stands for a value in a usage line, as `--help` has it."
    if param.param_type_name == "argument":
        return param.metavar or (param.name.upper() + ("..." if param.nargs == -1 else ""))
    if param.is_flag: return ""
    kind = typing.get_type_hints(inspect.unwrap(command.callback)).get(param.name, str)
    kinds = [k for k in typing.get_args(kind) if k is not type(None)] or [kind]
    return param.metavar or {str: "TEXT", int: "INTEGER", float: "FLOAT", Path: "PATH"}.get(kinds[0], "TEXT")


def summary_text(text: str) -> str:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])|\n\n", text.strip(), maxsplit=1)[0].replace("\n", " ")


def config_sections():
    "(section, dataclass, rows with full keys) of an experiment."
    from dmp_wb.config import Experiment
    rows, *_ = parameters(Experiment, sys.modules[Experiment.__module__], "Experiment")
    nested = {f.name: f
              for f in dataclasses.fields(Experiment) if dataclasses.is_dataclass(getattr(Experiment(), f.name))}
    yield "", Experiment, [r for r in rows if r.name not in nested], ""
    for name in nested:
        value = getattr(Experiment(), name)
        cls, home = type(value), sys.modules[type(value).__module__]
        inner, *_ = parameters(cls, home, cls.__qualname__)
        for row in inner: row.default = repr(getattr(value, row.name))
        yield name, cls, inner, next(r.meaning for r in rows if r.name == name)
    yield from method_sections()


def method_sections():
    "As `config_sections`, for the settings of each method that ships."
    from dmp_wb.methods.registry import method_entry, method_names
    for name in method_names():
        entry = method_entry(name)
        inner, *_ = parameters(entry.config, sys.modules[entry.config.__module__], entry.config.__qualname__)
        for row in inner: row.default = repr(getattr(entry.config(), row.name))
        yield f"methods.{name}", entry.config, inner, f"the method {entry.label}"


def config_page() -> str:
    out = ["# Experiment keys", "", "> Every key of an experiment file, its default and what it decides", "",
           "An experiment is a YAML file of these keys; what it leaves out has the default. On a command line, in "
           "`dmp-wb run` and in {py:obj}`wb.train <dmp_wb.train>` a key is written with dots: `optim.lr=2e-4`. "
           "`null` in YAML is `None` here.", ""]
    for name, cls, rows, meaning in config_sections():
        title = f"`{name}`" if name else "At the top"
        out += [f"(keys-{name or 'top'})=", f"## {title}", "",
                f"{prose(own_doc(cls))}" + (f" {prose(meaning[0].upper() + meaning[1:].rstrip('.'))}." if meaning
                                            else "") + f" From {{py:obj}}`~{full_public(cls)}`.", "",
                ":::{div} parameters", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for r in rows:
            key = f"{name}.{r.name}" if name else r.name
            out.append(f"| {{keydef}}`{key}` | {{anno}}`{in_cell(r.type)}` | "
                       f"{code(in_cell(r.default)) if r.default is not None else ''} | {in_cell(prose(r.meaning))} |")
        out += ["", ":::", ""]
    return "\n".join(out)


def full_public(cls) -> str: return public_name(cls.__module__.removeprefix("dmp_wb."), cls.__qualname__)


def write_pages(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"python": reference_index(), "commands": cli_page(), "keys": config_page(),
             **{n: module_page(n, m) for n, m in modules().items()}}
    for name, text in pages.items(): (folder / f"{name}.md").write_text(text, encoding="utf-8")


# -- links in Sphinx ---------------------------------------------------------------------------------------------------
@cache
def names() -> dict[str, tuple[str, str]]:
    "What can stand in backticks and become a link → (kind, target)."
    found: dict[str, tuple[str, str]] = {}
    owners: dict[str, list[str]] = {}
    for module_name, module in modules().items():
        for n in names_of(module):
            target = public_name(module_name, n)
            room = module_name.rpartition(".")[2]
            for text in (f"dmp_wb.{module_name}.{n}", f"{module_name}.{n}", f"wb.{module_name}.{n}", target):
                found[text] = ("py", target)
            for text in (f"{room}.{n}", f"wb.{room}.{n}"): found.setdefault(text, ("py", target))
            if dmp_wb._PUBLIC.get(n) == module_name: found[f"wb.{n}"] = ("py", target)
            owners.setdefault(n, []).append(target)
            value = getattr(module, n)
            if inspect.isclass(value):
                for key in re.findall(rf"\{{py:(?:method|property)\}} {re.escape(target)}\.(\w+)",
                                      members(value, module, target)):
                    owners.setdefault(f"{n}.{key}", []).append(f"{target}.{key}")
    for n, targets in owners.items():
        public = [t for t in targets if t == f"dmp_wb.{n}"]
        if n not in PLAIN_WORDS and (public or len(targets) == 1): found[n] = ("py", (public or targets)[0])
        elif n in PLAIN_WORDS and len(targets) == 1: found[f"{n}()"] = ("py", targets[0])
    for section, _, rows, _ in config_sections():
        for r in rows:
            if section: found.setdefault(f"{section}.{r.name}", ("key", f"{section}.{r.name}"))
    return found


def looked_up(text: str) -> tuple[str, str] | None:
    text = text.strip()
    command = re.match(r"dmp-wb ([a-z][a-z-]*)", text)
    if command: return ("cli", f"cli-{command[1]}") if command[1] in commands() else None
    if text in names(): return names()[text]
    call = re.fullmatch(r"([\w.]+)\((?:[^()]|\([^()]*\))*\)", text)
    if call: return names().get(call[1]) or names().get(f"{call[1]}()")
    key = re.fullmatch(r"([a-z_]+\.[a-z_0-9]+)(?:=|: ).*", text)
    if key and names().get(key[1], ("",))[0] == "key": return names()[key[1]]
    return None


class LinkBackticks(SphinxPostTransform):
    "A name of ours in backticks, anywhere in the prose, leads to its reference; a name of a library to that library's."
    default_priority = 5

    def run(self, **_):
        for node in list(self.document.findall(nodes.literal)):
            if (isinstance(node.parent, nodes.reference | addnodes.pending_xref | nodes.title)
                    or node.get("classes") and "nolink" in node["classes"]):
                continue
            cell = node.parent.parent
            # a table of parameters: its first column names them
            if (isinstance(cell, nodes.entry) and cell.parent.index(cell) == 0 and "." not in node.astext()
                    and isinstance(node.parent.parent.parent.parent, nodes.tbody) and node.astext().islower()):
                continue
            text = node.astext()
            found = looked_up(text)
            if found:
                kind, target = found
                domain, role = {"py": ("py", "obj"), "key": ("std", "confkey"), "cli": ("std", "ref")}[kind]
                options = {"refexplicit": True}
            elif re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", text) and self.outside(text.removesuffix("()")):
                (domain, role), target, options = (("py", "obj"), self.outside(text.removesuffix("()")),
                                                   {"refexplicit": True})
            else: continue
            xref = addnodes.pending_xref("", refdomain=domain, reftype=role, reftarget=target, refdoc=self.env.docname,
                                         refwarn=True, **options)
            node.replace_self(xref)
            xref += node

    def outside(self, text: str) -> str | None:
        "The full name of a class or function of another library, if an inventory has it."
        if len(text) < 5: return None
        names = getattr(self.app, "outside_names", None)
        if names is None:
            names = {}
            for kind, entries in getattr(self.env, "intersphinx_inventory", {}).items():
                if not kind.startswith("py:"): continue
                for full in entries:
                    names[full] = full
                    last = full.rpartition(".")[2]
                    if last[:1].isupper() and full.split(".")[0] in ("diffusers", "accelerate"):
                        names.setdefault(last, full)
            self.app.outside_names = names
        return names.get(text)


class Annotation(SphinxRole):
    "A type, each name in it a link."
    def run(self):
        literal = nodes.literal(classes=["py", "anno"])
        literal += _parse_annotation(self.text, self.env)
        return [literal], []


class KeyDefinition(SphinxRole):
    "A key of an experiment, with an anchor."
    def run(self):
        identifier = "key-" + self.text.replace(".", "-").replace("_", "-")
        literal = nodes.literal(self.text, self.text, ids=[identifier], classes=["nolink"])
        self.env.get_domain("std").note_object("confkey", self.text, identifier, location=literal)
        return [literal], []


def setup(app):
    app.add_object_type("confkey", "confkey", objname="experiment key")
    app.add_role("anno", Annotation())
    app.add_role("keydef", KeyDefinition())
    app.add_post_transform(LinkBackticks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
