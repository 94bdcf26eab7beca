"""A base model from disk: built without memory, then filled one tensor at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moe_peft.io.checkpoint import Checkpoint, check_shapes
from moe_peft.io.gguf_model import open_gguf
from moe_peft.io.hf_weights import open_hf_folder
from moe_peft.io.placement import native_dtype, parse_device, parse_dtype
from moe_peft.io.source import resolve_source
from moe_peft.model.config import LlamaConfig
from moe_peft.model.llama import LlamaForCausalLM


def load_base_model(
    source: str | Path, dtype: str | torch.dtype = "auto", device: str | int | torch.device = "auto"
) -> LlamaForCausalLM:
    """A frozen base model, in evaluation mode.

    Peak memory is the weights in their target dtype and little more: the files are memory-mapped, and each tensor is
    converted on its way into its place.

    Args:
        source: a Hugging Face folder, a ``.gguf`` file, a Hub id, or ``smollm2-135m``.
        dtype: a torch dtype or its name. ``auto``: the checkpoint's own where the device computes in it natively;
            else float16 for bfloat16 on a GPU, and float32 otherwise. bfloat16 stands for the own dtype of a quantized
            GGUF file.
        device: a torch device or its name. ``auto``: the first CUDA GPU, else the CPU.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: an unknown dtype or device, an architecture or option that is not supported, or weights that are
            truncated, corrupted, missing, superfluous or of the wrong shape.
    """
    wanted_dtype, target_device = parse_dtype(dtype), parse_device(device)
    with _opened(resolve_source(source)) as checkpoint:
        target_dtype = wanted_dtype or native_dtype(checkpoint.dtype, target_device)
        model = _empty_model(checkpoint)
        _fill(model, checkpoint, target_dtype, target_device)
    model.source_ = str(source)
    return model.eval()


@dataclass(frozen=True)
class BaseModelShape:
    """What is known of a base model before its weights are read.

    Args:
        config: the model's sizes.
        dtype: that its weights would have.
        device: where they would go.
    """

    config: LlamaConfig
    dtype: torch.dtype
    device: torch.device

    def empty_model(self) -> LlamaForCausalLM:
        """The model on the meta device, to count with; adapters attached within ``without_memory`` join it there."""
        with without_memory():
            return LlamaForCausalLM(self.config).to(self.dtype)


def read_base_model_shape(
    source: str | Path, dtype: str | torch.dtype = "auto", device: str | int | torch.device = "auto"
) -> BaseModelShape:
    """What ``load_base_model`` would load, from the files' headers alone.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: as ``load_base_model``, but for what only the weights themselves show.
    """
    wanted_dtype, target_device = parse_dtype(dtype), parse_device(device)
    with _opened(resolve_source(source)) as checkpoint:
        _check_tensors(_empty_model(checkpoint), checkpoint)
        return BaseModelShape(
            checkpoint.config, wanted_dtype or native_dtype(checkpoint.dtype, target_device), target_device
        )


def stored_dtype(source: str | Path) -> torch.dtype:
    """The dtype that a base model is stored in; bfloat16 of a quantized GGUF file.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: as ``load_base_model``, but for what only the weights show.
    """
    with _opened(resolve_source(source)) as checkpoint:
        return checkpoint.dtype


def _opened(path: Path) -> AbstractContextManager[Checkpoint]:
    return open_hf_folder(path) if path.is_dir() else open_gguf(path)


@contextmanager
def without_memory() -> Iterator[None]:
    """What is built within goes to the meta device, its initial values not drawn."""
    with torch.device("meta"), _NoInitialWeights():
        yield


class _NoInitialWeights(TorchFunctionMode):
    """Skips ``torch.nn.init`` and random draws: there is nothing to initialize, and doing so on meta tensors imports
    torch's compiler (1.6 s and 77 MB)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        if getattr(func, "__name__", None) in ("normal_", "uniform_"):
            return args[0]
        return func(*args, **(kwargs or {}))


def _empty_model(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """The model on the meta device; sizes out of a garbled config are refused before they take time or memory."""
    num_layers, num_tensors = checkpoint.config.num_hidden_layers, len(checkpoint.shapes)
    if num_layers > num_tensors:
        raise ValueError(f"{checkpoint.path} has {num_tensors} tensors, too few for {num_layers} layers")
    try:
        with without_memory():
            return LlamaForCausalLM(checkpoint.config)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{checkpoint.path}: no model has the sizes of {checkpoint.config} ({reason})") from error


def _check_tensors(model: LlamaForCausalLM, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes, which are those of the file."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied head stands once
    expected = {checkpoint.name_of(name): shape for name, shape in shapes.items()}
    check_shapes(checkpoint.path, expected, checkpoint.shapes)
    return shapes


def _fill(model: LlamaForCausalLM, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    for name, shape in _check_tensors(model, checkpoint).items():
        weight = torch.empty(shape, dtype=dtype, device=device)
        checkpoint.copy_into(checkpoint.name_of(name), weight)
        module_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module_name), attribute, nn.Parameter(weight, requires_grad=False))
    if checkpoint.config.tie_word_embeddings:
        model.lm_head_.weight = model.embed_tokens.weight
