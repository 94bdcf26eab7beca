"""One forward and backward of several adapters' micro-batches, in smaller parts where memory runs out."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from moe_peft.data.dispatcher import MicroBatch, fuse
from moe_peft.model.batch import BatchConfig, ModelOutput
from moe_peft.model.llama import LlamaForCausalLM


@dataclass(frozen=True)
class Outcome:
    """What a micro-batch gives its adapter.

    Args:
        micro_batch: which one.
        loss: its part of the step's mean loss.
        aux_loss: its part of the step's router losses.
        gradients: one for each of the adapter's parameters, None where there is none.
        router_logits: of each routed layer, without gradient; None where there is no router.
        failure: why there are no gradients; None when all went well.
        is_fatal: whether it must fail again, however often it is tried.
    """

    micro_batch: MicroBatch
    loss: float = 0.0
    aux_loss: float = 0.0
    gradients: tuple[Tensor | None, ...] = ()
    router_logits: tuple[Tensor, ...] | None = None
    failure: str | None = None
    is_fatal: bool = False


def run_fused(
    model: LlamaForCausalLM,
    micro_batches: Sequence[MicroBatch],
    parameters: Mapping[str, Sequence[nn.Parameter]],
    say: Callable[[str], None],
    loss_scales: Mapping[str, float] = MappingProxyType({}),
) -> list[Outcome]:
    """Run micro-batches of different adapters through one forward and backward.

    When memory runs out, fewer adapters share a forward; only a lone adapter's micro-batch is split; and only when one
    sample alone does not fit does that adapter fail. Nothing is accumulated before a backward is through, so a part
    that is run again counts once.

    Args:
        model: with the adapters attached.
        micro_batches: at most one an adapter.
        parameters: each adapter's trainable parameters.
        say: takes the message of a split.
        loss_scales: what an adapter's loss is multiplied by on its way into the backward, and its gradients are divided
            by on their way out; an adapter that is not there has its loss taken as it is.

    Returns:
        One outcome a micro-batch, or one a part of it.
    """
    try:
        return _forward_backward(model, micro_batches, parameters, loss_scales)
    except torch.OutOfMemoryError:
        pass  # outside the handler, whose traceback would keep the failed forward's memory alive
    if len(micro_batches) > 1:
        middle = len(micro_batches) // 2
        groups: list[Sequence[MicroBatch]] = [micro_batches[:middle], micro_batches[middle:]]
    else:
        (micro_batch,) = micro_batches
        if len(micro_batch.samples) == 1:
            failure = f"a sample of {micro_batch.num_tokens} tokens does not fit into memory"
            return [Outcome(micro_batch, failure=failure, is_fatal=True)]
        say(f"{micro_batch.adapter}: out of memory, so a micro-batch of {len(micro_batch.samples)} samples is split")
        groups = [[part] for part in _halves(micro_batch)]
    return [outcome for group in groups for outcome in run_fused(model, group, parameters, say, loss_scales)]


def _forward_backward(
    model: LlamaForCausalLM,
    micro_batches: Sequence[MicroBatch],
    parameters: Mapping[str, Sequence[nn.Parameter]],
    loss_scales: Mapping[str, float],
) -> list[Outcome]:
    parts = [(BatchConfig(part.adapter, 0, 0, part.step, part.draw_index), part.samples) for part in micro_batches]
    # On the CPU: the model checks the tokens there without a wait, and takes them to its device.
    outputs = model(fuse(parts, torch.device("cpu")))
    shares = [_share_of_step(*pair) for pair in zip(micro_batches, outputs, strict=True)]
    values = torch.stack([torch.stack(share).detach() for share in shares]).tolist()  # one transfer from a GPU
    losses: list[Tensor] = []
    outcomes: list[Outcome] = []
    for micro_batch, output, share, value in zip(micro_batches, outputs, shares, values, strict=True):
        outcomes.append(_outcome(micro_batch, output, *value))
        if outcomes[-1].failure is None:
            loss = share[0] + share[1]
            scale = loss_scales.get(micro_batch.adapter)
            losses.append(loss if scale is None else loss * scale)
    if not losses:
        return outcomes
    # A loss that is not finite takes no part: zero times NaN would be NaN.
    healthy = [outcome.micro_batch.adapter for outcome in outcomes if outcome.failure is None]
    weights = [weight for name in healthy for weight in parameters[name]]
    found = iter(torch.autograd.grad(torch.stack(losses).sum(), weights, allow_unused=True))
    for i, outcome in enumerate(outcomes):
        if outcome.failure is None:
            name = outcome.micro_batch.adapter
            own = itertools.islice(found, len(parameters[name]))
            outcomes[i] = dataclasses.replace(outcome, gradients=_unscaled(own, loss_scales.get(name)))
    return outcomes


def _unscaled(gradients: Iterable[Tensor | None], scale: float | None) -> tuple[Tensor | None, ...]:
    if scale is None:
        return tuple(gradients)
    # In the parameters' own float32, and not in place: gradients may be views of one another.
    return tuple(None if gradient is None else gradient / scale for gradient in gradients)


def _share_of_step(micro_batch: MicroBatch, output: ModelOutput) -> tuple[Tensor, Tensor]:
    """The micro-batch's parts of its step's loss and router losses.

    The token losses count by the supervised tokens of the whole step, the router losses by this micro-batch's share of
    its tokens, so that cutting a step into micro-batches does not change its gradient (but for what router losses see
    of a batch at once).
    """
    loss = output.loss * (output.num_supervised_tokens / max(micro_batch.step_supervised, 1))
    aux_loss = output.aux_loss * (micro_batch.num_tokens / micro_batch.step_tokens)
    return loss, aux_loss


def _outcome(micro_batch: MicroBatch, output: ModelOutput, loss: float, aux_loss: float) -> Outcome:
    """What is known of a micro-batch before the backward."""
    failure = None
    if not (math.isfinite(loss) and math.isfinite(aux_loss)):
        failure = f"loss={loss} and aux_loss={aux_loss} must be finite"
    logits = output.router_logits
    routed = tuple(layer.detach() for layer in logits) if logits is not None else None
    return Outcome(micro_batch, loss=loss, aux_loss=aux_loss, router_logits=routed, failure=failure)


def _halves(micro_batch: MicroBatch) -> tuple[MicroBatch, MicroBatch]:
    middle = len(micro_batch.samples) // 2
    first, second = micro_batch.samples[:middle], micro_batch.samples[middle:]
    return (
        dataclasses.replace(micro_batch, samples=first, is_last=False, part=2 * micro_batch.part + 1),
        dataclasses.replace(micro_batch, samples=second, part=2 * micro_batch.part + 2),
    )
