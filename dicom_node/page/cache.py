"""What was made before and may be asked for again, up to a size in bytes; what was asked for longest ago goes first."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

_T = TypeVar("_T")


class Cache(Generic[_T]):
    """Values by key. Safe to use from many threads; two that want the same at once may both make it.

    Parameters
    ----------
    most_bytes : of all values together
    size : bytes of a value

    """

    def __init__(self, most_bytes: int, size: Callable[[_T], int]) -> None:
        self._most_bytes, self._size = most_bytes, size
        self._values: OrderedDict[Hashable, tuple[_T, int]] = OrderedDict()
        self._lock = Lock()
        self.bytes = 0

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """Give the value of a key, made now if it is not there; one larger than all may be is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = make()
        size = self._size(value)
        with self._lock:
            if size <= self._most_bytes and key not in self._values:
                self._values[key] = value, size
                self.bytes += size
                while self.bytes > self._most_bytes:
                    self.bytes -= self._values.popitem(last=False)[1][1]
        return value
