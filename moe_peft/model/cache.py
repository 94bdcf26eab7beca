"""Keys and values of the tokens a generation has already seen.

Letters: B samples, H key-value heads, C capacity in tokens, d features per head, T new tokens of all samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_peft.model.config import LlamaConfig


class KVCache:
    """One preallocated ``[B, H, C, d]`` pair a layer; every sample fills its own row from the left.

    Args:
        config: the model's shape.
        num_samples: B.
        capacity: the most tokens a sample may reach.
        dtype: of keys and values.
        device: where they live.
    """

    def __init__(
        self, config: LlamaConfig, num_samples: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_samples, config.num_kv_heads, capacity, config.head_size)
        layers = range(config.num_hidden_layers)
        # Zeros, not empty: masked attention multiplies unwritten slots by zero, and 0 * NaN is NaN.
        self.keys_ = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values_ = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.lengths_ = [0] * num_samples
        self.capacity_ = capacity

    def write(self, layer_idx: int, keys: Tensor, values: Tensor, boundaries: Sequence[int]) -> None:
        """Put the new tokens of every sample behind its old ones; ``advance`` then makes them count.

        Args:
            keys: ``[T, H, d]``.
            values: ``[T, H, d]``.
            boundaries: first token of every sample, then T.

        Raises:
            ValueError: when a sample outgrows the capacity.
        """
        for sample, past in enumerate(self.lengths_):
            start, end = boundaries[sample], boundaries[sample + 1]
            total = past + end - start
            if total > self.capacity_:
                raise ValueError(f"sample {sample} reaches {total} tokens, but the cache holds {self.capacity_}")
            self.keys_[layer_idx][sample, :, past:total] = keys[start:end].transpose(0, 1)
            self.values_[layer_idx][sample, :, past:total] = values[start:end].transpose(0, 1)

    def begin(self, sample: int, prefix: Sequence[Tensor]) -> None:
        """Let an empty row begin with keys and values that are no token's.

        Args:
            sample: the row.
            prefix: ``[2, V, H, d]`` a layer: keys, then values.

        Raises:
            ValueError: when they are more than the capacity.
        """
        length = prefix[0].shape[1]
        if length > self.capacity_:
            raise ValueError(f"sample {sample} begins with {length} tokens, but the cache holds {self.capacity_}")
        for layer_idx, (keys, values) in enumerate(prefix):
            self.keys_[layer_idx][sample, :, :length] = keys.transpose(0, 1)
            self.values_[layer_idx][sample, :, :length] = values.transpose(0, 1)
        self.lengths_[sample] = length

    def advance(self, boundaries: Sequence[int]) -> None:
        """Count the tokens written in this forward."""
        self.lengths_ = [past + boundaries[i + 1] - boundaries[i] for i, past in enumerate(self.lengths_)]

    def keep(self, samples: Sequence[int]) -> None:
        """Forget all samples but these, which take the places 0, 1, ... in this order."""
        if list(samples) == list(range(len(self.lengths_))):
            return
        rows = torch.tensor(list(samples), device=self.keys_[0].device)
        self.keys_ = [keys.index_select(0, rows) for keys in self.keys_]
        self.values_ = [values.index_select(0, rows) for values in self.values_]
        self.lengths_ = [self.lengths_[sample] for sample in samples]
