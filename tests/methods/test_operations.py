"A patched forward pass does at most 1.05 times the operations of a plain one, on a tiny model of every class."
import pytest
from benchmarks import operations

CASES = operations.cases()


@pytest.mark.parametrize("name", list(CASES))
def test_a_patch_adds_few_operations(name):
    build, inputs, size = CASES[name]
    patched, table, _ = operations.added(build(), inputs(), size)
    assert patched <= 1.05 and table <= 1.01
