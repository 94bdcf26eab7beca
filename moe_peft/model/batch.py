"""What goes into a forward and what comes out: the padding-free batch and its adapters' ranges.

Letters: T tokens of all samples, B samples, L padded length.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE_INDEX = -100
_INTEGERS = (torch.int32, torch.int64)
ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]+")
_EXPERT_NAME = re.compile(r"moe\.([A-Za-z0-9_-]+)\.experts\.(0|[1-9]\d*)")


def expert_name(task: str, index: int) -> str:
    """The name of one expert of a mixture, ``moe.{task}.experts.{index}``."""
    return f"moe.{task}.experts.{index}"


def parse_expert_name(name: str) -> tuple[str, int] | None:
    """The task and index in an expert's name; None when the name is not an expert's."""
    match = _EXPERT_NAME.fullmatch(name)
    return (match[1], int(match[2])) if match else None


@dataclass(frozen=True)
class BatchConfig:
    """A run of neighbouring samples that one adapter owns.

    Args:
        adapter_name: the adapter, ``""`` for the bare base model (its weights as they stand, while an adapter is merged
            into them), or one expert as ``moe.{task}.experts.{idx}``.
        batch_start_idx: first sample.
        batch_end_idx: one past the last sample.
        step: the adapter's optimizer step. With ``micro_batch`` it selects the draws of dropout and jitter, which
            depend on nothing else that changes: a training loop of your own advances it.
        micro_batch: which micro-batch of that step.
    """

    adapter_name: str
    batch_start_idx: int
    batch_end_idx: int
    step: int = 0
    micro_batch: int = 0


@dataclass(frozen=True)
class ModelInput:
    """A batch without padding: the tokens of all samples laid end to end.

    Args:
        input_ids: LongTensor ``[T]``.
        cu_seqlens: IntTensor ``[B+1]``; sample i is tokens ``cu_seqlens[i]:cu_seqlens[i+1]``.
        batch_configs_: adapters' runs of samples, in order, without gap or overlap.
        labels: LongTensor ``[T]`` aligned with input_ids (shifted inside), -100 where there is no loss; None: no loss.

    Raises:
        ValueError: when shapes, boundaries or runs do not fit together.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    batch_configs_: tuple[BatchConfig, ...]
    labels: Tensor | None = None
    boundaries_: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_configs_", tuple(self.batch_configs_))
        if self.input_ids.dim() != 1:
            raise ValueError(
                f"input_ids has shape {tuple(self.input_ids.shape)} but must be [T]; from_padded takes [B, L]"
            )
        for name, tensor in (("input_ids", self.input_ids), ("cu_seqlens", self.cu_seqlens), ("labels", self.labels)):
            if tensor is None and name == "labels":
                continue
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} is a {type(tensor).__name__} but must be a Tensor")
            if tensor.dtype not in _INTEGERS:
                raise ValueError(f"{name} has dtype {tensor.dtype} but must hold int32 or int64")
        num_tokens = self.input_ids.shape[0]
        if self.cu_seqlens.dim() != 1:
            raise ValueError(f"cu_seqlens has shape {tuple(self.cu_seqlens.shape)} but must be [B+1]")
        boundaries = tuple(int(edge) for edge in self.cu_seqlens.tolist())
        object.__setattr__(self, "boundaries_", boundaries)
        if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != num_tokens:
            raise ValueError(f"cu_seqlens={list(boundaries)} must run from 0 to T={num_tokens}")
        for sample, (start, end) in enumerate(itertools.pairwise(boundaries)):
            if end <= start:
                raise ValueError(f"cu_seqlens: sample {sample} spans {start}:{end}, but every sample needs a token")
        if self.labels is not None and self.labels.shape != self.input_ids.shape:
            raise ValueError(f"labels has shape {tuple(self.labels.shape)} but input_ids {tuple(self.input_ids.shape)}")
        self._check_runs(len(boundaries) - 1)

    def _check_runs(self, num_samples: int) -> None:
        expected = 0
        for config in self.batch_configs_:
            if config.batch_start_idx != expected or config.batch_end_idx <= expected:
                raise ValueError(
                    f"batch_configs_: {config.adapter_name!r} owns samples "
                    f"{config.batch_start_idx}:{config.batch_end_idx}, but must start at {expected} and not be empty"
                )
            expected = config.batch_end_idx
        if expected != num_samples:
            raise ValueError(f"batch_configs_ cover {expected} samples, but cu_seqlens has {num_samples}")

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        batch_configs_: Sequence[BatchConfig],
    ) -> "ModelInput":
        """Drop the padding of a rectangular batch.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]``, non-zero at real tokens; padding may stand on either side.
            labels: ``[B, L]`` or None.
            batch_configs_: as in the constructor.

        Raises:
            ValueError: on shapes that differ, a sample without tokens, or a hole in a sample's mask.
        """
        if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must be [B, L]"
            )
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)} must have the shape of input_ids {tuple(input_ids.shape)}")
        real = attention_mask.bool()
        padded = torch.nn.functional.pad(real.int(), (1, 1))
        if ((padded.diff(dim=1) != 0).sum(dim=1) > 2).any():
            raise ValueError("attention_mask: padding must stand before or after a sample, not inside it")
        cu_seqlens = torch.nn.functional.pad(real.sum(dim=1).cumsum(dim=0), (1, 0)).to(torch.int32)
        return cls(input_ids[real], cu_seqlens, tuple(batch_configs_), labels[real] if labels is not None else None)


@dataclass(frozen=True)
class ModelOutput:
    """What one batch config gets back.

    Args:
        adapter_name: as in its BatchConfig.
        loss: mean negative log-likelihood over the adapter's supervised tokens, scalar; 0 when there are none.
        aux_loss: router losses times their coefficients, scalar; 0 where there is no router.
        logits: ``[T_adapter, vocab]``, or None when not asked for.
        router_logits: one ``[T_adapter, E]`` a routed layer; None where there is no router.
        num_supervised_tokens: tokens that the loss is a mean over.
    """

    adapter_name: str
    loss: Tensor
    aux_loss: Tensor
    logits: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    num_supervised_tokens: int = 0


@dataclass(frozen=True)
class Segment:
    """The tokens of one BatchConfig inside the fused batch.

    Args:
        adapter_name: as in its BatchConfig.
        task: the adapter whose attention LoRA serves these tokens (an expert's task, else the adapter itself).
        start: first token.
        end: one past the last token.
        step: see BatchConfig.
        micro_batch: see BatchConfig.
    """

    adapter_name: str
    task: str
    start: int
    end: int
    step: int
    micro_batch: int


def segments_of(model_input: ModelInput) -> tuple[Segment, ...]:
    """The token ranges of the batch configs, in order."""
    edges = model_input.boundaries_
    segments = []
    for config in model_input.batch_configs_:
        expert = parse_expert_name(config.adapter_name)
        segments.append(
            Segment(
                adapter_name=config.adapter_name,
                task=expert[0] if expert else config.adapter_name,
                start=edges[config.batch_start_idx],
                end=edges[config.batch_end_idx],
                step=config.step,
                micro_batch=config.micro_batch,
            )
        )
    return tuple(segments)
