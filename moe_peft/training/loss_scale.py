"""The factor on an adapter's loss that keeps float16 gradients from underflow, found by trial."""

from dataclasses import dataclass

FIRST = 2.0**16
FLOOR = 1.0
GROWTH_INTERVAL = 2000


@dataclass
class LossScale:
    """A dynamic loss scale by the rule of ``torch.amp.GradScaler``, kept by each adapter for itself.

    Gradients below 6e-8 are zero in float16. So the loss is multiplied by a large factor before the backward, and the
    adapter's float32 gradients are divided by it after. Where the factor makes them overflow, the optimizer step is
    left out and the factor halved; after ``GROWTH_INTERVAL`` steps without an overflow it is doubled. It is always a
    power of two, by which floating point multiplies and divides exactly.

    Args:
        value: the factor.
        num_skipped: optimizer steps left out so far.
        num_good: steps without an overflow since the factor last changed.
    """

    value: float = FIRST
    num_skipped: int = 0
    num_good: int = 0

    def grow(self) -> None:
        """Take in a step whose gradient was finite."""
        self.num_good += 1
        if self.num_good == GROWTH_INTERVAL:
            self.value *= 2
            self.num_good = 0

    def back_off(self) -> bool:
        """Take in a step whose gradient overflowed; False at the floor, where a smaller factor is of no help."""
        if self.value <= FLOOR:
            return False
        self.value /= 2
        self.num_skipped += 1
        self.num_good = 0
        return True
