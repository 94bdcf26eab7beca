"""What methods cost on a base model, side by side, before anything is trained."""

from moe_peft.comparison.compare import MethodCost, compare_methods

__all__ = ["MethodCost", "compare_methods"]
