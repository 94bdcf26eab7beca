"""The list of keys in ``--help`` holds every key there is, each with its meaning."""

from moe_peft.adapters import METHODS
from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.config.help import WIDTH, KeyDoc, config_reference, describe_keys
from moe_peft.config.job import adapter_keys
from moe_peft.strict import field_names


def test_every_key_is_listed_once_in_its_section_and_says_what_it_means() -> None:
    text = config_reference()
    keys = [line.split(":")[0].strip() for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    run = [*field_names(TrainConfig), "defaults"]
    assert keys[: len(run)] == run
    assert set(keys[len(run) :]) == set(adapter_keys(None))
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []
    for cls in (TrainConfig, AdapterJob, *METHODS.values()):
        assert [key.name for key in describe_keys(cls) if not key.meaning] == []
        assert [key.name for key in describe_keys(cls) if text.count(f"\n{key.render()}\n") > 1] == []


def test_every_key_of_a_method_stands_under_its_name() -> None:
    own: dict[str, list[KeyDoc]] = {method: [] for method in METHODS}
    docs = {key.render(): key for config in METHODS.values() for key in describe_keys(config)}
    for section in config_reference().split("\n\n"):
        title, _, keys = " ".join(section.split("\n  ")[0].split()), None, f"\n{section}\n"
        owners = title.rstrip(":").rpartition("method: ")[2].split(", ")
        for owner in METHODS if title == "Keys of an adapter, whatever its method:" else set(owners) & set(METHODS):
            own[owner] += [key for text, key in docs.items() if f"\n{text}\n" in keys]
    for method, config in METHODS.items():
        assert sorted(key.name for key in own[method]) == sorted(key.name for key in describe_keys(config)), method


def test_types_and_defaults_are_those_of_the_dataclasses() -> None:
    docs = {key.name: key for key in describe_keys(AdapterJob)}
    assert (docs["name"].type, docs["name"].default) == ("str", None)
    assert (docs["lr"].type, docs["lr"].default) == ("float", "0.0002")
    assert (docs["betas"].type, docs["betas"].default) == ("[float, float]", "[0.9, 0.999]")
    assert (docs["overlong"].type, docs["overlong"].default) == ("error | skip", "error")
    assert (docs["eval_steps"].type, docs["eval_steps"].default) == ("int | null", "null")
    assert (docs["decay_router"].type, docs["decay_router"].default) == ("bool", "false")


def test_a_key_is_laid_out_beside_its_meaning_or_above_it() -> None:
    assert KeyDoc(name="r", type="int", default="8", meaning="rank").render() == "  r: int = 8" + " " * 26 + "rank"
    long = KeyDoc(name="key", type="a | b | c | d | e | f | g | h", default=None, meaning="one").render()
    assert long == "  key: a | b | c | d | e | f | g | h (required)\n" + " " * 38 + "one"
