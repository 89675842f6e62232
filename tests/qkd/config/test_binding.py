"""Configs: text to typed values, overrides, and every fault at once."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qkd.checking import name_faults
from qkd.config import RunConfig
from qkd.config.bind_faults import models_in
from qkd.config.binding import (
    apply_overrides,
    bind,
    config_text,
    find_config,
    load_config,
    read_config,
    shipped_configs,
)
from qkd.failures import ConfigError
from qkd.files.yaml_text import YamlError, parse_yaml

SMALL = """
name: small
data: {name: digits}
teacher: {net: resnet8, train: {epochs: 1}}
student:
  quant: {weight_bits: 2, act_bits: 2}
  train: {epochs: 2}
"""


def small(**changes: Any) -> dict[str, Any]:
    return {**parse_yaml(SMALL), **changes}


def faults_of(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        bind(data, checks=(name_faults,))
    assert str(caught.value) == "\n".join(caught.value.faults)
    return list(caught.value.faults)


SHIPPED = shipped_configs()


def test_there_are_shipped_configs() -> None:
    assert {"digits/w2a2", "digits/w4a4", "digits/smoke", "cifar10/w2a2"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_bind_and_open_with_what_they_are_for(name: str) -> None:
    config = load_config(name, checks=(name_faults,))
    head = SHIPPED[name].read_text()
    assert [word for word in ("Purpose:", "Before:", "Command:", "Expected:", "Time:") if word not in head] == []
    assert f"qkd {'federate' if config.federated else 'run'} configs/{name}.yaml" in head
    assert config.name == name.replace("/", "-"), "run folders of shipped configs must not collide"


@pytest.mark.parametrize("name", SHIPPED)
def test_resolved_text_binds_to_the_same_config(name: str) -> None:
    config = load_config(name)
    assert bind(parse_yaml(config_text(config))) == config
    assert bind(yaml.safe_load(config_text(config))) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("5E4", 5e4), ("+1.5e+2", 150.0), (".5", 0.5), ("3", 3), ("-4", -4), ("010", 10), ("true", True),
     ("off", "off"), ("no", "no"), ("1_000", "1_000"), ("2020-01-01", "2020-01-01"), ("12:30", "12:30"), ("~", None),
     ("", None), ("[1, 2e0]", [1, 2.0]), ("'1e-3'", "1e-3"), ("{a: {b: 1}}", {"a": {"b": 1}})],
)  # fmt: skip
def test_plain_scalars_are_what_people_mean(text: str, value: object) -> None:
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_back_as_it_was_written(value: float) -> None:
    found = parse_yaml(repr(value))
    assert isinstance(found, float) and found == value


def test_infinities_are_numbers_in_yaml_but_not_in_a_config() -> None:
    assert parse_yaml("-.inf") == -math.inf
    assert faults_of(small(teacher={"net": "resnet8", "train": {"epochs": 1, "lr": math.inf}})) == [
        "config.teacher.train.lr: must be a finite number, got inf"
    ]


def test_repeated_keys_are_errors_with_their_lines() -> None:
    with pytest.raises(YamlError) as caught:
        parse_yaml("a: 1\nb: {c: 1, c: 2}\na: 3\n")
    assert set(caught.value.faults) == {
        "line 3: repeated key `a`, also on line 1",
        "line 2: repeated key `c`, also on line 2",
    }


@pytest.mark.parametrize(
    ("text", "part"),
    [("a: [1", "line 1"), ("a: 1\n---\nb: 2", "document"),
     ("!!python/object/apply:os.getcwd []", "not plain YAML data"),
     ("? [1, 2]\n: 3", "a key must be a word"), ("a: &x [*x]", "recursive"), ("\tx: 1", "line 1")],
)  # fmt: skip
def test_what_is_not_plain_yaml_is_refused(text: str, part: str) -> None:
    with pytest.raises(YamlError, match="(?s).*") as caught:
        parse_yaml(text)
    assert part in str(caught.value)


def test_all_faults_are_reported_at_once() -> None:
    data = small(
        student={
            "quant": {
                "weigth_bits": 2,
                "act_bits": 99,
                "act_quantizer": "lqs",
                "overrides": {"fc": {"weight_bit": 4}, "layer1.*": {"act_bits": 9}},
            },
            "train": {"epochs": 2.0, "lr": -4.0, "precision": "on"},
            "weight_bits": 2,
            "terms": [{"loss": "soft_targets"}, {"loss": "soft_target", "options": {"temperature": -4.0}}],
            "agent": {"policy": "crop_flap"},
        },
        data={"name": "digit", "val_fraction": 1.0},
        teacher={"net": "resnet_20", "head": "new"},
        device="gpu",
    )
    faults = faults_of(data)
    expected = [
        "config.student.quant.weigth_bits: unknown key; did you mean `weight_bits`?",
        "config.student.quant.weight_bits: missing, and it has no default",
        "config.student.quant.act_bits: must be at most 8, got 99",
        "config.student.quant.act_quantizer: must be 'lsq', 'pact' or 'dorefa', got 'lqs'",
        "config.student.quant.overrides.fc.weight_bit: unknown key; must be 'weight_bits' or 'act_bits'",
        "config.student.quant.overrides.layer1.*.act_bits: must be at most 8, got 9",
        "config.student.train.epochs: must be a whole number, got 2.0",
        "config.student.train.lr: must be positive, got -4.0",
        "config.student.train.precision: must be 'auto', 'float32', 'bf16' or 'fp16', got 'on'",
        "config.student.weight_bits: unknown key here; did you mean `student.quant.weight_bits` or "
        "`student.auxiliary.quant.weight_bits`?",
        "config.student.terms.0.loss: unknown loss 'soft_targets'; did you mean `soft_target`?",
        "config.student.terms.1.options.temperature: must be positive, from 1e-06 to 1e+06, got -4.0",
        "config.student.agent.policy: unknown agent policy 'crop_flap'; did you mean `crop_flip`?",
        "config.data.name: unknown data set 'digit'; did you mean `digits`?",
        "config.data.val_fraction: must be less than 1, got 1.0",
        "config.teacher: `head` applies to the last layer of `weights`, which are missing",
        "config.teacher.net: unknown net 'resnet_20'; did you mean `resnet20`?",
        "config.device: must be auto, cpu, cuda or cuda:N, got 'gpu'",
    ]
    assert sorted(faults) == sorted(expected)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "a/b"}, "config.name: must consist of letters"),
        ({"name": 3}, "config.name: must be text, got 3"),
        ({"seed": True}, "config.seed: must be a whole number, got true"),
        ({"seed": "1"}, "config.seed: must be a whole number, got '1'"),
        ({"seed": None}, "config.seed: must be a whole number, got nothing (null)"),
        ({"data": None}, "config.data: must be a group of keys, got nothing (null)"),
        ({"data": [1]}, "config.data: must be a group of keys, got a list of 1"),
        ({"data": {"name": "digits", "download": "yes"}}, "config.data.download: must be true or false, got 'yes'"),
        ({"teacher": {"net": "resnet8", "train": {"epochs": 1, "milestones": 3}}},
         "config.teacher.train.milestones: must be a list, got 3"),
        ({"teacher": {"net": "resnet8", "train": {"epochs": 0}}},
         "config.teacher.train.epochs: must be at least 1, got 0"),
        ({"nmae": 1}, "config.nmae: unknown key; did you mean `name`?"),
    ],
)  # fmt: skip
def test_a_fault_says_where_and_what(changes: dict[str, Any], fault: str) -> None:
    assert [line for line in faults_of(small(**changes)) if line.startswith(fault)]


@pytest.mark.parametrize("agent", [{"policy": "teacher"}, {"policy": "teacher", "cutmix": 0.0}, {"policy": "cutmix"}])
@pytest.mark.parametrize("view", ["clean", "own", "same"])
def test_cutmix_is_seen_through_the_teachers_policy(agent: dict[str, Any], view: str) -> None:
    """The teacher must see the same mixture, however the student's agent has come to mix images."""
    teacher = {"net": "resnet8", "train": {"epochs": 1}, "agent": {"policy": "cutmix"}}
    data = small(teacher=teacher, student={"quant": {"weight_bits": 4, "act_bits": 4}, "agent": agent, "view": view})
    mixes = agent.get("cutmix") != 0.0 or view == "own"
    if mixes and view != "same":
        said = (
            "`policy: teacher` is cutmix" if view == "clean" and agent["policy"] == "teacher" else "`same` with CutMix"
        )
        assert any(said in fault for fault in faults_of(data))
        assert "is cutmix" not in said or bind(data, is_stored=True), "older runs may have it"
    else:
        assert bind(data).student_agent.policy == "cutmix"


def test_values_of_a_union_give_one_fault() -> None:
    data = apply_overrides(small(), ["student.terms=[{loss: soft_target, options: {temperature: [1]}}]"])
    assert faults_of(data) == [
        "config.student.terms.0.options.temperature: must be a number, text, or true or false, got a list of 1"
    ]


LISTS = {
    "student.low_bit.oscillation_thresholds=[0.1]": ["student.low_bit.oscillation_thresholds.1: missing: the list is"],
    "student.low_bit.oscillation_thresholds=[0.1,0.2,0.3]":
        ["student.low_bit.oscillation_thresholds: must be a list of at most 2, got a list of 3"],
    "bench.on=[]": ["bench.on: must be a list of at least 1, got a list of 0"],
    "student.data_free={method: zskd, beta: [0]}": ["student.data_free.beta.0: must be positive, got 0"],
    "student.data_free={method: dafl, width: 7}": ["student.data_free.width: must be a multiple of 2, got 7"],
    'data.domains={"a b": {}, c: {}}': ["data.domains.a b: a key must consist of"],
    'student.quant.overrides={conv1: {bits: 4}}': ["student.quant.overrides.conv1.bits: unknown key; must be"],
}  # fmt: skip


IDLE = {
    "student.data_free={method: deep_inversion, latent: 5}": "student.data_free: method `deep_inversion` does not read",
    "student.data_free={method: adaptive_inversion, width: 8}": "student.data_free: method `adaptive_inversion` does",
    "student.data_free={method: cmi, beta: [1.0]}": "student.data_free: method `cmi` does not read 'beta'",
    "teacher.ensemble=logit": "teacher: `ensemble` and `ensemble_temperature` are for `members` above 1",
}


@pytest.mark.parametrize("change", IDLE)
def test_keys_without_effect_are_faults(change: str) -> None:
    agent = ["student.agent.policy=none"] if "data_free" in change else []
    assert any(
        line.startswith(f"config.{IDLE[change]}") for line in faults_of(apply_overrides(small(), [change, *agent]))
    )


SIZES = {
    (
        "image_size: 48",
        "resize_size: 40",
    ): "data.resize_size: 40 is below `image_size`, so that .* give 48 or more, or a",
    ("image_size: [64, 32]", "resize_size: 31"): "data.resize_size: 31 is below",
    (
        "preprocess: torchvision/resnet18",
        "resize_size: 300",
    ): "data.resize_size: `preprocess` also sets it, .* leave it",
    ("preprocess: torchvision", "interpolation: bicubic"): "data.interpolation: `preprocess` also sets it, .*bicubic",
    ("image_size: [64, 32]", "resize_size: 32"): "",
    ("preprocess: torchvision", "interpolation: bilinear"): "",  # as `qkd show` writes it
}


@pytest.mark.parametrize("keys", SIZES)
def test_sizes_that_would_not_be_used_are_refused_in_new_configs(keys: tuple[str, ...]) -> None:
    made = small(data=yaml.safe_load("{name: folder, path: somewhere, " + ", ".join(keys) + "}"))
    assert bind(made, is_stored=True).data.name == "folder", "a run of before is still read"
    if not SIZES[keys]:
        assert bind(made).data.name == "folder"
        return
    (fault,) = faults_of(made)
    assert re.match(f"config.{SIZES[keys]}", fault), fault


@pytest.mark.parametrize("change", LISTS)
def test_lists_keys_and_multiples_are_told_in_our_words(change: str) -> None:
    found = faults_of(apply_overrides(small(), [change]))
    assert len(found) == len(LISTS[change]), found
    assert all(line.startswith(f"config.{start}") for line, start in zip(found, LISTS[change], strict=True)), found


def test_sizes_that_are_not_square_are_written_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    config = bind(apply_overrides(small(), ["data.image_size=[8, 16]"]))
    assert yaml.safe_load(config_text(config))["data"]["image_size"] == [8, 16]
    assert config.data.image_size == (8, 16) and not recwarn.list


@pytest.mark.parametrize("flavor", ["ort", "qcdq", "qonnx"])
def test_every_flavor_can_be_asked_for(flavor: str) -> None:
    config = bind(small(export={"flavor": flavor, "strict": True}))
    assert config.export.flavor == flavor and config.export.strict


def test_a_flavor_that_is_none_is_a_fault() -> None:
    (fault,) = faults_of(small(export={"flavor": "tflite"}))
    assert fault.startswith("config.export.flavor: ") and "qonnx" in fault and "tflite" in fault


@pytest.mark.parametrize("policy", ["none", "crop", "crop_flip", "cutmix", "trivial", "randaugment"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_flatten_needs_a_policy_with_epochs(role: str, policy: str) -> None:
    data = apply_overrides(small(), [f"{role}.agent={{policy: {policy}, flatten: true}}"])
    (fault,) = faults_of(data)
    assert fault.startswith(f"config.{role}.agent: `flatten` mixes the epochs of a schedule") and f"`{policy}`" in fault


def test_flatten_looks_at_the_policy_that_the_student_takes() -> None:
    taking = ["student.agent={policy: teacher, flatten: true}"]
    (fault,) = faults_of(apply_overrides(small(), [*taking, "teacher.agent={policy: trivial}"]))
    assert "student.agent.flatten" in fault and "`trivial`" in fault
    for policy in ("pba", "search"):
        assert bind(apply_overrides(small(), [*taking, f"teacher.agent={{policy: {policy}}}"])).student.agent.flatten
    assert bind(apply_overrides(small(), ["teacher.agent={policy: pba, flatten: true}"])).teacher.agent.flatten


def test_phases_must_add_up() -> None:
    data = apply_overrides(small(), ["student.phases=[{epochs: 3}]"])
    assert faults_of(data) == ["config.student: epochs of `phases` add up to 3, but `train.epochs` is 2"]


def test_overrides_set_keys_and_items_without_touching_the_data() -> None:
    data = small()
    data["student"]["phases"] = [{"epochs": 1}, {"epochs": 1}]
    before = repr(data)
    changed = apply_overrides(
        data, ["student.phases.1.epochs=3", "teacher.train.lr=1e-3", "data.path=a=b", "bench.rounds=5", "seed="]
    )
    assert repr(data) == before
    assert changed["student"]["phases"] == [{"epochs": 1}, {"epochs": 3}]
    assert changed["teacher"]["train"] == {"epochs": 1, "lr": 1e-3}
    assert changed["data"]["path"] == "a=b"
    assert changed["bench"] == {"rounds": 5}
    assert changed["seed"] is None


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("epochs", "must be key.path=value"),
        ("=3", "must be key.path=value"),
        ("a..b=3", "must be key.path=value"),
        ("name.x=3", "`name` is 'small', which has no keys"),
        ("student.terms.0.weight=1", "`student.terms` is not in the file; give the whole list"),
        ("student.phases.7.epochs=1", "`7` is not an index from 0 to 0"),
        ("name=[1", "not YAML"),
    ],
)
def test_overrides_that_lead_nowhere_are_named(override: str, part: str) -> None:
    data = small()
    data["student"]["phases"] = [{"epochs": 2}]
    with pytest.raises(ConfigError) as caught:
        apply_overrides(data, [override, "seed=1"])
    assert len(caught.value.faults) == 1
    assert f"override `{override}`" in str(caught.value) and part in str(caught.value)


def test_overrides_go_through_the_same_binding(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    assert load_config(file, ["student.train.lr=1e-3"]).student.train.lr == 1e-3
    with pytest.raises(ConfigError, match="config.student.trian: unknown key; did you mean `train`"):
        load_config(file, ["student.trian.lr=1"])


def test_a_shipped_config_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = {find_config(name) for name in ("digits/w2a2", "digits/w2a2.yaml", "configs/digits/w2a2.yaml")}
    assert found == {SHIPPED["digits/w2a2"]}


@pytest.mark.parametrize(
    ("name", "part"),
    [("digits/w2a3", "did you mean `digits/w2a2`"), ("digits", "`digits/smoke`"), ("digit/w4a4", "`digits/w4a4`"),
     ("zzz", "`qkd ls configs` lists")],
)  # fmt: skip
def test_a_config_that_is_not_there_names_near_ones(name: str, part: str) -> None:
    with pytest.raises(ConfigError, match="no such config file") as caught:
        find_config(name)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b"- 1\n", "holds a list of 1"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: 1\na: 2", "line 2"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, part: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert str(file) in str(caught.value) and part in str(caught.value)


def test_data_that_is_not_plain_is_refused() -> None:
    assert "not plain data" in faults_of({"name": b"hi"})[0]
    with pytest.raises(YamlError, match=r"line 1, column 7: .*!!binary"):
        parse_yaml("name: !!binary aGk=")


def test_every_key_of_the_schema_says_what_it_is() -> None:
    sections, seen = [RunConfig], 0
    for section in sections:
        for name, field in section.model_fields.items():
            seen += 1
            nested = [model for model in models_in(field.annotation) if model not in sections]
            sections += nested
            assert field.description or models_in(field.annotation), f"{section.__name__}.{name}"
    assert seen > 50


@pytest.mark.parametrize(("data", "fault"), [
    ({"name": "digits", "train_crop": "random"}, "only for a folder of images"),
    ({"name": "digits", "train_decode": "reduced"}, "only for a folder of images"),
    ({"name": "folder", "path": "x", "train_crop": "random", "crop_area": [0.5, 0.1]}, "`crop_area` must be .smallest"),
    ({"name": "folder", "path": "x", "train_crop": "random", "crop_area": [0, 0]}, "`crop_area` must be .smallest"),
    ({"name": "folder", "path": "x", "crop_ratio": [2, 1]}, "`crop_ratio` must be .smallest, largest"),
], ids=str)  # fmt: skip
def test_pieces_that_cannot_be_drawn_are_refused(data: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        bind(small(data=data))


def test_pieces_of_a_folder_bind() -> None:
    data = {"name": "folder", "path": "x", "train_crop": "random", "train_decode": "reduced", "crop_area": [0.2, 1]}
    config = bind(small(data=data))
    assert config.data.crop_area == (0.2, 1.0) and config.data.train_decode == "reduced"


def test_a_folder_in_a_configs_place_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "photos").mkdir()
    for name in ("run/config.yaml", "photos.yaml"):
        (tmp_path / name).write_text("name: x\n", encoding="utf-8")
    hints = {"run": "did you mean the config in it, `.*run/config.yaml`", "images": "`qkd init FOLDER` writes one",
             "photos": "did you mean `.*photos.yaml`"}  # fmt: skip
    for name, hint in hints.items():
        with pytest.raises(ConfigError, match=hint):
            find_config(str(tmp_path / name))
    for name in (".", "/", "", ".."):
        with pytest.raises(ConfigError, match="no such config file|is a folder"):
            find_config(name)
