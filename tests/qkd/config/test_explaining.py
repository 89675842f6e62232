"""Every key is explained, from the schema; editors get it as JSON Schema."""

from __future__ import annotations

import json

import pytest

from qkd.cli import main
from qkd.config.binding import bind_section
from qkd.config.data_free import DataFreeConfig
from qkd.config.explaining import explained, json_schema


def test_every_key_has_a_sentence_and_a_default_or_must_be_given() -> None:
    keys = explained().keys
    assert len(keys) > 120
    assert [key.path for key in keys if not key.about and not key.is_group] == []
    assert [key.path for key in keys if not key.about] == []
    must = {key.path for key in keys if not key.default}
    assert {"name", "data.name", "teacher.net", "student.quant.weight_bits"} <= must
    assert "teacher.train.epochs" not in must
    found = {key.path: key.default for key in keys}
    keys_of_generator = ("epochs", "optimizer", "lr", "weight_decay", "schedule")
    said = [found[f"student.data_free.train.{key}"] for key in keys_of_generator]
    assert said == ["20", "adamw", "0.001", "0.0", "constant"]
    assert (found["teacher.train.lr"], found["student.train.lr"], found["data.test_fraction"]) == ("0.1", "0.02", "0.2")


def test_a_part_or_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--explain", "data.resize"]) == 0
    text = capsys.readouterr().out
    assert (
        text.startswith("data.resize = crop\n")
        and "pad: fit inside, with black borders" in text
        and "resize_size" not in text
    )
    assert main(["show", "--explain", "student.terms", "--json"]) == 0
    assert "student.terms[].weight" in {row["key"] for row in json.loads(capsys.readouterr().out)}
    assert main(["show", "--explain", "epochs"]) == 2
    assert "no such key; did you mean `teacher.train.epochs`" in capsys.readouterr().err
    assert main(["show"]) == 2
    assert "name a CONFIG" in capsys.readouterr().err


def test_the_schema_is_what_is_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json_schema()
    assert schema["required"] == ["data", "teacher", "student"] and schema["additionalProperties"] is False
    size = schema["$defs"]["DataConfig"]["properties"]["image_size"]
    assert size["anyOf"][1]["maxItems"] == 2
    sections = [name for name, part in schema["$defs"].items() if part.get("type") == "object"]
    assert all(schema["$defs"][name]["additionalProperties"] is False for name in sections)


def test_a_name_of_the_users_stands_in_the_path_of_a_group() -> None:
    keys = {key.path: key for key in explained("data.domains").keys}
    assert keys["data.domains.<name>"].is_group and keys["data.domains.<name>.rotate"].default == "0.0"


def test_a_generators_training_that_is_given_in_part_keeps_its_other_defaults() -> None:
    section = bind_section(DataFreeConfig, {"method": "dafl", "train": {"epochs": 3}})
    whole = bind_section(DataFreeConfig, {"method": "dafl"})
    assert section.train == whole.train.model_copy(update={"epochs": 3})
    assert (whole.train.optimizer, whole.train.lr, whole.train.epochs) == ("adamw", 1e-3, 20)
