"""On a GPU, by way of a second device that needs none:
the files `on_second_device*.py`, in one process for all, since the device stays registered."""
import ast
import os
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("on_second_device*.py"))
CASES = [n.name for file in FILES for n in ast.parse(file.read_text(encoding="utf-8")).body
         if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]


PAGES = ("explore", "pictures", "route")   # `tools/second_device/pages.py` takes any; others train for minutes


@pytest.fixture(scope="module")
def built():
    "Skips where the device cannot be built."
    from shutil import which
    if not any(map(which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        if os.environ.get("DMP_WB_REQUIRE_COMPILER"):
            pytest.fail("no C++ compiler on this machine: apt-get install g++")
        pytest.skip("no C++ compiler on this machine: apt-get install g++")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("no headers of this Python: apt-get install python3-dev")


@pytest.fixture(scope="module")
def outcomes(built, tmp_path_factory):
    "What each of the cases came to: None, or what went wrong."
    report = tmp_path_factory.mktemp("second") / "report.xml"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
                           f"--junitxml={report}", *map(str, FILES)], cwd=HERE.parent,
                          env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}, capture_output=True,
                          text=True)
    assert report.exists(), (done.stdout + done.stderr)[-3000:]
    found: dict = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name, wrong = case.get("name").partition("[")[0], [e.text for e in case if e.tag in ("failure", "error")]
        found.setdefault(name, []).extend(wrong)
    assert found, (done.stdout + done.stderr)[-3000:]
    return found


@pytest.mark.parametrize("case", CASES)
def test_on_a_second_device(case, outcomes): assert outcomes[case] == [], "\n".join(outcomes[case])


def test_tutorials_run_on_a_second_device(outcomes):
    "After the cases, which have compiled the device."
    tool = HERE.parent / "tools" / "second_device" / "pages.py"
    pages = [str(HERE.parent / "nbs" / "tutorials" / f"{page}.ipynb") for page in PAGES]
    done = subprocess.run([sys.executable, str(tool), *pages], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(" runs") == len(PAGES), done.stdout + done.stderr[-2000:]
