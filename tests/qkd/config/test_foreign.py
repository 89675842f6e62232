"""Keys of other programs: each is told how to say it here, and none is a key of ours."""

from __future__ import annotations

import pytest

from qkd.config import RunConfig
from qkd.config.bind_faults import _all_paths
from qkd.config.binding import bind
from qkd.config.foreign import FOREIGN, foreign_hint
from qkd.failures import ConfigError
from qkd.files.yaml_text import parse_yaml

CONFIG = """
name: small
data: {name: digits}
teacher: {net: resnet8, train: {epochs: 1}, KEY: true}
student: {quant: {weight_bits: 2, act_bits: 2}, train: {epochs: 1}}
"""


def fault(key: str) -> str:
    with pytest.raises(ConfigError) as caught:
        bind(parse_yaml(CONFIG.replace("KEY", key)))
    assert len(caught.value.faults) == 1
    return caught.value.faults[0]


def test_pretrained_is_told_the_real_way() -> None:
    text = fault("pretrained")
    assert text.startswith("config.teacher.pretrained: unknown key; `weights: FILE`")
    assert "untrained" not in text


@pytest.mark.parametrize(
    ("key", "way"),
    [
        ("arch", "`net`"),
        ("Num-Classes", "come from the data set"),
        ("resume", "repeat the command with the same name"),
        ("gpus", "`device`"),
    ],
)
def test_others_are_told_theirs(key: str, way: str) -> None:
    assert way in fault(key)


def test_no_foreign_key_is_one_of_ours() -> None:
    ours = {path.rpartition(".")[2] for path in _all_paths(RunConfig)}
    assert len(ours) > 50
    assert ours & set(FOREIGN) == set()
    assert foreign_hint("weight_bits") == ""
