"""Small random models, adapters and batches that the tests share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_peft import BatchConfig, LlamaConfig, LlamaForCausalLM, ModelInput

IGNORE = -100
VOCAB = 61


def tiny_config(**changes) -> LlamaConfig:
    """Two layers, grouped heads, sizes that divide nothing evenly."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 38,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**fields, **changes})


def tiny_model(
    config: LlamaConfig | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LlamaForCausalLM:
    """A model whose every weight, norms and biases included, is random; in eval mode."""
    model = LlamaForCausalLM(config or tiny_config())
    randomize(dict(model.named_parameters()), seed)
    return model.to(dtype).eval()


def randomize(weights: dict[str, Tensor], seed: int, std: float = 0.25) -> None:
    """Fill weights in the order of their names: matrices and biases around 0, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(weights):
            values = torch.randn(weights[name].shape, generator=generator, dtype=torch.float64).mul_(std)
            weights[name].copy_(values + 1 if "norm" in name else values)


def add_random_adapter(model: LlamaForCausalLM, name: str, config: object, *, seed: int = 0, std: float = 0.2) -> None:
    """Attach an adapter whose every weight is random, so that no factor hides behind a zero."""
    model.add_adapter(name, config, seed=seed)
    randomize(model.adapter_state(name), seed + 1, std)


def random_samples(lengths: Sequence[int], *, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    """Token ids of samples with these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


@dataclass(frozen=True)
class Run:
    """One batch config to be: an adapter's samples, their labels (None: every token), and its place in its training."""

    adapter_name: str
    samples: list[list[int]]
    labels: list[list[int]] | None = None
    step: int = 0
    micro_batch: int = 0

    def unlabelled(self) -> "Run":
        """The same samples without any label."""
        return replace(self, labels=[[IGNORE] * len(sample) for sample in self.samples])


def random_run(name: str, lengths: Sequence[int], *, seed: int = 0, step: int = 0, micro_batch: int = 0) -> Run:
    """Random samples of which about a third of the tokens carry no label."""
    samples = random_samples(lengths, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    labels = [
        [IGNORE if drop else token for token, drop in zip(sample, dropped, strict=True)]
        for sample in samples
        for dropped in [(torch.rand(len(sample), generator=generator) < 0.3).tolist()]
    ]
    return Run(name, samples, labels, step, micro_batch)


def fuse(*runs: Run, with_labels: bool = True) -> ModelInput:
    """One batch of these runs, in this order."""
    configs: list[BatchConfig] = []
    samples: list[list[int]] = []
    labels: list[int] = []
    for run in runs:
        first = len(samples)
        samples += run.samples
        configs.append(BatchConfig(run.adapter_name, first, len(samples), run.step, run.micro_batch))
        labels += [label for sample in run.labels or run.samples for label in sample]
    ends = torch.tensor([0] + [len(sample) for sample in samples]).cumsum(0)
    return ModelInput(
        input_ids=torch.tensor([token for sample in samples for token in sample]),
        cu_seqlens=ends.to(torch.int32),
        batch_configs_=tuple(configs),
        labels=torch.tensor(labels) if with_labels else None,
    )


def backward(outputs: Sequence) -> None:
    """One backward over every run's loss and router losses."""
    sum(output.loss + output.aux_loss for output in outputs).backward()


def gradients(model: LlamaForCausalLM, name: str) -> dict[str, Tensor]:
    """Copies of an adapter's gradients, all of which must be there."""
    found = model.adapter_gradients(name)
    assert found
    assert all(grad is not None for grad in found.values()), f"{name} has weights without a gradient"
    return {key: grad.clone() for key, grad in found.items()}


def clear_gradients(model: LlamaForCausalLM) -> None:
    """Forget the gradients of every adapter."""
    model.zero_grad(set_to_none=True)


def run_step(model: LlamaForCausalLM, *runs: Run) -> tuple[list, dict[str, dict[str, Tensor]]]:
    """Outputs with logits of one fused forward, and after its backward the gradients of every adapter in it."""
    clear_gradients(model)
    outputs = model(fuse(*runs), return_logits=True)
    names = {run.adapter_name for run in runs if run.adapter_name in model.adapter_names}
    if any(output.loss.requires_grad for output in outputs):
        backward(outputs)
    found = {name: gradients(model, name) for name in sorted(names)}
    clear_gradients(model)
    return outputs, found


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest error at most ``tolerance`` times the largest expected value, or times one if that is larger."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert actual.isfinite().all(), f"{what} is not finite"
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3e} above {allowed:.3e}"


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, what: str = "", floor: float = 0.0) -> None:
    """Error's norm at most ``tolerance`` times the expected norm, or times ``floor`` if that is larger."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).norm().item()
    allowed = tolerance * max(expected.norm().item(), floor)
    assert error <= allowed, f"{what}: error {error:.3e} above {allowed:.3e}"


def assert_same_output(fused, solo, what: str) -> None:
    """One batch config's output in a fused batch and alone."""
    assert fused.adapter_name == solo.adapter_name
    assert fused.num_supervised_tokens == solo.num_supervised_tokens
    assert_close(fused.logits, solo.logits, 1e-5, f"{what}, logits")
    assert_close(fused.loss, solo.loss, 1e-5, f"{what}, loss")
    assert_close(fused.aux_loss, solo.aux_loss, 1e-5, f"{what}, aux loss")
    assert (fused.router_logits is None) == (solo.router_logits is None)
    for left, right in zip(fused.router_logits or (), solo.router_logits or (), strict=True):
        assert_close(left, right, 1e-5, f"{what}, router logits")


def assert_same_gradients(fused: dict[str, Tensor], solo: dict[str, Tensor], what: str) -> None:
    """The issue's measure: per tensor at most 1e-5 of its norm, or of a thousandth of the adapter's norm."""
    assert fused.keys() == solo.keys()
    total = torch.stack([gradient.norm() for gradient in solo.values()]).norm().item()
    assert math.isfinite(total)
    assert total > 1e-3
    for key, gradient in fused.items():
        assert_relative(gradient, solo[key], 1e-5, f"{what}, {key}", floor=1e-3 * total)


def assert_nothing_is_shared(model: LlamaForCausalLM, *runs: Run) -> None:
    """A fused batch is what each run is alone (float32); NaN in the first adapter's weights leaves the others' bits."""
    outputs, fused = run_step(model, *runs)
    if model.dtype == torch.float32:
        for run, output in zip(runs, outputs, strict=True):
            (alone,), solo = run_step(model, run)
            assert_same_output(output, alone, run.adapter_name)
            if run.adapter_name:
                assert_same_gradients(fused[run.adapter_name], solo[run.adapter_name], run.adapter_name)
    for weight in model.adapter_state(runs[0].adapter_name).values():
        weight.fill_(math.nan)
    poisoned, after = run_step(model, *runs)
    assert not torch.equal(poisoned[0].logits, outputs[0].logits)
    for before, now in zip(outputs[1:], poisoned[1:], strict=True):
        assert torch.equal(before.logits, now.logits)
        for key, gradient in after.get(now.adapter_name, {}).items():
            assert torch.equal(gradient, fused[now.adapter_name][key]), key


def assert_error_like(
    actual: Tensor, reference: Tensor, truth: Tensor, dtype: torch.dtype, what: str = "", floor: float = 0.0
) -> None:
    """Our error is at most a plain computation's in the same dtype and half a rounding, both against the truth.

    Args:
        floor: norm of the terms that cancel in the result; what they round off stays in it.
    """
    assert actual.dtype == reference.dtype, f"{what}: {actual.dtype} is not {reference.dtype}"
    ours, theirs = ((side.detach().double() - truth.double()).norm().item() for side in (actual, reference))
    allowed = 1.2 * theirs + 0.5 * torch.finfo(dtype).eps * max(truth.norm().item(), floor)
    assert ours <= allowed, f"{what}: error {ours:.3e} above {allowed:.3e}; the plain computation's is {theirs:.3e}"
