"""Write docs/inventories/*.inv from names.txt beside them:
what Sphinx's intersphinx reads, for libraries that publish none, or more than we need.

    python docs/make_inventories.py            # write
    python docs/make_inventories.py --check    # fail if one is not what names.txt says
"""
import re
import sys
import zlib
from pathlib import Path

FOLDER = Path(__file__).parent / "inventories"


def inventories() -> dict[str, tuple[str, list[str]]]:
    "library → (address, lines of its inventory)"
    found: dict[str, tuple[str, list[str]]] = {}
    for line in (FOLDER / "names.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"): continue
        if head := re.fullmatch(r"\[(\w+)\] (https://\S+/)", line):
            entries = found.setdefault(head[1], (head[2], []))[1]
            continue
        rule = re.fullmatch(r"(class|function|data|exception) (\S+): (.+)", line)
        if not rule: raise SystemExit(f"error: names.txt: {line!r} is no rule: kind page#anchor: names")
        for name in rule[3].split():
            module, _, last = name.rpartition(".")
            entries.append(f"{name} py:{rule[1]} 1 {rule[2].format(name=name, last=last, module=module)} -")
    return found


def packed(library: str, entries: list[str]) -> bytes:
    head = (f"# Sphinx inventory version 2\n# Project: {library}\n# Version: \n# The remainder of this file is "
            f"compressed using zlib.\n")
    return head.encode() + zlib.compress("".join(f"{e}\n" for e in sorted(entries)).encode(), 9)


def main() -> int:
    wrong = []
    for library, (_, entries) in inventories().items():
        file, content = FOLDER / f"{library}.inv", packed(library, entries)
        if "--check" not in sys.argv: file.write_bytes(content); print(f"{file.name}: {len(entries)} names")
        elif not file.exists() or zlib.decompress(file.read_bytes().split(b"zlib.\n", 1)[1]) != zlib.decompress(
                content.split(b"zlib.\n", 1)[1]):
            wrong.append(file.name)
    if wrong:
        print(f"error: {', '.join(wrong)} and names.txt disagree: run python docs/make_inventories.py", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__": sys.exit(main())
