"""Functions of other packages, replaced for one context."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from cggr_compile.scoped_patch import ScopedPatch


@pytest.fixture
def module():
    return SimpleNamespace(__name__="elsewhere", double=lambda x: 2 * x)


@pytest.fixture
def patch(module):
    return ScopedPatch(module, "double", lambda original, x: original(x) + 1)


def test_inside_and_outside(module, patch):
    original = module.double
    with patch():
        assert module.double(3) == 7
        with patch():
            assert module.double(3) == 7
        assert module.double(3) == 7
    assert module.double is original and module.double(3) == 6


def test_restored_after_an_exception(module, patch):
    original = module.double
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert module.double is original


def test_other_threads_get_the_original(module, patch):
    found = []
    with patch():
        thread = threading.Thread(target=lambda: found.append(module.double(3)))
        thread.start()
        thread.join()
    assert found == [6]


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_overlapping_blocks_of_two_threads(module, patch, first_to_leave):
    """Each sees its own; the last to leave restores. Saving and restoring in turn would leave one replaced for good."""
    original, found = module.double, []
    entered, leave = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]

    def run(number):
        with patch():
            entered[number].set()
            assert leave[number].wait(10)
            found.append(module.double(3))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread, event in zip(threads, entered, strict=True):
        thread.start()
        assert event.wait(10)
    for number in (first_to_leave, 1 - first_to_leave):
        assert module.double(3) == 6 and module.double is not original
        leave[number].set()
        threads[number].join()
    assert found == [7, 7] and module.double is original


def test_what_somebody_else_puts_there_stays(module, patch):
    with patch():
        ours = module.double
        module.double = theirs = lambda x: 10 * ours(x)
        assert module.double(3) == 70
    assert module.double is theirs and module.double(3) == 60
    with patch():  # around theirs, which still calls what was ours
        assert module.double(3) == 71
    assert module.double is theirs and module.double(3) == 60
