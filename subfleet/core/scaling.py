"""How stored numbers become a network's input."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

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
        if self.factor != 1.0:
            x = x * self.factor  # type: ignore[operator]
        if self.shift != 0.0:
            x = x + self.shift  # type: ignore[operator]
        return x

    def apply_(self, x: Tensor) -> Tensor:
        """The same in the tensor's own memory."""
        if self.factor != 1.0:
            x = x.mul_(self.factor)
        if self.shift != 0.0:
            x = x.add_(self.shift)
        return x


AS_STORED = Scaling()
PIXELS = Scaling(1 / 255)
SIGNED = Scaling(2 / 255, -1.0)  # colour images: -1 to 1, about centred
# Grey strokes on white paper, stored as LEAF has them, 255 the paper. With paper at 1, SGD
# makes no progress for twenty rounds; paper at 0 and strokes of about unit variance train at once.
INK = Scaling(-2.5 / 255, 2.5)
