"""The last layer computes what supervised tokens need: the same losses and gradients for less work."""

import functools
import weakref
from collections import defaultdict

import pytest
import torch
from builders import (
    IGNORE,
    Run,
    add_random_adapter,
    assert_close,
    assert_relative,
    backward,
    clear_gradients,
    fuse,
    random_samples,
    tiny_config,
    tiny_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from moe_peft import LlamaForCausalLM, LoraConfig, MixLoraConfig, ops
from moe_peft.model.batch import parse_expert_name

ADAPTERS = {
    "low": LoraConfig(r=2, lora_dropout=0.2),
    "some": LoraConfig(r=5, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"]),
    "ffn": LoraConfig(r=3, target_modules=["down_proj"]),
    "mix": MixLoraConfig(
        r=3, num_experts=5, top_k=2, lora_dropout=0.2, router_z_loss_coef=0.1, router_jitter_noise=0.1
    ),
    "switch": MixLoraConfig(
        r=4, num_experts=3, top_k=1, router_aux_loss_coef=0.0, lora_dropout=0.3, target_modules=["o_proj", "up_proj"]
    ),
    "bare": MixLoraConfig(r=2, num_experts=4, router_aux_loss_coef=0.3, target_modules=["gate_proj", "down_proj"]),
}
EXPERT = "moe.mix.experts.1"

# Which positions of a sample carry a label, given its length and its place in the batch config.
LABELS = {
    "answer in the middle": lambda length, _: range(length // 2, length // 2 + 2),
    "several turns": lambda length, _: [*range(2, 4), *range(length - 2, length)],
    "one sample without": lambda length, i: range(length // 2, length) if i != 1 else (),
    "everything": lambda length, _: range(length),
    "nothing": lambda length, _: (),
    "first token": lambda length, _: (0,),
    "second token": lambda length, _: (1,),
    "last token": lambda length, _: (length - 1,),
    "one sample of all": lambda length, i: (length - 1,) if i == 2 else (),
}
BATCHES = {
    "LoRA": ("low",),
    "mixture": ("mix",),
    "base": ("",),
    "expert": (EXPERT,),
    "two LoRAs and base": ("some", "", "low"),
    "all": ("low", "mix", "", EXPERT, "switch", "ffn", "bare", "some"),
    "mixture in the middle": ("low", "switch", "ffn"),
    "one adapter twice": ("mix", "low", "mix", "low"),
}
CONFIGS = {
    "window, norms, biases": {"sliding_window": 3, "qk_norm": True, "attention_bias": True, "mlp_bias": True},
    "one layer": {"num_hidden_layers": 1},
    "three layers": {"num_hidden_layers": 3, "sliding_window": 1, "qkv_bias": True},
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def make_model(dtype=torch.float64, training=True, **config):
    model = tiny_model(tiny_config(**config), dtype=dtype)
    for i, (name, adapter) in enumerate(ADAPTERS.items()):
        add_random_adapter(model, name, adapter, seed=10 + i)
    return model.train(training)


@functools.cache
def shared_model(dtype=torch.float64, config=""):
    """A model for tests that leave it as it is."""
    return make_model(dtype, **CONFIGS.get(config, {}))


def make_run(name, labels, seed=0, lengths=(6, 1, 9)):
    """Random samples with labels at the positions that the pattern names."""
    samples = random_samples(lengths, seed=seed)
    chosen = [set(LABELS[labels](len(sample), i)) for i, sample in enumerate(samples)]
    marked = [
        [token if position in own else IGNORE for position, token in enumerate(sample)]
        for sample, own in zip(samples, chosen, strict=True)
    ]
    return Run(name, samples, marked, step=seed, micro_batch=seed % 2)


def make_runs(names, labels):
    return [make_run(name, labels, seed) for seed, name in enumerate(names, start=1)]


def whole(self, batch, targets):
    """In the place of the model's own method: everything is asked for."""
    return batch, batch


def everything(model, runs):
    """Outputs of a training forward, and every parameter's gradient after its backward."""
    clear_gradients(model)
    outputs = model(fuse(*runs))
    if any((output.loss + output.aux_loss).requires_grad for output in outputs):
        backward(outputs)
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    clear_gradients(model)
    return outputs, found


def assert_same(narrowed, full, tolerance):
    """Losses, router logits and gradients of two runs of one batch."""
    for own, other in zip(narrowed[0], full[0], strict=True):
        assert own.num_supervised_tokens == other.num_supervised_tokens
        assert_close(own.loss, other.loss, tolerance, f"{own.adapter_name}, loss")
        assert_close(own.aux_loss, other.aux_loss, tolerance, f"{own.adapter_name}, aux loss")
        assert (own.router_logits is None) == (other.router_logits is None)
        for left, right in zip(own.router_logits or (), other.router_logits or (), strict=True):
            assert_close(left, right, tolerance, f"{own.adapter_name}, router logits")
    present = {key: grad for key, grad in full[1].items() if grad is not None}
    assert {key for key, grad in narrowed[1].items() if grad is not None} == set(present)
    total = torch.stack([grad.norm() for grad in present.values()]).norm().item() if present else 0.0
    for key, grad in present.items():
        assert_relative(narrowed[1][key], grad, tolerance, key, floor=1e-3 * total)
        assert narrowed[1][key].is_contiguous(), key


def compare(model, runs, monkeypatch):
    """The narrowed run against one that computes everything; returns the narrowed one."""
    tolerance = TOLERANCES[model.dtype]
    narrowed = everything(model, runs)
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "_narrowed", whole)
        full = everything(model, runs)
    assert_same(narrowed, full, tolerance)
    for run, output in zip(runs, narrowed[0], strict=True):
        tokens = sum(len(sample) for sample in run.samples)
        for logits in output.router_logits or ():
            assert logits.shape == (tokens, ADAPTERS[run.adapter_name].num_experts)
    return narrowed


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("names", BATCHES)
def test_float64_equals_the_run_that_computes_everything(names, labels, monkeypatch):
    compare(shared_model(), make_runs(BATCHES[names], labels), monkeypatch)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("labels", LABELS)
def test_every_kind_of_model(labels, config, monkeypatch):
    for names in ("all", "two LoRAs and base", "mixture"):
        compare(shared_model(config=config), make_runs(BATCHES[names], labels), monkeypatch)


@pytest.mark.parametrize("names", BATCHES)
def test_float32_equals_the_run_that_computes_everything(names, monkeypatch):
    for labels in LABELS:
        compare(shared_model(torch.float32), make_runs(BATCHES[names], labels), monkeypatch)


def test_labels_of_all_kinds_in_one_batch(monkeypatch):
    """Every batch config labels its samples in another way."""
    names = BATCHES["all"]
    runs = [make_run(name, labels, seed) for seed, (name, labels) in enumerate(zip(names, LABELS, strict=False))]
    compare(shared_model(), runs, monkeypatch)
    compare(make_model(training=False), runs[::-1], monkeypatch)


def test_samples_of_one_token(monkeypatch):
    runs = [make_run(name, "everything", seed, lengths=(1, 1)) for seed, name in enumerate(BATCHES["all"])]
    outputs, _ = compare(shared_model(), runs, monkeypatch)
    assert all(output.num_supervised_tokens == 0 and output.loss == 0 for output in outputs)


@pytest.mark.parametrize("labels", ["answer in the middle", "last token"])
def test_the_loss_is_that_of_the_logits(labels):
    """Against the logits of a forward without labels, in which no layer leaves anything out."""
    model = make_model(training=False, sliding_window=4)
    runs = make_runs(BATCHES["all"], labels)
    with torch.no_grad():
        outputs, with_logits = model(fuse(*runs)), model(fuse(*runs, with_labels=False))
    for run, output, logits in zip(runs, outputs, (other.logits for other in with_logits), strict=True):
        targets = [
            label
            for sample in run.labels
            for label in [*sample[1:], IGNORE]  # a sample's last token predicts nothing
        ]
        kept = [i for i, label in enumerate(targets) if label != IGNORE]
        chosen = logits.log_softmax(1)[kept, [targets[i] for i in kept]]
        assert_close(output.loss, -chosen.mean(), 1e-12, run.adapter_name)
        assert output.num_supervised_tokens == len(kept)


class Work(TorchDispatchMode):
    """Rows of the products that each watched weight takes part in.

    Attributes:
        rows: by a weight's name, of every operation with it in order, views aside: the length of the result.
        touched: names of the watched weights that any operation at all was given.
    """

    def __init__(self, weights):
        super().__init__()
        self._names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
        assert len(self._names) == len(weights)
        self.rows = defaultdict(list)
        self.touched = set()
        self._filled = []  # they live on, or another tensor might come to lie where one was

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        made = [item for item in torch.utils._pytree.tree_leaves(result) if isinstance(item, torch.Tensor)]
        own = {item.untyped_storage().data_ptr() for item in made}
        for item in given:
            if not isinstance(item, torch.Tensor):
                continue
            address = item.untyped_storage().data_ptr()
            name = self._names.get(address)
            if name is None:
                continue
            self.touched.add(name)
            if function is torch.ops.aten.constant_pad_nd.default:  # bfloat16 rows filled up to whole tiles
                self._names[made[0].untyped_storage().data_ptr()] = name
                self._filled.append(made[0])
            elif address not in own and made:
                self.rows[name].append(made[0].shape[0])
        return result


def frozen_weights(model):
    """Every projection's frozen weight and the head's."""
    return {
        key.removesuffix(".base_layer_.weight"): parameter
        for key, parameter in model.named_parameters()
        if key.endswith("base_layer_.weight")
    } | {"head": model.lm_head_.weight}


def counted(model, runs, watched=None):
    """The work of the forward and of the backward of one training step."""
    clear_gradients(model)
    watched = frozen_weights(model) if watched is None else watched
    batch = fuse(*runs)
    with Work(watched) as forward:
        outputs = model(batch)
    loss = sum(output.loss + output.aux_loss for output in outputs)
    with Work(watched) as back:
        loss.backward()
    return forward, back


def needed(runs):
    """Tokens in all, those whose attention the last layer needs, those whose output it needs, supervised tokens."""
    tokens = asking = answering = supervised = 0
    for run in runs:
        for sample, labels in zip(run.samples, run.labels, strict=True):
            targets = [i - 1 for i, label in enumerate(labels) if i and label != IGNORE]
            own = len(sample) - (targets[0] if targets else len(sample) - 1)
            config = ADAPTERS.get(run.adapter_name)
            tokens += len(sample)
            asking += len(sample) if isinstance(config, MixLoraConfig) else own
            answering += own
            supervised += len(targets)
    return tokens, asking, answering, supervised


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels", LABELS)
def test_the_last_layers_products_see_only_the_rows_they_must(labels, dtype):
    for names in BATCHES.values():
        check_rows_of_products(shared_model(dtype), names, labels)


def check_rows_of_products(model, names, labels):
    """One product a weight and direction, over the rows that it must see."""
    runs = make_runs(names, labels)
    if not any(names):  # nothing to train: a base alone has no backward
        runs.append(make_run("low", labels, seed=9))
    tokens, asking, answering, supervised = needed(runs)
    forward, back = counted(model, runs)
    room = "layers.1"
    expected = dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), tokens)
    expected |= dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), asking)
    expected |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), answering)
    for projection, rows in expected.items():
        assert forward.rows[f"{room}.{projection}"] == [rows], projection
        assert back.rows[f"{room}.{projection}"] == [rows], f"backward of {projection}"
        assert forward.rows[f"layers.0.{projection}"] == [tokens], f"layer 0, {projection}"
    assert set(forward.rows["head"] + back.rows["head"]) <= {supervised}
    assert forward.rows["head"] or not supervised


def drop_lower(model, name, num_layers):
    """Take an adapter off the lowest layers."""
    for layer in model.decoder_layers[:num_layers]:
        modules = [layer.mlp.moes_, *(module.loras_ for module in layer.modules() if hasattr(module, "loras_"))]
        for module in modules:
            for key in list(module.keys()):
                expert = parse_expert_name(key)
                if key == name or (expert and expert[0] == name):
                    del module[key]


def kept_by_layer(model, runs):
    """Outputs of a forward, the storage of each layer's input, and what lives for backward with its layer's number."""
    kept, inputs, current = [], [], []

    def enter(_, arguments):
        current.append(len(inputs))
        inputs.append(arguments[0].untyped_storage())  # not the tensor, which would then live in any case

    def leave(*_):
        current.clear()

    def keep(tensor):
        kept.append((current[0] if current else None, weakref.ref(tensor)))
        return tensor

    handles = [layer.register_forward_pre_hook(enter) for layer in model.layers]
    handles += [layer.register_forward_hook(leave) for layer in model.layers]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(fuse(*runs))
    for handle in handles:
        handle.remove()
    return outputs, inputs, [(layer, tensor()) for layer, tensor in kept if tensor() is not None]


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("name", ["low", "mix", "bare", "some"])
def test_layers_below_the_first_adapter_keep_nothing(name, checkpointing):
    model = make_model(torch.float32, num_hidden_layers=4)
    model.activation_checkpointing_ = checkpointing
    drop_lower(model, name, 2)
    outputs, inputs, kept = kept_by_layer(model, make_runs((name, ""), "answer in the middle"))
    storages = {tensor.untyped_storage().data_ptr() for _, tensor in kept}
    assert not {layer for layer, _ in kept} & {0, 1}
    assert [storage.data_ptr() in storages for storage in inputs if storage is not inputs[2]] == [False, False, True]
    backward(outputs)
    grads = [key for key, parameter in model.named_parameters() if parameter.grad is not None]
    assert {key.split(".")[1] for key in grads} == {"2", "3"}


ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
FFN = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
BEHIND_ATTENTION = ("self_attn.o_proj", *FFN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "first"),  # the adapter, and which frozen weights of its first layer a backward needs
    [
        ("low", ("self_attn.o_proj", *FFN)),
        ("mix", ("self_attn.o_proj", *FFN)),
        ("ffn", ()),
        ("bare", ("mlp.down_proj",)),
    ],
)
def test_dx_stops_at_the_first_adapted_layer(name, first, dtype):
    model = make_model(dtype, num_hidden_layers=3)
    drop_lower(model, name, 1)
    forward, back = counted(model, make_runs((name, ""), "everything"))
    for projection in (*ATTENTION, *FFN):
        assert forward.rows[f"layers.0.{projection}"]
        assert not back.rows[f"layers.0.{projection}"]
        assert bool(back.rows[f"layers.1.{projection}"]) == (projection in first), projection
        assert back.rows[f"layers.2.{projection}"]


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("present", ["low", "mix", "", EXPERT])
def test_absent_adapters_cost_nothing(present, checkpointing):
    """No operation, forward or backward, is given one of their weights."""
    model = make_model(torch.float32)
    model.activation_checkpointing_ = checkpointing
    task = "mix" if present == EXPERT else present
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    used = {id(parameter) for name in (task, "ffn") if name for parameter in model.adapter_parameters(name)}
    watched = {key: parameter for key, parameter in trained.items() if id(parameter) not in used}
    assert len(watched) < len(trained)
    runs = make_runs((present, "ffn"), "several turns")  # one beside it, so that there is a backward
    forward, back = counted(model, runs, watched)
    assert not forward.touched
    assert not back.touched
    assert all(parameter.grad is None for parameter in watched.values())


def test_an_expert_alone_asks_neither_the_router_nor_the_mixture(monkeypatch):
    model = make_model(torch.float32)
    routers = {key: parameter for key, parameter in model.named_parameters() if key.endswith("gate_.weight")}
    monkeypatch.setattr(ops, "mixlora_ffn_group", lambda *_, **__: pytest.fail("no mixture runs"))
    forward, back = counted(model, make_runs((EXPERT,), "several turns"), routers)
    assert len(routers) == 6  # two layers of three mixtures
    assert not forward.touched | back.touched
