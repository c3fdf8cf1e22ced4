"""Run pages on the second device: `python tools/second_device/pages.py nbs/tutorials/explore.ipynb …`.

A first cell registers the device, which `torch.accelerator` then finds as it finds a GPU, so a page runs there unless
it says otherwise; processes that a page starts stay on the CPU. Ends with status 1 if a page fails. Nothing is written.
"""
import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
FIRST = f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport second_device, dmp_wb as wb\n"
FIRST += "assert wb.load_model('digits-base').device.type == 'emu'"

def run(page: Path, folder: Path) -> str:
    "Execute a page's cells, its working folder that of the project; what went wrong, or nothing."
    book = nbformat.read(page, as_version=4)
    book.cells = [nbformat.v4.new_code_cell(FIRST), *book.cells]
    os.environ["DMP_WB_RUNS"] = str(folder)
    try: NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(page.parent)}}).execute()
    except CellExecutionError as e: return str(e)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    failed = 0
    for page in parser.parse_args().pages:
        with tempfile.TemporaryDirectory() as folder: error = run(page, Path(folder))
        print(f"{page}  {'FAILED' if error else 'runs'}\n{error[-4000:]}".strip(), flush=True)
        failed += bool(error)
    return int(failed > 0)


if __name__ == "__main__": sys.exit(main())
