"""Batches on the devices, one ahead of the step, at the place of the batches that were taken."""

from collections.abc import Callable
from typing import Any

import grain


class Prefetched(grain.DatasetIterator):
    """A grain iterator whose next batch may be on the devices already.

    data: the iterator over host batches; put: a host batch → one on the devices.

    `fetch` loads one batch ahead and starts its transfer; `next` takes it. The state is the place
    after the last batch that was taken, as if nothing had been read ahead, so that a checkpoint may
    be saved at any moment.
    """

    def __init__(self, data: grain.DatasetIterator, put: Callable[[Any], Any]):
        super().__init__()
        self._data, self._put = data, put
        self._ahead: tuple[Any, Exception | None] | None = None
        self._place: dict | None = None

    def fetch(self) -> None:
        """Load the next batch and start its transfer, unless that is done already.

        What is wrong with it is raised by `next`: the steps before it are no concern of it.
        """
        if self._ahead is not None:
            return
        self._place = self._data.get_state()
        try:
            self._ahead = self._put(next(self._data)), None
        except Exception as error:
            self._ahead = None, error

    def __next__(self) -> Any:
        """The next batch, on the devices. Raises what reading or putting it raised."""
        self.fetch()
        batch, error = self._ahead
        if error is not None:
            raise error
        self._ahead = self._place = None
        return batch

    def get_state(self) -> dict:
        """The place after the last batch that was taken."""
        return self._data.get_state() if self._ahead is None else self._place

    def set_state(self, state: dict) -> None:
        """Go to a place; what was loaded ahead is dropped."""
        self._ahead = self._place = None
        self._data.set_state(state)
