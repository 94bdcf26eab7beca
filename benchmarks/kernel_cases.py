"""A case of every operation of kernels/, at a model's shapes.

Letters: T tokens, D model, F ffn, V vocabulary, H query heads, G key-value heads, d features of a head, E experts,
K top-k, R rank, B samples.
"""

from collections.abc import Callable
from itertools import pairwise

import naive
import torch
from kernel_case import Case, Inputs, Sizes, Tensors
from torch import Tensor

from moe_peft.kernels.causal_attention import reference as causal_attention_reference
from moe_peft.kernels.causal_attention.op import causal_attention
from moe_peft.kernels.frozen_linear.op import frozen_linear
from moe_peft.kernels.grouped_matmul import reference as grouped_matmul_reference
from moe_peft.kernels.grouped_matmul.op import grouped_matmul, sort_by_group
from moe_peft.kernels.linear_cross_entropy import reference as linear_cross_entropy_reference
from moe_peft.kernels.linear_cross_entropy.op import linear_cross_entropy
from moe_peft.kernels.lora_linear import reference as lora_linear_reference
from moe_peft.kernels.lora_linear.op import lora_linear
from moe_peft.kernels.lora_linear.ranges import LoraRange
from moe_peft.kernels.mixlora_ffn import reference as mixlora_ffn_reference
from moe_peft.kernels.mixlora_ffn.inputs import ExpertFactors, FfnInputs
from moe_peft.kernels.mixlora_ffn.op import mixlora_ffn
from moe_peft.kernels.recompute import Recomputable
from moe_peft.kernels.rms_norm import reference as rms_norm_reference
from moe_peft.kernels.rms_norm.op import rms_norm
from moe_peft.kernels.rotary import reference as rotary_reference
from moe_peft.kernels.rotary.op import rotary
from moe_peft.kernels.swiglu import reference as swiglu_reference
from moe_peft.kernels.swiglu.op import swiglu
from moe_peft.kernels.wide_linear.op import wide_linear

_EPS, _SCALING = 1e-5, 2.0


def rms_norm_case(sizes: Sizes) -> Case:
    """Before every attention and every FFN."""
    tokens, model, _ = sizes.widths

    def reference(inputs: Inputs, upstream: Tensors | None) -> tuple[Tensors, Tensors]:
        x, weight = inputs.values()
        y, rstd = rms_norm_reference.rms_norm_forward(x, weight, _EPS)
        return [y], [rms_norm_reference.rms_norm_backward(*upstream, x, weight, rstd)] if upstream else []

    return Case(
        shape=f"{tokens} x {model}",
        inputs={"x": sizes.normal(tokens, model), "weight": sizes.normal(model)},
        differentiated=["x"],
        read_again=["x", "weight"],
        flops=(0, 0),
        ours=lambda inputs: rms_norm(inputs["x"], inputs["weight"], _EPS)[0],
        naive=lambda inputs: naive.rms_norm(inputs["x"], inputs["weight"], _EPS),
        reference=reference,
    )


def swiglu_case(sizes: Sizes) -> Case:
    """In every FFN of a plain adapter."""
    tokens, _, ffn = sizes.widths

    def reference(inputs: Inputs, upstream: Tensors | None) -> tuple[Tensors, Tensors]:
        h = swiglu_reference.swiglu_forward(*inputs.values())
        return [h], swiglu_reference.swiglu_backward(*upstream, *inputs.values()) if upstream else []

    return Case(
        shape=f"{tokens} x {ffn}",
        inputs={"gate": sizes.normal(tokens, ffn), "up": sizes.normal(tokens, ffn)},
        differentiated=["gate", "up"],
        read_again=["gate", "up"],
        flops=(0, 0),
        ours=lambda inputs: swiglu(*inputs.values()),
        naive=lambda inputs: naive.swiglu(*inputs.values()),
        reference=reference,
    )


def rotary_case(sizes: Sizes) -> Case:
    """On the queries."""
    heads, size = sizes.config.num_attention_heads, sizes.config.head_size
    exponents = torch.arange(0, size, 2, dtype=sizes.wide, device=sizes.device) / size
    angles = torch.arange(sizes.tokens, device=sizes.device)[:, None] * sizes.config.rope_theta**-exponents
    tables = torch.cat((angles, angles), dim=-1)[:, None]  # [T, 1, d]

    def reference(inputs: Inputs, upstream: Tensors | None) -> tuple[Tensors, Tensors]:
        x, cos, sin = inputs.values()
        back = [rotary_reference.rotary_forward(*upstream, cos, sin, back=True)] if upstream else []
        return [rotary_reference.rotary_forward(x, cos, sin)], back

    return Case(
        shape=f"{sizes.tokens} x {heads} x {size}",
        inputs={"x": sizes.normal(sizes.tokens, heads, size), "cos": tables.cos(), "sin": tables.sin()},
        differentiated=["x"],
        read_again=["cos", "sin"],
        flops=(0, 0),
        ours=lambda inputs: rotary(*inputs.values()),
        naive=lambda inputs: naive.rotary(*inputs.values()),
        reference=reference,
    )


def lora_linear_case(sizes: Sizes) -> Case:
    """Queries, keys and values, with LoRA of several adapters on their own tokens."""
    tokens, model, _ = sizes.widths
    key_value = sizes.config.num_kv_heads * sizes.config.head_size
    widths = {"q": sizes.config.num_attention_heads * sizes.config.head_size, "k": key_value, "v": key_value}
    bounds = list(pairwise(sizes.ends(sizes.adapters)))
    inputs = {"x": sizes.normal(tokens, model)}
    inputs |= {name: sizes.weight(width, model) for name, width in widths.items()}
    for i in range(sizes.adapters):
        for name, width in widths.items():
            inputs[f"adapter {i} {name} A"] = sizes.weight(sizes.rank, model, wide=True)
            inputs[f"adapter {i} {name} B"] = sizes.weight(width, sizes.rank, wide=True)

    def unpacked(inputs: Inputs) -> tuple[Tensor, list[Tensor], list[list[tuple[Tensor, Tensor]]]]:
        x, *rest = inputs.values()
        flat = iter(rest[len(widths) :])
        factors = [[(next(flat), next(flat)) for _ in widths] for _ in bounds]
        return x, rest[: len(widths)], factors

    def ranges(factors: list[list[tuple[Tensor, Tensor]]]) -> list[LoraRange]:
        scalings = (_SCALING,) * len(widths)
        return [LoraRange(*bound, tuple(pairs), scalings) for bound, pairs in zip(bounds, factors, strict=True)]

    def ours(inputs: Inputs) -> Tensors:
        x, weights, factors = unpacked(inputs)
        return lora_linear(Recomputable(x), weights, [None] * len(weights), ranges(factors))

    def naively(inputs: Inputs) -> Tensors:
        x, weights, factors = unpacked(inputs)
        return naive.lora_linear(x, weights, bounds, factors, _SCALING)

    def reference(inputs: Inputs, upstream: Tensors | None) -> tuple[Tensors, Tensors]:
        x, weights, factors = unpacked(inputs)
        parts = ranges(factors)
        outputs, lowered = lora_linear_reference.lora_linear_forward(x, weights, [None] * len(weights), parts)
        if upstream is None:
            return outputs, []
        dx, found = lora_linear_reference.lora_linear_backward(upstream, x, weights, parts, lowered, True)
        assert dx is not None
        return outputs, [dx, *(grad for own in found for pair in own if pair is not None for grad in pair)]

    base = 2.0 * tokens * model * sum(widths.values())  # y = W x; dx = W^T dy
    low_rank = 2.0 * tokens * sizes.rank * sum(model + width for width in widths.values())  # twice that in backward
    return Case(
        shape=f"{tokens} x {model} to {'+'.join(map(str, widths.values()))}, {sizes.adapters} adapters, r{sizes.rank}",
        inputs=inputs,
        differentiated=[name for name in inputs if name not in widths],
        read_again=list(inputs),
        flops=(base + low_rank, base + 2 * low_rank),
        ours=ours,
        naive=naively,
        reference=reference,
    )


def mixlora_ffn_case(sizes: Sizes) -> Case:
    """All that a mixture of experts on gate, up and down adds to the frozen products of an FFN, and its SwiGLU."""
    tokens, model, ffn = sizes.widths
    gates, experts = sizes.routing()
    inputs = {"x": sizes.normal(tokens, model), "p1": sizes.normal(tokens, ffn), "p3": sizes.normal(tokens, ffn)}
    inputs |= {"gates": gates, "experts": experts}
    for place, (width_in, width_out) in {"gate": (model, ffn), "up": (model, ffn), "down": (ffn, model)}.items():
        inputs[f"{place} A"] = sizes.weight(sizes.experts, sizes.rank, width_in, wide=True)
        inputs[f"{place} B"] = sizes.weight(sizes.experts, width_out, sizes.rank, wide=True)

    def stacks(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        return [(inputs[f"{place} A"], inputs[f"{place} B"]) for place in ("gate", "up", "down")]

    def ours(inputs: Inputs) -> Tensors:
        x, p1, p3, gates, experts, *_ = inputs.values()
        gate, up, down = (ExpertFactors(*pair) for pair in stacks(inputs))
        hidden, delta = mixlora_ffn(
            Recomputable(x), p1, p3, gates, experts, gate=gate, up=up, down=down, scaling=_SCALING
        )
        assert delta is not None
        return hidden, delta

    def naively(inputs: Inputs) -> Tensors:
        x, p1, p3, gates, experts, *_ = inputs.values()
        return naive.mixlora_ffn(x, p1, p3, gates, experts, stacks(inputs), _SCALING)

    def reference(inputs: Inputs, upstream: Tensors | None) -> tuple[Tensors, Tensors]:
        x, p1, p3, gates, experts, *_ = inputs.values()
        gate, up, down = (ExpertFactors(*pair) for pair in stacks(inputs))
        of_ffn = FfnInputs(x, p1, p3, gates, experts, gate, up, down.lora_a, _SCALING, None, None)
        hidden, lowered, a1, a3 = mixlora_ffn_reference.mixlora_ffn_forward(of_ffn)
        assert lowered is not None
        raised_b = down.lora_b.mul(_SCALING).to(p1.dtype).mT.flatten(0, 1)  # [ER, D]
        outputs = [hidden, lowered @ raised_b]
        if upstream is None:
            return outputs, []
        d_hidden, d_delta = upstream
        d_down_b = (lowered.T @ d_delta).mul(_SCALING).to(sizes.wide)  # [ER, D]
        d_down_b = d_down_b.unflatten(0, (sizes.experts, sizes.rank)).mT.contiguous()  # [E, D, R]
        found = mixlora_ffn_reference.mixlora_ffn_backward(of_ffn, d_hidden, d_delta @ raised_b.T, a1, a3)
        assert found.dx is not None and found.gate and found.up and found.down_a is not None
        grads = [found.dx, found.dp1, found.dp3, found.dgates, *found.gate, *found.up, found.down_a, d_down_b]
        return outputs, grads

    # A1, A3 and B2 have D features on their wide side, B1, B3 and A2 have F; twice that in backward.
    flops = 2.0 * tokens * sizes.top_k * sizes.rank * 3 * (model + ffn)
    return Case(
        shape=f"{tokens} x {model} x {ffn}, E{sizes.experts} K{sizes.top_k} r{sizes.rank}",
        inputs=inputs,
        differentiated=[name for name in inputs if name != "experts"],
        read_again=list(inputs),
        flops=(flops, 2 * flops),
        ours=ours,
        naive=naively,
        reference=reference,
    )


def grouped_matmul_case(sizes: Sizes) -> Case:
    """A of a projection's experts, on rows sorted by expert."""
    tokens, model, _ = sizes.widths
    order, offsets = sort_by_group(sizes.routing()[1], sizes.experts)
    rows = len(order)

    def reference(inputs: Inputs, upstream: Tensors | None) -> tuple[Tensors, Tensors]:
        x, weights, offsets = inputs.values()
        y = grouped_matmul_reference.grouped_matmul_forward(x, weights, offsets)
        if upstream is None:
            return [y], []
        dx = grouped_matmul_reference.grouped_matmul_dx(*upstream, weights, offsets)
        return [y], [dx, grouped_matmul_reference.grouped_matmul_dw(*upstream, x, offsets, weights.dtype)]

    flops = 2.0 * rows * model * sizes.rank  # and once for each of the two gradients
    return Case(
        shape=f"{tokens} * {sizes.top_k} x {model} to {sizes.rank}, E{sizes.experts}",
        inputs={
            "x": sizes.normal(rows, model),
            "weights": sizes.weight(sizes.experts, sizes.rank, model, wide=True),
            "offsets": offsets,
        },
        differentiated=["x", "weights"],
        read_again=["x", "weights", "offsets"],
        flops=(flops, 2 * flops),
        ours=lambda inputs: grouped_matmul(*inputs.values()),
        naive=lambda inputs: naive.grouped_matmul(*inputs.values()),
        reference=reference,
    )


def linear_cross_entropy_case(sizes: Sizes) -> Case:
    """The head, every token with a label."""
    tokens, model, _ = sizes.widths
    vocab = sizes.config.vocab_size

    def reference(inputs: Inputs, upstream: Tensors | None) -> tuple[Tensors, Tensors]:
        nll, gradient = linear_cross_entropy_reference.linear_cross_entropy_forward(
            *inputs.values(), upstream is not None
        )
        return [nll], [gradient * upstream[0][:, None].to(gradient.dtype)] if upstream else []

    flops = 2.0 * tokens * model * vocab
    return Case(
        shape=f"{tokens} x {model} to {vocab}",
        inputs={
            "hidden": sizes.normal(tokens, model),
            "weight": sizes.weight(vocab, model),
            "targets": torch.randint(vocab, (tokens,), device=sizes.device),
        },
        differentiated=["hidden"],
        read_again=[],  # a row's gradient is known with its loss, but for one factor
        flops=(flops, flops),
        ours=lambda inputs: linear_cross_entropy(*inputs.values()),
        naive=lambda inputs: naive.linear_cross_entropy(*inputs.values()),
        reference=reference,
    )


def causal_attention_case(sizes: Sizes) -> Case:
    """Attention over samples laid end to end."""
    heads, groups, size = sizes.config.num_attention_heads, sizes.config.num_kv_heads, sizes.config.head_size
    boundaries = sizes.ends(sizes.samples)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=sizes.device)
    pairs = sum(length * (length + 1) / 2 for length in (end - start for start, end in pairwise(boundaries)))

    def reference(inputs: Inputs, upstream: Tensors | None) -> tuple[Tensors, Tensors]:
        out = causal_attention_reference.causal_attention_forward(*inputs.values(), boundaries, None)
        if upstream is None:
            return [out], []
        grads = causal_attention_reference.causal_attention_backward(*upstream, *inputs.values(), boundaries, None)
        return [out], grads

    flops = 4.0 * heads * size * pairs  # two products forward; dp, dv, dq and dk backward
    return Case(
        shape=f"{sizes.tokens} x {heads}/{groups} x {size}, {sizes.samples} samples",
        inputs={
            "q": sizes.normal(sizes.tokens, heads, size),
            "k": sizes.normal(sizes.tokens, groups, size),
            "v": sizes.normal(sizes.tokens, groups, size),
        },
        differentiated=["q", "k", "v"],
        read_again=["q", "k", "v"],
        flops=(flops, 2 * flops),
        ours=lambda inputs: causal_attention(inputs["q"], inputs["k"], inputs["v"], boundaries, None, cu_seqlens),
        naive=lambda inputs: naive.causal_attention(inputs["q"], inputs["k"], inputs["v"], boundaries),
        reference=reference,
    )


def frozen_linear_case(sizes: Sizes) -> Case:
    """A projection of a layer without adapters, the FFN's gate."""
    tokens, model, ffn = sizes.widths
    flops = 2.0 * tokens * model * ffn
    return Case(
        shape=f"{tokens} x {model} to {ffn}",
        inputs={"x": sizes.normal(tokens, model), "weight": sizes.weight(ffn, model)},
        differentiated=["x"],
        read_again=["weight"],
        flops=(flops, flops),
        ours=lambda inputs: frozen_linear(*inputs.values()),
        naive=lambda inputs: torch.nn.functional.linear(*inputs.values()),
    )


def wide_linear_case(sizes: Sizes) -> Case:
    """A mixture's router."""
    tokens, model, _ = sizes.widths
    flops = 2.0 * tokens * model * sizes.experts
    return Case(
        shape=f"{tokens} x {model} to {sizes.experts}",
        inputs={"x": sizes.normal(tokens, model), "weight": sizes.weight(sizes.experts, model, wide=True)},
        differentiated=["x", "weight"],
        read_again=["x", "weight"],
        flops=(flops, 2 * flops),
        ours=lambda inputs: wide_linear(Recomputable(inputs["x"]), inputs["weight"]),
        naive=lambda inputs: naive.wide_linear(*inputs.values()),
    )


CASES: dict[str, Callable[[Sizes], Case]] = {
    "rms_norm": rms_norm_case,
    "swiglu": swiglu_case,
    "rotary": rotary_case,
    "lora_linear": lora_linear_case,
    "mixlora_ffn": mixlora_ffn_case,
    "grouped_matmul": grouped_matmul_case,
    "linear_cross_entropy": linear_cross_entropy_case,
    "causal_attention": causal_attention_case,
    "frozen_linear": frozen_linear_case,
    "wide_linear": wide_linear_case,
}
