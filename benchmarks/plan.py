"""How near ``python -m moe_peft.train --plan`` comes to the runs themselves: peak memory and time.

    python benchmarks/plan.py                    every case
    python benchmarks/plan.py lora-bf16 r3       these
    python benchmarks/plan.py --memory-only      on a machine that is not idle

A case is a short run, planned in one process and trained in another, in turns. Memory is the most that a process holds
without a file behind it, over what it held when everything was imported; time is that of steps and evaluations. A
``+`` in the table marks the cases that the constants in `moe_peft/training/forecast/cost.py` were fitted to.
"""

import argparse
import ctypes
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rows import RESULTS, append_row

_MIX = {"method": "mixlora", "num_experts": 8, "top_k": 2}
_LORA = {"method": "lora"}
_SMALL = {
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16},
    "shallow": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16},
    "deep": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 24, "num_attention_heads": 8},
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _case(*adapters: dict[str, Any], fitted: bool = False, model: str = "smollm2-135m", **run: Any) -> dict[str, Any]:
    """A config's fields; adapters take their data from the bundled tasks in turn."""
    names = ("orders", "diary", "expenses")
    entries = [{"name": f"a{i}", "data": f"bundled:{names[i % 3]}", **entry} for i, entry in enumerate(adapters)]
    defaults = {"max_steps": 6, "batch_size": 8}
    fields = {"base_model": model, "dtype": "bfloat16", "defaults": defaults, "adapters": entries, **run}
    return {"fitted": fitted, "config": {**fields, "answer_examples": 0}}


CASES = {
    "lora-bf16": _case(_LORA, fitted=True),
    "mixlora-bf16": _case(_MIX, fitted=True),
    "4-adapters": _case(_LORA, _MIX, {**_LORA, "r": 16}, {**_MIX, "r": 4}, fitted=True),
    "lora-fp32": _case(_LORA, dtype="float32", fitted=True),
    "wide": _case(_LORA, model="wide", fitted=True),
    "mixlora-fp32": _case({**_MIX, "batch_size": 4}, dtype="float32"),
    "8-loras": _case(*[{**_LORA, "batch_size": 4, "micro_batch_size": 2, "max_steps": 3}] * 8, max_batch_tokens=1024),
    "selective": _case({**_MIX, "batch_size": 12}, activation_checkpointing="selective"),
    "full": _case({**_LORA, "r": 64, "batch_size": 16}, activation_checkpointing="full"),
    "attention-only": _case({**_LORA, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05, "batch_size": 16}),
    "large-rank": _case({**_LORA, "r": 128, "batch_size": 2}),
    "deep": _case(_LORA, _MIX, model="deep"),
    "shallow": _case({**_MIX, "batch_size": 4}, _LORA, model="shallow"),
    "evaluated": _case({**_LORA, "batch_size": 2, "eval_data": "bundled:orders:eval", "eval_steps": 3}),
}


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and append one row a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}; none: all")
    parser.add_argument("--memory-only", action="store_true", help="leave time out of the rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the rows go")
    parser.add_argument("--override", action="append", default=[], metavar="key=value", help="a change to every case")
    parser.add_argument("--as", dest="role", choices=("plan", "run"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"case={min(unknown)!r} must be one of {', '.join(CASES)}")
    if options.role is not None:
        measure = measured_plan if options.role == "plan" else measured_run
        print(json.dumps(measure(options.cases[0], options.override)))
        return
    print(f"{'case':<18}{'memory: planned, measured':>28}{'ratio':>8}{'time: planned, measured':>28}{'ratio':>8}")
    for name in options.cases or CASES:
        planned, real = (_in_own_process(name, role, options.override) for role in ("plan", "run"))
        row: dict[str, Any] = {"case": name, "fitted": CASES[name]["fitted"], "overrides": options.override}
        row["parts_mb"] = planned["parts_mb"]
        for key in ("memory_mb", *["seconds"] * (not options.memory_only)):
            row[key] = {"planned": planned[key], "measured": real[key], "ratio": round(planned[key] / real[key], 3)}
        append_row("plan", row, folder=options.results, device="cpu")
        print(summary(row), flush=True)


def summary(row: dict[str, Any]) -> str:
    """A row for people."""
    text = f"{row['case'] + ' +' * row['fitted']:<18}"
    for key, unit in (("memory_mb", "MB"), ("seconds", "s")):
        if key in row:
            text += f"{row[key]['planned']:>15,.0f} {unit:<2}{row[key]['measured']:>7,.0f} {unit:<2}"
            text += f"{row[key]['ratio']:>8.2f}"
    return text


def _in_own_process(name: str, role: str, overrides: Sequence[str]) -> dict[str, Any]:
    changes = [f"--override={change}" for change in overrides]
    command = [sys.executable, __file__, name, "--as", role, *changes]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured_plan(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What the plan says."""
    from moe_peft.training.forecast.available import held_bytes
    from moe_peft.training.forecast.cost import forecast_cost
    from moe_peft.training.forecast.work import forecast_run

    with tempfile.TemporaryDirectory() as folder:
        config = _config(name, overrides, Path(folder), is_plan=True)
        before = held_bytes()
        forecast = forecast_run(config)
        cost = forecast_cost(forecast, held_bytes() - before)
    parts = {part: round(size / 1e6, 1) for part, size in asdict(cost.memory).items()}
    seconds = round(cost.step_seconds + cost.eval_seconds, 2)
    return {"memory_mb": round(cost.memory.total / 1e6, 1), "parts_mb": parts, "seconds": seconds}


def measured_run(name: str, overrides: Sequence[str]) -> dict[str, float]:
    """What the run takes."""
    from rich.console import Console

    from moe_peft import Trainer
    from moe_peft.training.folder.run_folder import RunFolder

    with tempfile.TemporaryDirectory() as folder:
        config = _config(name, overrides, Path(folder), is_plan=False)
        RunFolder.draw = lambda self, *rest: None  # type: ignore[method-assign]
        found: dict[str, float] = {}

        def run() -> None:
            trainer = Trainer(config, console=Console(file=io.StringIO()))
            start = time.perf_counter()
            trainer.train()
            found["seconds"] = round(time.perf_counter() - start, 2)

        found["memory_mb"] = round(_peak_over_now(run) / 1e6, 1)
    return found


def _peak_over_now(action: Callable[[], None]) -> int:
    """The most memory that the process holds while something runs, over what it holds before."""
    from moe_peft.training.forecast.available import held_bytes

    before = peak = held_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.003):
            peak = max(peak, held_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return peak - before


def _config(name: str, overrides: Sequence[str], folder: Path, *, is_plan: bool) -> Any:
    """The case's config, its random model written if it has one, and the process as the train command has it."""
    import gguf  # noqa: F401 (what a run imports late would count as its memory)
    import rich.progress  # noqa: F401
    import tokenizers  # noqa: F401

    import moe_peft.training.trainer  # noqa: F401
    from moe_peft.command.memory import reuse_freed_memory
    from moe_peft.config import TrainConfig

    fields = dict(CASES[name]["config"])
    if fields["base_model"] in _SMALL:
        fields["base_model"] = str(_write_model(fields["base_model"], folder / "model"))
        fields["defaults"] = {**fields["defaults"], "cutoff_len": 1024}
        _give_back_freed_memory()
    file = folder / "config.json"
    file.write_text(json.dumps({**fields, "output_dir": str(folder / "run")}))
    config = TrainConfig.from_file(file, overrides)
    reuse_freed_memory(None if is_plan else config.max_concurrent_adapters or len(config.adapters))
    return config


def _give_back_freed_memory() -> None:
    """What making the model has left behind would hide what the run takes."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _write_model(name: str, folder: Path) -> Path:
    """Random weights in a Hugging Face folder, with a tokenizer of bytes."""
    import torch
    from export import _hf_config, _hf_name
    from presets import random_model
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from moe_peft.model.config import LlamaConfig

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[AddedToken("<s>", special=True), AddedToken("</s>", special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([""], trainer)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=True, **_SMALL[name])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": _CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(_hf_config(config)))
    weights = random_model(config, torch.float32, torch.device("cpu")).named_parameters()
    tensors = {_hf_name(key): weight.detach().contiguous() for key, weight in weights}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
