"The house: wings import only from wings above them, in no circle; no room outside methods/ names a method; sizes."
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dmp_wb as wb
from dmp_wb.methods.registry import method_entry, method_names

PACKAGE = Path(wb.__file__).parent
WINGS = ("core", "models", "methods", "diffusion", "tasks", "data", "config", "store", "training", "evaluation",
         "batch", "look", "cli")
ROOMS = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
         if path.name not in ("__init__.py", "_modidx.py", "_names.py") and path.parent != PACKAGE
         or path.name == "cli.py"}


def imported(room: str, path: Path, everywhere: bool = False) -> set[str]:
    "The rooms that a room imports: at its top, or also inside its functions."
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if not isinstance(node, ast.ImportFrom): continue
        base = room.split(".")[:-node.level] if node.level else []
        module = ".".join([*base, *(node.module or "").removeprefix("dmp_wb").strip(".").split(".")]).strip(".")
        if node.level == 0 and not (node.module or "").startswith("dmp_wb"): continue
        found |= {module} if module in ROOMS else {f"{module}.{a.name}".strip(".") for a in node.names} & ROOMS.keys()
    return found


def test_a_wing_imports_only_from_wings_above_it():
    place = {wing: i for i, wing in enumerate(WINGS)}
    up = [f"{room} imports {other}" for room, path in ROOMS.items() for other in imported(room, path, everywhere=True)
          if place[other.split(".")[0]] > place[room.split(".")[0]]]
    assert not up
    assert len(ROOMS) > 60 and imported("training.loop", ROOMS["training.loop"])   # the graph is there


def test_rooms_import_each_other_in_no_circle():
    graph, done = {room: imported(room, path) for room, path in ROOMS.items()}, set()

    def walk(room: str, trail: tuple[str, ...]):
        assert room not in trail, " → ".join([*trail[trail.index(room):], room])
        if room in done: return
        for other in graph[room]: walk(other, (*trail, room))
        done.add(room)
    for room in graph: walk(room, ())


def strings_and_names(path: Path) -> set[str]:
    "Identifiers, attributes and texts of a module's code, without its docstrings."
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    docs = {id(node.body[0].value)
            for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
            and node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name): found.add(node.id)
        elif isinstance(node, ast.Attribute): found.add(node.attr)
        elif isinstance(node, ast.ImportFrom): found |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found.add(node.value)
    return found


@pytest.mark.parametrize("wing", [w for w in WINGS if w not in ("methods", "cli")])
def test_no_room_outside_methods_names_a_method(wing):
    names = {n for n in method_names() if method_entry(n).method.__class__ is str}
    classes = {method_entry(n).method.partition(":")[2] for n in names} | {method_entry(n).config.__name__
                                                                           for n in names}
    rooms = {method_entry(n).method.partition(":")[0].rpartition(".")[2] for n in names}
    told = []
    for room, path in ROOMS.items():
        if room.split(".")[0] != wing or room in ALLOWED: continue
        for word in strings_and_names(path):
            imports = re.search(rf"methods\.({'|'.join(rooms)})\.", word)
            if word in names | classes or imports: told.append(f"{room}: {word}")
    assert not told


ALLOWED = {
    "look.gate_explorer": "an explorer of gates, which a person opens for that method",
    "look.routing_explorer": "an explorer of routes, likewise",
    "models.weights": "tensors that the released codes add to a DiT's state dict",
    "models.dit": "the table of masks in a checkpoint that the code of DTR wrote",
}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_room_is_longer_than_450_lines(room):
    assert len(ROOMS[room].read_text(encoding="utf-8").splitlines()) <= 450


def test_a_room_that_nobody_imported_is_found_by_its_wing():
    done = subprocess.run([sys.executable, "-c", "import dmp_wb as wb; print(wb.look.viz.film_strip.__name__)"],
                          capture_output=True, text=True)
    assert done.stdout.strip() == "film_strip", done.stderr
