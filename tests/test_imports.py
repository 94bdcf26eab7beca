"""Imports go downward only, heavy libraries wait until they are needed, and importing has no side effect."""

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Rooms, top first: a module imports its own row and rows below it. `model.batch` and `config` have rules of their own.
ROWS = [
    {
        *("cli", "__main__", "train", "submit", "status", "stop", "report", "generate", "merge", "compare", "list"),
        "command",
    },
    {"__init__"},
    {"comparison", "manager"},
    {"training"},
    {"generation"},
    {"data", "io"},
    {"config"},
    {"adapters"},
    {"model"},
    {"ops"},
    {"kernels"},
    {"frozen_dict", "strict", "version"},
]
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
CONFIG = next(rooms for rooms in ROWS if "config" in rooms)
NEVER = {
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
}
OUTSIDE = {"tests", "benchmarks", "tools"}
HEAVY = {
    "gguf",
    "matplotlib",
    "rich",
    "tokenizers",
    "sentencepiece",
    "jinja2",
    "huggingface_hub",
    "triton",
    "tensorboard",
}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether it is imported when its importer is."""

    module: str
    at_import: bool
    for_types_only: bool


def modules():
    """Dotted name and path of every module that gets installed."""
    found = {}
    for folder, package in ((ROOT / "moe_peft", "moe_peft"), (ROOT / "kernels", "moe_peft.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = path
    return found


MODULES = modules()


def imports_of(name):
    """Every import in a module; names taken from a package are resolved to the modules they are."""
    found = set()

    def visit(node, at_import, for_types_only):
        if isinstance(node, ast.Import):
            found.update(Import(alias.name, at_import, for_types_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(Import(inner if inner in MODULES else base, at_import, for_types_only))
        else:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                at_import = False
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                for_types_only = True
            for child in ast.iter_child_nodes(node):
                visit(child, at_import, for_types_only)

    visit(ast.parse(MODULES[name].read_text(encoding="utf-8")), True, False)
    return found


def room_of(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def own_imports(name):
    return {found for found in imports_of(name) if found.module.split(".")[0] == "moe_peft"}


def test_every_module_has_its_room():
    assert {room_of(name) for name in MODULES} <= set(ROW_OF), "give the new room its row in ROWS"
    assert len(MODULES) > 20


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downward(name):
    room = room_of(name)
    for found in own_imports(name):
        other = room_of(found.module)
        assert ROW_OF[room] <= ROW_OF[other], f"{name} imports {found.module}, which stands above it"
        assert other != "__init__" or room in ROWS[0], f"{name} imports the package's front"
        assert other != "kernels" or room in ("ops", "kernels"), f"{name} imports {found.module}; only ops may"


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib", reason="in Python from 3.11 on")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name.rpartition(".")[0] if path.name != "__init__.py" else name for name, path in modules().items()}
    assert set(settings["packages"]) == folders


def test_rules_of_single_modules():
    assert not own_imports("moe_peft.model.batch"), "model/batch.py is a leaf"
    assert {found.module for found in own_imports("moe_peft.strict")} == {"moe_peft.frozen_dict"}
    assert not own_imports("moe_peft.frozen_dict")
    for name in MODULES:
        if room_of(name) in CONFIG:
            for found in own_imports(name):
                allowed = found.module in ("moe_peft.adapters", "moe_peft.strict") or room_of(found.module) in CONFIG
                assert allowed, f"{name} imports {found.module}, but config knows the registry of adapters alone"
    commands = ROWS[0]
    assert not any(room_of(found.module) in commands for found in own_imports("moe_peft"))


@pytest.mark.parametrize("name", MODULES)
def test_what_nobody_imports(name):
    for found in imports_of(name):
        first = found.module.split(".")[0]
        assert first not in NEVER | OUTSIDE, f"{name} imports {found.module}"
        if room_of(name) == "kernels":
            own = found.module.startswith("moe_peft.kernels")
            assert own or first in {"torch", "triton", *sys.stdlib_module_names}, f"{name} imports {found.module}"


@pytest.mark.parametrize("name", MODULES)
def test_no_file_becomes_code(name):
    """No pickle behind ``torch.load``, no ``eval``, no shell string."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in {"eval", "exec", "os.system", "os.popen", "torch.save"}, f"{name} calls {called}"
            assert called != "torch.load" or keywords.get("weights_only") == "True", f"{name}: torch.load"
            assert keywords.get("shell", "False") == "False", f"{name}: {called} with a shell"


def test_no_module_imports_itself_in_a_circle():
    """Rooms of one row, ``data`` and ``io``, could otherwise import each other."""
    edges = {
        name: {found.module for found in own_imports(name) if not found.for_types_only and found.module != name}
        for name in MODULES
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in edges:
            return
        path.append(name)
        for other in sorted(edges[name]):
            visit(other)
        done.add(path.pop())

    for name in edges:
        visit(name)


def run(code, *options):
    """What a fresh interpreter prints as JSON."""
    command = [sys.executable, *options, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return json.loads(result.stdout)


SIDE_EFFECTS = """
import json, os, sys, threading, warnings
import torch

def state():
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cuda": torch.cuda.is_initialized(),
        "torch rng": torch.get_rng_state().tolist(),
        "signals": {name: str(signal.getsignal(getattr(signal, name))) for name in ("SIGINT", "SIGTERM")},
        "python rng": hash(random.getstate()),
        "warnings": len(warnings.filters),
        "handlers": len(logging.getLogger().handlers),
        "hooks": (sys.excepthook.__module__, sys.displayhook.__module__),
    }

import logging, random, signal
import importlib, pkgutil
before, loaded = state(), set(sys.modules)
import moe_peft
after = state()
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "loaded": sorted(set(sys.modules) - loaded),
}))
"""


@pytest.fixture(scope="module")
def fresh_import():
    return run(SIDE_EFFECTS)


def test_importing_has_no_side_effect(fresh_import):
    assert fresh_import["changed"] == []


def test_heavy_libraries_wait(fresh_import):
    loaded = {name.split(".")[0] for name in fresh_import["loaded"]}
    assert not loaded & (NEVER | HEAVY), "import it in the function that needs it"


COST = "import json, time, torch; start = time.process_time(); import moe_peft; print(time.process_time() - start)"


def test_importing_costs_little_over_torch():
    """In seconds of the processor, which a busy machine does not stretch; the best of three."""
    costs = []
    for _ in range(3):
        costs.append(run(COST))
        if costs[-1] <= 0.7:
            return
    pytest.fail(f"import moe_peft takes {costs} s over import torch")


def test_an_uninstalled_checkout_finds_its_kernels():
    """No ``site``, so no editable install's finder; the folder of torch stands in for the installed libraries."""
    import torch

    libraries = str(Path(torch.__file__).parent.parent)
    code = f"""
import json, sys
sys.path.append({libraries!r})
import moe_peft.ops, moe_peft.kernels.lora_linear.op as op
print(json.dumps([op.__file__, moe_peft.kernels.__version__]))
"""
    file, version = run(code, "-S")
    assert Path(file) == ROOT / "kernels" / "lora_linear" / "op.py"
    assert version


def test_public_names_exist():
    import moe_peft

    promised = {
        *("load_base_model", "load_tokenizer", "save_adapter", "load_adapter", "generation", "Trainer", "TrainConfig"),
        *("LoraConfig", "MixLoraConfig", "BatchConfig", "ModelInput", "ModelOutput", "LlamaConfig", "__version__"),
        *("LlamaEmbedding", "LlamaAttention", "LlamaMLP", "LlamaDecoderLayer", "LlamaForCausalLM"),
    }
    assert promised <= set(moe_peft.__all__)
    assert all(hasattr(moe_peft, name) for name in moe_peft.__all__)
    assert len(set(moe_peft.__all__)) == len(moe_peft.__all__)
