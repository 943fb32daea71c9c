"""How stored numbers become a network's input."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

Number = TypeVar("Number")


class Scaling(NamedTuple):
    """`x * factor + shift`, applied on the device: rows travel as they are stored.

    >>> Scaling(-1 / 255, 1.0).apply(255.0)  # white paper becomes 0
    0.0
    """

    factor: float = 1.0
    shift: float = 0.0

    def apply(self, x: Number) -> Number:
        """The scaled values of a tensor, an array or a number."""
        return self._scaled(x, operator.mul, operator.add)

    def apply_(self, x: Number) -> Number:
        """The same in the memory of a tensor or an array."""
        return self._scaled(x, operator.imul, operator.iadd)

    def _scaled(self, x: Any, times: Callable[..., Any], plus: Callable[..., Any]) -> Any:
        if self.factor != 1.0:
            x = times(x, self.factor)
        return plus(x, self.shift) if self.shift != 0.0 else x


AS_STORED = Scaling()
PIXELS = Scaling(1 / 255)
SIGNED = Scaling(2 / 255, -1.0)  # colour images: -1 to 1, about centred
# Grey strokes on white paper, stored as LEAF has them, 255 the paper. With paper at 1, SGD
# makes no progress for twenty rounds; paper at 0 and strokes of about unit variance train at once.
INK = Scaling(-2.5 / 255, 2.5)
