"""The default run in small: its tasks are learnt, and only by an adapter whose answers belong to its sentences."""

import io
import json
import random

import pytest
from rich.console import Console

from moe_peft import TrainConfig, Trainer
from moe_peft.data.bundled import bundled_records_path

pytestmark = pytest.mark.slow

# Enough to learn what form the answers have, which both kinds of adapter can; the whole run takes more of each.
NUM_STEPS, BATCH_SIZE, NUM_EVAL = 10, 3, 12
REQUIRED_FALL = 0.20  # what every task of the default run must reach, and its control must not


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def shuffle_answers(records):
    """The same sentences and the same answers, no answer with its own sentence."""
    order = list(range(len(records)))
    random.Random(0).shuffle(order)
    shuffled = []
    for i, j in zip(order, order[1:] + order[:1], strict=True):
        *prompt, _ = records[i]["messages"]
        shuffled.append({"messages": [*prompt, records[j]["messages"][-1]]})
    return shuffled


def falls(folder):
    """By adapter name, the part of its held-out loss that training took away; a control is ``NAME-shuffled``.

    Each task's adapter and its control have the default config's settings and as many steps; all six share every batch.
    """
    config = TrainConfig.default().to_dict()
    adapters = []
    for entry in config["adapters"]:
        name = entry["name"]
        records = read_jsonl(bundled_records_path(entry["data"]))
        held_out = read_jsonl(bundled_records_path(entry["eval_data"]))[:NUM_EVAL]
        entry |= {"num_epochs": 1, "max_steps": NUM_STEPS, "batch_size": BATCH_SIZE, "eval_steps": None}
        entry["eval_data"] = write_jsonl(folder / f"{name}.eval.jsonl", held_out)
        adapters.append({**entry, "data": write_jsonl(folder / f"{name}.jsonl", records)})
        data = write_jsonl(folder / f"{name}-shuffled.jsonl", shuffle_answers(records))
        adapters.append({**entry, "name": f"{name}-shuffled", "data": data})
    config |= {"adapters": adapters, "answer_examples": 0, "device": "cpu", "output_dir": str(folder / "run")}
    result = Trainer(TrainConfig.from_dict(config), console=Console(file=io.StringIO())).train()
    assert [adapter.num_steps for adapter in result.adapters] == [NUM_STEPS] * 6
    return {adapter.name: 1 - adapter.eval_loss_after / adapter.eval_loss_before for adapter in result.adapters}


def test_the_control_keeps_every_answer_and_moves_them_all():
    records = read_jsonl(bundled_records_path("bundled:orders"))
    shuffled = shuffle_answers(records)
    before = {record["messages"][1]["content"]: record["messages"][2]["content"] for record in records}
    after = {record["messages"][1]["content"]: record["messages"][2]["content"] for record in shuffled}
    assert before.keys() == after.keys() and sorted(before.values()) == sorted(after.values())
    assert all(after[sentence] != answer for sentence, answer in before.items())


@pytest.mark.usefixtures("no_pictures")  # six adapters' cost seconds
def test_only_true_answers_teach_a_task(tmp_path):
    found = falls(tmp_path)
    for task in ("orders", "diary", "expenses"):
        assert found[task] >= 2 * REQUIRED_FALL, found
        assert found[f"{task}-shuffled"] < REQUIRED_FALL, found
