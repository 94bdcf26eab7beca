"""Configs of the original MoE-PEFT: what it reads from them is what trains here, and nothing is passed over.

``fixtures/original.json`` was written by the original itself: ``tools/make_original_configs.py`` says how.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml
from builders import tiny_model

from moe_peft import LoraConfig, MixLoraConfig, TrainConfig
from moe_peft.config import AdapterJob
from moe_peft.config.original import is_original, translate
from moe_peft.data.templates import load_template
from moe_peft.train import main
from moe_peft.training.optimizer import build_optimizer, learning_rate

TRUTH = json.loads((Path(__file__).parent / "fixtures" / "original.json").read_text())
CONFIGS = TRUTH["configs"]
MIXTURE = {"routing_strategy": "mixlora", "num_experts": 4}


def config_of(name: str = "lora", **changes: Any) -> dict[str, Any]:
    """A config of the original's, its one adapter changed; a change to ``...`` leaves the key out."""
    config = CONFIGS[name]["config"]
    entry = {key: value for key, value in {**config["lora"][0], **changes}.items() if value is not ...}
    return {**config, "lora": [entry]}


def run_of(config: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_dict({"base_model": "base", **translate(config)[0]})


def job_of(config: dict[str, Any]) -> AdapterJob:
    (entry,) = translate(config)[0]["adapters"]
    return AdapterJob.from_dict({"data": "data.json", **entry})


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        run_of(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", CONFIGS)
def test_the_training_is_what_the_original_reads(name: str) -> None:
    read, job = CONFIGS[name]["read"], job_of(CONFIGS[name]["config"])
    theirs = read["training"]
    assert (job.num_epochs, job.batch_size, job.lr) == tuple(
        theirs[key] for key in ("num_epochs", "batch_size", "learning_rate")
    )
    assert (job.micro_batch_size or job.batch_size) == theirs["micro_batch_size"]
    assert job.batch_size / (job.micro_batch_size or job.batch_size) == read["accumulation_step"]
    assert (job.optimizer, job.momentum) == (theirs["optimizer_type"], theirs["momentum"])
    assert job.loraplus_lr_ratio == theirs["loraplus_lr_ratio"]
    assert job.template == (theirs["prompt_template"] or "moe_peft")
    assert job.data == (theirs["data_path"] or "data.json")
    assert job.max_grad_norm is None, "the original clips nothing"
    assert job.cutoff_len == 512


@pytest.mark.parametrize("name", CONFIGS)
def test_the_method_is_what_the_original_reads(name: str) -> None:
    theirs, job = CONFIGS[name]["read"]["adapter"], job_of(CONFIGS[name]["config"])
    adapter = job.adapter
    assert job.name == theirs["adapter_name"]
    assert type(adapter) is (MixLoraConfig if "num_experts_" in theirs else LoraConfig)
    assert_same_factors(adapter, theirs)
    assert set(adapter.targets) == {target for target, is_on in theirs["target_modules_"].items() if is_on}
    if isinstance(adapter, MixLoraConfig):
        assert (adapter.num_experts, adapter.top_k) == (theirs["num_experts_"], theirs["top_k_"])
        assert adapter.router_aux_loss_coef == (theirs["router_aux_loss_coef_"] if theirs["router_loss_"] else 0)
        assert adapter.router_init_range == theirs["router_init_range_"]
        assert adapter.router_jitter_noise == theirs["jitter_noise_"]
        assert (adapter.router_aux_loss_type, adapter.router_z_loss_coef) == ("balance", 0)
        assert_same_factors(adapter.expert_factors, theirs["expert_config_"] or theirs)


def assert_same_factors(ours: LoraConfig, theirs: dict[str, Any]) -> None:
    assert (ours.r, ours.lora_alpha, ours.lora_dropout, ours.use_rslora) == tuple(
        theirs[key] for key in ("lora_r_", "lora_alpha_", "lora_dropout_", "use_rslora_")
    )
    assert ours.init_lora_weights == {"original": True, "gaussian": "gaussian"}[theirs["lora_init_"]]


@pytest.mark.parametrize("name", CONFIGS)
def test_learning_rates_and_decay_are_the_original_s(name: str) -> None:
    """Its warm-up begins at a rate of 0, a step that learns nothing; ours is one step ahead of it."""
    read, job = CONFIGS[name]["read"], job_of(CONFIGS[name]["config"])
    num_steps = -(-read["num_records"] // job.batch_size) * job.num_epochs
    model = tiny_model()
    model.add_adapter(job.name, job.adapter)
    groups = build_optimizer(model, job).param_groups
    assert {group["weight_decay"] for group in groups} == set(read["decay"])
    weights = {id(weight): key for key, weight, _ in model.named_adapter_weights(job.name)}
    first = read["rates"]["q.lora_A.weight"][0]
    ahead = int(first == 0)
    for group in groups:
        for weight in group["params"]:
            (rates,) = [
                rates
                for kind, rates in read["rates"].items()
                if kind.split(".", 1)[1] in weights[id(weight)]  # lora_A.weight, lora_B.weight, moe_gate.weight
            ]
            assert len(rates) == num_steps
            ours = [learning_rate(job, step, num_steps) * group["lr_ratio"] for step in range(num_steps)]
            assert ours[: num_steps - ahead] == pytest.approx(rates[ahead:])


def test_the_run_s_keys() -> None:
    config = run_of(config_of())
    assert (config.save_steps, config.max_concurrent_adapters) == (1000, 2)
    config = run_of({**config_of(), "save_step": None, "train_lora_simultaneously_num": None})
    assert (config.save_steps, config.max_concurrent_adapters) == (None, None)


def test_several_adapters_are_kept_in_order() -> None:
    config = config_of()
    config["lora"] = [{**config["lora"][0], "name": name} for name in ("b", "a")]
    assert [job.name for job in run_of(config).adapters] == ["b", "a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": ...}, "lora[0].lr is missing: the original requires it"),
        ({"lora_dropout": ...}, "lora[0].lora_dropout is missing: the original requires it"),
        ({"learning_rate": 1}, "lora[0].learning_rate=1 is not a known key"),
        ({"warmup_step": 1}, "lora[0].warmup_step=1 is not a known key; did you mean 'warmup_steps'?"),
        ({"optim": "adam"}, "lora[0].optim='adam' must be one of adamw, sgd; did you mean 'adamw'?"),
        (
            {"scheduler_type": "polynomial"},
            "lora[0].scheduler_type='polynomial' must be one of constant, constant_with_warmup, linear, cosine",
        ),
        ({"scheduler_type": ["linear"]}, "lora[0].scheduler_type=['linear'] must be one of"),
        ({"warmup_steps": 0.1}, "lora[0].warmup_steps=0.1 must be whole; a share is warmup_ratio"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_steps=3 and warmup_ratio=0.1 say one thing in two ways"),
        ({"momentum": 0.9}, "momentum=0.9 is a key of optimizer='sgd', not of 'adamw'"),
        ({"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio=0.5 must be at least 1"),
        ({"lora_init": "pissa"}, "lora[0].lora_init='pissa' must be one of original, gaussian"),
        ({"use_dora": "yes"}, "lora[0].use_dora='yes' must be true or false"),
        (
            {**MIXTURE, "use_dora": True},
            "lora[0].use_dora=True must be false beside a routing_strategy: a mixture here",
        ),
        ({"group_by_length": True}, "lora[0].group_by_length=True must be false: it saves padding, of which there is"),
        ({"evaluate_steps": 100}, "lora[0].evaluate_steps=100 must be null: there is nothing to evaluate on"),
        ({"task_name": "boolq"}, "lora[0].task_name='boolq' must be 'casual': tasks that the original downloads"),
        ({"task_name": "arc-e;boolq"}, "lora[0].task_name='arc-e;boolq' must be 'casual'"),
        ({"data": "yahma/alpaca-cleaned"}, "lora[0].data='yahma/alpaca-cleaned' must be a .json or .jsonl file"),
        ({"data": ["a.json"]}, "lora[0].data=['a.json'] must be a .json or .jsonl file"),
        ({"prompt": {"prompt_input": ""}}, "lora[0].prompt must be a template's name or file"),
        ({"peft_type": "QLORA"}, "lora[0].peft_type='QLORA' must be one of LORA, MIXLORA; did you mean 'LORA'?"),
        ({"peft_type": "MOLA"}, "lora[0].peft_type='MOLA' must be one of LORA, MIXLORA"),
        ({"peft_type": "MIXLORA"}, "lora[0].peft_type='MIXLORA' does not go with routing_strategy=None: a mixture has"),
        ({**MIXTURE, "peft_type": "LORA"}, "lora[0].peft_type='LORA' does not go with routing_strategy='mixlora'"),
        (
            {"routing_strategy": "mixlora-dynamic", "num_experts": 4},
            "lora[0].routing_strategy='mixlora-dynamic' must be 'mixlora': the original has this method, and it is not",
        ),
        ({"routing_strategy": "loramoe"}, "lora[0].routing_strategy='loramoe' must be 'mixlora': the original has"),
        (
            {"routing_strategy": "mixlora "},
            "lora[0].routing_strategy='mixlora ' must be 'mixlora': no such strategy is",
        ),
        (
            {"num_experts": 8},
            "lora[0].num_experts=8 is not a known key: it is a key of a mixture, and this adapter has",
        ),
        ({**MIXTURE, "num_experts": ...}, "lora[0].num_experts is missing: the original requires it"),
        (
            {**MIXTURE, "top_p": 0.8},
            "lora[0].top_p=0.8 is not a known key: it is a key of routing_strategy='mixlora-dy",
        ),
        ({**MIXTURE, "act_fn": "gelu_new"}, "lora[0].act_fn='gelu_new' must be 'silu'"),
        ({**MIXTURE, "router_loss": 0}, "lora[0].router_loss=0 must be true or false"),
        ({**MIXTURE, "jitter_noise": 2.0}, "router_jitter_noise=2.0 must be in [0, 1)"),
        (
            {**MIXTURE, "expert_lora": {"use_dora": True}},
            "lora[0].expert_lora.use_dora=True must be false: a mixture here is made of LoRA alone",
        ),
        (
            {**MIXTURE, "expert_lora": {"target_modules": ["up_proj"]}},
            "lora[0].expert_lora.target_modules=['up_proj'] is not a known key: experts sit on the adapter's own",
        ),
        ({**MIXTURE, "expert_lora": {"rank": 2}}, "lora[0].expert_lora.rank=2 is not a known key"),
        ({**MIXTURE, "expert_lora": None}, "lora[0].expert_lora=None must be a mapping"),
        ({**MIXTURE, "expert_lora": {"r": 0}}, "expert_lora.r=0 must be at least 1"),
        ({**MIXTURE, "expert_lora": {"bias": "all"}}, "lora[0].expert_lora.bias='all' must be 'none'"),
        (
            {"target_modules": ["q_prj"]},
            "lora[0].target_modules has 'q_prj', which is no projection; did you mean 'q_p",
        ),
        ({"target_modules": {"q_prj": False}}, "lora[0].target_modules has 'q_prj', which is no projection"),
        ({"target_modules": {"dense": True}}, "lora[0].target_modules has 'dense', of Phi or GLM"),
        ({"target_modules": {"q_proj": 1}}, "lora[0].target_modules.q_proj=1 must be true or false"),
        ({"target_modules": "all-linear"}, "lora[0].target_modules='all-linear' must be a list of names, or a mapping"),
        ({"target_modules": [["q_proj"]]}, "lora[0].target_modules=[['q_proj']] must be a list of names, or a mapping"),
        ({"target_modules": {"q_proj": False}}, "target_modules=() must be"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(config_of(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cutoff_len": ...}, "cutoff_len is missing: the original requires it"),
        ({"cutoff_len": -1}, "cutoff_len=-1 must be a number of tokens"),
        ({"train_strategy": "fastest"}, "train_strategy='fastest' must be one of optim, none"),
        ({"base_model": "x"}, "base_model='x' is not a known key: the original has it on its command line"),
        ({"save_steps": 1}, "save_steps=1 is not a known key; did you mean 'save_step'?"),
        ({"lora": ["x"]}, "lora[0]='x' must be a mapping of keys to values, not str"),
        ({"lora": []}, "adapters=[] must hold at least one adapter"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_run_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**config_of(), **changes}.items() if value is not ...}
    assert message in refusal(config)


def test_keys_without_effect_are_told_once() -> None:
    config = config_of()
    config["lora"] = [{**config["lora"][0], "name": name} for name in ("a", "b")]
    remarks = translate(config)[1]
    for key in ("train_lora_candidate_num", "train_strategy", "evaluate_batch_size"):
        assert len([remark for remark in remarks if remark.startswith(f"{key} has no effect: ")]) == 1
    assert "coming-from-moe-peft.md" in remarks[-1]


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"warmup_steps": 5}, "warmup_steps takes effect, which the original does not read"),
        ({"warmup_ratio": 0.1}, "warmup_ratio takes effect, which the original passes over"),
        ({**MIXTURE, "top_k": 1}, "top_k=1: an expert's weight is its probability"),
    ],
    ids=str,
)
def test_what_acts_otherwise_than_there_is_told(changes: dict[str, Any], remark: str) -> None:
    assert any(line.startswith(remark) for line in translate(config_of(**changes))[1])
    assert not any(line.startswith(remark) for line in translate(config_of())[1])


def test_steps_of_warm_up_may_be_written_as_a_float() -> None:
    assert job_of(config_of(warmup_steps=4.0)).warmup_steps == 4


def test_only_a_list_named_lora_makes_a_config_the_original_s() -> None:
    assert is_original(config_of())
    assert not is_original({"base_model": "x", "adapters": []})
    assert not is_original({"lora": {"r": 8}})


def test_a_template_file_of_the_original_gives_its_prompt(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    texts = {"prompt_input": "{instruction}|{input}>", "prompt_no_input": "{instruction}>"}
    path.write_text(json.dumps({"description": "Mine.", **texts, "response_split": ">"}))
    template = load_template(path)
    assert (template.prompt("Add.", "1"), template.prompt("Add.")) == ("Add.|1>", "Add.>")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_base_folder(tmp_path_factory.mktemp("original") / "base")


@pytest.mark.parametrize("name", ["lora", "loraplus", "mixlora", "expert_lora"])
def test_a_template_filled_in_by_the_original_s_launcher_trains(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(tiny_run.instructions(4)))
    (tmp_path / "moe_peft.json").write_text(json.dumps(CONFIGS[name]["config"]))
    overrides = [f"base_model={base}", "device=cpu", "output_dir=run", "adapters.*.max_steps=1", "answer_examples=0"]
    assert main(["moe_peft.json", *overrides]) == 0
    assert "train_strategy has no effect" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapters" / "casual_0" / "adapter_model.safetensors").is_file()
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert not is_original(resolved)


def test_a_bare_template_trains_once_it_is_given_data(base: Path, tmp_path: Path) -> None:
    """As it stands in the original's repository, with no task and no data yet."""
    path = tmp_path / "lora.json"
    path.write_text(json.dumps(config_of(task_name="", data=..., prompt=...)))
    overrides = [f"base_model={base}", "adapters.casual_0.data=mine.jsonl"]
    config = TrainConfig.from_file(path, overrides)
    assert (config.adapters[0].data, config.adapters[0].template) == ("mine.jsonl", "moe_peft")
    assert any("train_strategy" in remark for remark in config.remarks)
    with pytest.raises(
        ValueError, match=r"lora\.json \(a config of the original: .*\): adapters\[0\]\.data is missing"
    ):
        TrainConfig.from_file(path, overrides[:1])
    with pytest.raises(ValueError, match=r"base_model=\.\.\. is given with it\): base_model is missing"):
        TrainConfig.from_file(path, overrides[1:])
    path.write_text(json.dumps(config_of(optim="lion")))
    with pytest.raises(ValueError, match=r"lora\.json: lora\[0\]\.optim='lion' must be one of"):
        TrainConfig.from_file(path, overrides)


def test_remarks_are_comments_of_the_printed_config(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "moe_peft.json"
    path.write_text(json.dumps(config_of()))
    assert main([str(path), f"base_model={base}", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# train_lora_candidate_num has no effect: ")
    assert TrainConfig.from_dict(yaml.safe_load(text)) == TrainConfig.from_file(path, [f"base_model={base}"])
    assert not TrainConfig.default().remarks
