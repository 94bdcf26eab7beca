"""A second LLaMA with LoRA and MixLoRA for comparison: float64, one token and one expert at a time, nothing fused.

It shares no code with the package but the draws of dropout masks and jitter, whose keys are documented: see
``ForwardBatch.dropout_mask``. Gradients are autograd's.
"""

from dataclasses import dataclass

import torch
from builders import IGNORE, Run, assert_close, run_step
from torch import Tensor

from moe_peft import LlamaConfig, LlamaForCausalLM, LoraConfig, MixLoraConfig
from moe_peft.model.draws import dropout_mask, generator_for

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TIED = "embed_tokens.weight"


@dataclass
class NaiveOutput:
    """What the model's own output is compared with; router logits ``[T, E]`` by layer."""

    logits: Tensor
    loss: Tensor
    aux_loss: Tensor
    router_logits: list[Tensor]


class NaiveModel:
    """Reads the base weights of a float64 model and the weights of one of its adapters.

    Args:
        adapter_name: the adapter, ``""`` for none.
        seed: that its ``add_adapter`` was given.
        expert: the one expert, weight 1, that serves every token; None: the router decides.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        adapter_name: str = "",
        adapter: LoraConfig | None = None,
        *,
        seed: int = 0,
        expert: int | None = None,
    ) -> None:
        self.config: LlamaConfig = model.config_
        self.base = {
            name.replace("base_layer_.", ""): weight.detach()
            for name, weight in model.named_parameters()
            if "lora" not in name and "moes_" not in name
        }
        self.training = model.training
        self.adapter = adapter
        self.name = adapter_name
        self.seed = seed
        self.expert = expert
        state = model.adapter_state(adapter_name) if adapter_name else {}
        self.weights = {key: value.clone().requires_grad_() for key, value in state.items()}

    def gradients(self) -> dict[str, Tensor]:
        """Of every adapter weight, zero where none came."""
        return {key: torch.zeros_like(w) if w.grad is None else w.grad for key, w in self.weights.items()}

    def __call__(self, run: Run) -> NaiveOutput:
        self.run = run
        lengths = [len(sample) for sample in run.samples]
        router_logits: list[Tensor] = []
        x = torch.stack([self.base["embed_tokens.weight"][token] for sample in run.samples for token in sample])
        for layer in range(self.config.num_hidden_layers):
            x = x + self.attention(layer, self.norm(x, f"layers.{layer}.input_layernorm"), lengths)
            mixed, routed = self.mlp(layer, self.norm(x, f"layers.{layer}.post_attention_layernorm"))
            x = x + mixed
            router_logits += routed
        logits = self.norm(x, "norm") @ self.base["lm_head_.weight" if "lm_head_.weight" in self.base else TIED].T
        aux = self.aux_loss(router_logits) if router_logits else torch.zeros((), dtype=torch.float64)
        return NaiveOutput(logits, self.loss(logits, lengths), aux, router_logits)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.base[f"{name}.weight"]

    def projection(self, layer: int, name: str, x: Tensor) -> Tensor:
        """The frozen projection of rows x."""
        room = "self_attn" if name in ATTENTION else "mlp"
        y = x @ self.base[f"layers.{layer}.{room}.{name}.weight"].T
        if f"layers.{layer}.{room}.{name}.bias" in self.base:
            y = y + self.base[f"layers.{layer}.{room}.{name}.bias"]
        return y

    def update(self, layer: int, name: str, x: Tensor, expert: int | None = None) -> Tensor | float:
        """``s B A x`` of rows that dropout has been at already; 0 where this projection carries nothing."""
        room = "self_attn" if name in ATTENTION else "mlp"
        prefix = "mixlora" if isinstance(self.adapter, MixLoraConfig) else "base_model.model.model"
        key = f"{prefix}.layers.{layer}.{room}.{name}"
        if expert is not None:
            key += f".experts.{expert}"
        if f"{key}.lora_A.weight" not in self.weights:
            return 0.0
        rank = self.adapter.r**0.5 if self.adapter.use_rslora else self.adapter.r
        lora_a, lora_b = self.weights[f"{key}.lora_A.weight"], self.weights[f"{key}.lora_B.weight"]
        return (x @ lora_a.T) @ lora_b.T * (self.adapter.lora_alpha / rank)

    def dropped(self, layer: int, input_name: str, features: int) -> Tensor | float:
        """The mask over all of the run's tokens, ``[T, features]``."""
        if not self.training or self.adapter is None or self.adapter.lora_dropout == 0:
            return 1.0
        tokens = sum(len(sample) for sample in self.run.samples)
        key = (self.seed, self.name, self.run.step, self.run.micro_batch, "dropout", layer, input_name)
        like = torch.empty(0, dtype=torch.float64)
        return dropout_mask((tokens, features), self.adapter.lora_dropout, like=like, key=key)

    def attention(self, layer: int, x: Tensor, lengths: list[int]) -> Tensor:
        heads, groups, size = self.config.num_attention_heads, self.config.num_kv_heads, self.config.head_size
        masked = x * self.dropped(layer, "attn_in", x.shape[1])
        q, k, v = (self.projection(layer, name, x) + self.update(layer, name, masked) for name in ATTENTION[:3])
        rows, first = [], 0
        for length in lengths:
            for token in range(first, first + length):
                mixed = []
                for head in range(heads):
                    own = slice(head * size, (head + 1) * size)
                    group = head // (heads // groups)
                    shared = slice(group * size, (group + 1) * size)
                    query = self.turn(q[token, own], token - first)
                    scores = torch.stack(
                        [query @ self.turn(k[past, shared], past - first) for past in range(first, token + 1)]
                    )
                    mixed.append((scores / size**0.5).softmax(0) @ v[first : token + 1, shared])
                rows.append(torch.cat(mixed))
            first += length
        y = torch.stack(rows)
        masked = y * self.dropped(layer, "attn_out", y.shape[1])
        return self.projection(layer, "o_proj", y) + self.update(layer, "o_proj", masked)

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Plain RoPE of one head, features i and i + d/2 as one complex number."""
        half = self.config.head_size // 2
        angles = torch.tensor(
            [position * self.config.rope_theta ** (-pair / half) for pair in range(half)], dtype=torch.float64
        )
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag])

    def mlp(self, layer: int, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        masked = x * self.dropped(layer, "mlp_in", x.shape[1])
        hidden_mask = torch.ones(len(x), self.config.intermediate_size, dtype=torch.float64)
        hidden_mask = hidden_mask * self.dropped(layer, "mlp_hidden", self.config.intermediate_size)
        if not isinstance(self.adapter, MixLoraConfig):
            return torch.stack([self.ffn(layer, x[t], masked[t], hidden_mask[t], None) for t in range(len(x))]), []
        if self.expert is not None:
            rows = [self.ffn(layer, x[t], masked[t], hidden_mask[t], self.expert) for t in range(len(x))]
            return torch.stack(rows), []
        router_logits = self.jittered(layer, x) @ self.weights[f"mixlora.layers.{layer}.mlp.moe_gate.weight"].T
        rows = []
        for t, logits in enumerate(router_logits):
            probabilities = logits.exp() / logits.exp().sum()
            chosen = sorted(range(len(logits)), key=lambda e: -probabilities[e].item())[: self.adapter.top_k]
            total = sum(probabilities[e] for e in chosen) if self.adapter.top_k > 1 else 1.0
            rows.append(
                sum(probabilities[e] / total * self.ffn(layer, x[t], masked[t], hidden_mask[t], e) for e in chosen)
            )
        return torch.stack(rows), [router_logits]

    def ffn(self, layer: int, x: Tensor, masked: Tensor, hidden_mask: Tensor, expert: int | None) -> Tensor:
        """The whole feed-forward layer of one token, as if this expert were the only one."""
        gate = self.projection(layer, "gate_proj", x) + self.update(layer, "gate_proj", masked, expert)
        up = self.projection(layer, "up_proj", x) + self.update(layer, "up_proj", masked, expert)
        h = gate / (1 + (-gate).exp()) * up
        return self.projection(layer, "down_proj", h) + self.update(layer, "down_proj", h * hidden_mask, expert)

    def jittered(self, layer: int, x: Tensor) -> Tensor:
        noise = self.adapter.router_jitter_noise
        if not self.training or noise == 0:
            return x
        generator = generator_for(self.seed, self.name, self.run.step, self.run.micro_batch, "jitter", layer)
        return x * torch.empty_like(x).uniform_(1 - noise, 1 + noise, generator=generator)

    def aux_loss(self, router_logits: list[Tensor]) -> Tensor:
        kind, top_k = self.adapter.router_aux_loss_type, self.adapter.top_k
        if kind == "balance":
            balance = balance_loss([row for layer in router_logits for row in layer], top_k)
        elif kind == "balance_per_layer":
            balance = sum(balance_loss(list(layer), top_k) for layer in router_logits) / len(router_logits)
        else:
            balance = sum(squared_variation(layer) for layer in router_logits) / len(router_logits)
        rows = [row for layer in router_logits for row in layer]
        z = sum(row.exp().sum().log() ** 2 for row in rows) / len(rows)
        return self.adapter.router_aux_loss_coef * balance + self.adapter.router_z_loss_coef * z

    def loss(self, logits: Tensor, lengths: list[int]) -> Tensor:
        """Mean over the labels of minus the log-probability that the token before gives them."""
        losses, first = [], 0
        for labels, length in zip(self.run.labels or self.run.samples, lengths, strict=True):
            for place in range(1, length):
                if labels[place] != IGNORE:
                    row = logits[first + place - 1]
                    losses.append(row.exp().sum().log() - row[labels[place]])
            first += length
        return sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64)


def balance_loss(rows: list[Tensor], top_k: int) -> Tensor:
    """``E sum_k sum_i f_{k,i} P_i``: f the share of tokens whose k-th choice is i, P the mean probability of i."""
    num_experts, num_tokens = len(rows[0]), len(rows)
    total = torch.zeros((), dtype=torch.float64)
    orders = [sorted(range(num_experts), key=lambda e, row=row: -row[e].item()) for row in rows]
    for i in range(num_experts):
        mean_probability = sum(row[i].exp() / row.exp().sum() for row in rows) / num_tokens
        for k in range(top_k):
            total = total + sum(order[k] == i for order in orders) / num_tokens * mean_probability
    return num_experts * total


def squared_variation(rows: Tensor) -> Tensor:
    """``Var(P) / Mean(P)^2`` over the experts' mean probabilities."""
    usage = [sum(row[i].exp() / row.exp().sum() for row in rows) / len(rows) for i in range(rows.shape[1])]
    mean = sum(usage) / len(usage)
    return sum((share - mean) ** 2 for share in usage) / len(usage) / mean**2


def assert_same_as_naive(model: LlamaForCausalLM, naive: NaiveModel, run: Run) -> None:
    """Logits, loss and every gradient of one step in float64."""
    expected = naive(run)
    expected.loss.backward()
    (output,), found = run_step(model, run)
    assert_close(output.logits, expected.logits, 1e-10, "logits")
    assert_close(output.loss, expected.loss, 1e-10, "loss")
    for key, gradient in naive.gradients().items():
        assert gradient.any(), key
        assert_close(found[run.adapter_name][key], gradient, 1e-10, key)
