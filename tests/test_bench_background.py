"""What goes on in a thread while a bench does something else."""

import threading

import pytest

from catdog.bench.background import Background


class Counting(Background):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.num, self.begun, self.is_closed = most, 0, threading.Event(), False

    def _run(self) -> None:
        while not self._done.wait(0.001):
            self.num += 1
            self.begun.set()
            if self.num > self.most:
                raise ValueError("too many")

    def _close(self) -> None:
        self.is_closed = True


def test_it_goes_on_until_the_block_ends() -> None:
    with Counting(10**9) as counting:
        assert counting.begun.wait(60)
        assert [counting.is_closed, is_running()] == [False, True]
    assert [counting.is_closed, is_running()] == [True, False]


@pytest.mark.parametrize(("block", "message"), [(None, "too many"), (ValueError("the block"), "the block")])
def test_an_error_of_the_thread_is_raised_unless_the_block_has_one(block: ValueError | None, message: str) -> None:
    counting = Counting(0)
    with pytest.raises(ValueError, match=f"^{message}$"):
        run(counting, block)
    assert counting.is_closed


def run(counting: Counting, error: ValueError | None) -> None:
    with counting:
        assert counting.begun.wait(60)
        if error is not None:
            raise error


def is_running() -> bool:
    return any(thread.name.startswith("catdog-counting") for thread in threading.enumerate())
