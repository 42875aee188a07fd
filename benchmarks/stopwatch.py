"""Where the time of a step goes: functions of the package wrapped by a stopwatch, from outside."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock


class Stopwatch:
    """Seconds by name; of calls within calls, the inner one's time counts for the inner alone.

    Attributes:
        seconds: name -> seconds so far.
    """

    def __init__(self) -> None:
        """Start with nothing measured."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time counted under a name."""

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            start, outer, self._inner = time.perf_counter(), self._inner, 0.0
            try:
                return function(*arguments, **options)
            finally:
                whole = time.perf_counter() - start
                self.seconds[name] += whole - self._inner
                self._inner = outer + whole

        return timed

    @contextmanager
    def watch(self, places: Sequence[tuple[str, Any, str]]) -> Iterator[None]:
        """Time the functions at (name, owner, attribute) within a block."""
        with ExitStack() as stack:
            for name, owner, attribute in places:
                wrapped = self.wrap(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, wrapped))
            yield
