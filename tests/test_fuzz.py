"Broken files and words are accepted or refused in one line: some of each kind, and what was found before."
from pathlib import Path

import pytest
from fuzz import Fuzzer, run_kind

CORPUS = Path(__file__).parent / "corpus"
KINDS = sorted(name.removeprefix("break_") for name in dir(Fuzzer) if name.startswith("break_"))
INPUTS = 30   # of each kind, the same ones each time; `python tools/fuzz.py --inputs 20000` looks further


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    (folder := tmp_path_factory.mktemp("fuzz") / "valid").mkdir()
    return Fuzzer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_input_is_accepted_or_refused_in_one_line(fuzzer, kind):
    assert run_kind(fuzzer, kind, INPUTS, seed=0) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_found_stays_mended(fuzzer, kind):
    found = sorted((CORPUS / kind).glob("*.bin"))
    assert run_kind(fuzzer, kind, len(found), inputs=[f.read_bytes() for f in found]) == []


def test_the_fuzzer_sees_a_traceback_a_forged_line_a_hang_and_a_dead_process(fuzzer, monkeypatch):
    import os
    import time

    import fuzz
    from dmp_wb.core.errors import BadInput
    class Forged(BadInput):
        def __str__(self): return "a\nerror: b"   # which a `BadInput` itself would escape
    def forged(data, folder): raise Forged
    monkeypatch.setattr(fuzz, "PATIENCE", 1)
    for reader, fault in ((lambda data, folder: 1 / 0, "ZeroDivisionError"), (forged, "a message holds"),
                          (lambda data, folder: time.sleep(9), "no answer within 1 s"),
                          (lambda data, folder: os.kill(os.getpid(), 9), "died of SIGKILL")):
        monkeypatch.setitem(fuzzer.kinds, "words", (fuzzer.kinds["words"][0], reader))
        [(number, said)] = run_kind(fuzzer, "words", 1)
        assert number == 0 and fault in said
