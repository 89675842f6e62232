"""The devices file: bound strictly, found by name, and shipped with examples that bind."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import Device
from qkd.bench.device_file import FORM, DeviceEntry, default_file, read_devices, resolve_devices
from qkd.checking.names import table
from qkd.config.binding import shipped_configs, shipped_folder
from qkd.failures import ConfigError

GOOD = """
devices:
  pi4:
    address: ssh://pi@board:2222
    python: ~/venv/bin/python
    threads: 4
    affinity: [0, 1]
    timeout_s: 30
    ssh_options: [-F, my_config]
  phone: {address: adb://R58M, perf_test: /data/local/tmp/onnxruntime_perf_test}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "devices.yaml"
    path.write_text(GOOD)
    return path


def test_devices_of_a_file(file: Path) -> None:
    found = read_devices(file)
    assert found["pi4"] == Device(
        "ssh://pi@board:2222", "pi4", "~/venv/bin/python", threads=4, affinity=(0, 1), timeout_s=30.0,
        ssh_options=("-F", "my_config"),
    )  # fmt: skip
    assert found["phone"].perf_test == "/data/local/tmp/onnxruntime_perf_test" and found["phone"].timeout_s == 600


def test_names_and_addresses_are_resolved_in_order(file: Path) -> None:
    found = resolve_devices(["ssh://x", "pi4", "local", "phone"], file, timeout_s=5.0)
    assert [device.title for device in found] == ["ssh://x", "pi4", "local", "phone"]
    assert [device.timeout_s for device in found] == [5.0, 30.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("devices: {a: {adress: local}}",
         ["devices.a.address: missing, and it has no default",
          "devices.a.adress: unknown key; did you mean `address`?"]),
        ("devices: {a: {address: local, threads: 0}}", ["devices.a.threads: must be at least 1, got 0"]),
        ("devices: {a: {address: local, threads: four}}", ["devices.a.threads: must be a whole number, got 'four'"]),
        ("devices: {a: {address: pi}}", ["devices.a: device 'pi' is not an address; it must be local, ssh://"]),
        ("devices: {a: {address: 'ssh://a b'}}", ["devices.a: device 'ssh://a b': 'a b' is no host"]),
        ("devices: {a: {address: ssh://a, folder: tmp}}", ["devices.a: folder must be an absolute path"]),
        ("device: {}", ["devices: missing", "device: unknown key; did you mean `devices`?"]),
        ("devices: {a: local}", ["devices.a: must be"]),
        ("- a", ["holds a list of 1"]),
        ("devices: {a: {address: local}, a: {address: local}}", ["repeated key `a`"]),
        ("", ["is empty"]),
    ],
)  # fmt: skip
def test_all_faults_are_told_with_their_place(tmp_path: Path, text: str, faults: list[str]) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_devices(path)
    assert len(caught.value.faults) == len(faults)
    for found, wanted in zip(sorted(caught.value.faults), sorted(f"{path}: {fault}" for fault in faults), strict=True):
        assert wanted.removeprefix(f"{path}: ") in found and str(path) in found


def test_unknown_names_are_told_together(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_devices(["pi5", "local", "ssh://-x", "tablet"], file)
    first, second, third = caught.value.faults
    assert "device 'pi5' is neither an address" in first and "did you mean `pi4`?" in first
    assert "'-x' is no host" in second and "known: pi4, phone, local" in third
    with pytest.raises(ConfigError, match=r"no such devices file; its form: devices: \{board: \{address: "):
        resolve_devices(["pi4"], file.with_name("none.yaml"))


def test_a_host_without_a_scheme_is_told_the_address_and_where_names_are_looked_for(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = tmp_path / "qkd" / "devices.yaml"
    with pytest.raises(ConfigError) as caught:
        resolve_devices(["board"])
    message = str(caught.value)
    assert "(a host, or an alias of ~/.ssh/config, is ssh://board)" in message
    assert f"a name of your devices file, which would be {own} (or --devices FILE)" in message
    assert str(shipped_folder()) not in message
    with pytest.raises(ConfigError, match=f"a name of {file}; .*is ssh://board"):
        resolve_devices(["board"], file)
    with pytest.raises(ConfigError) as caught:
        resolve_devices(["no host"])
    assert "ssh://no" not in str(caught.value)


def test_the_file_of_the_page_is_one_and_the_page_has_every_key(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "howto" / "board.md").read_text(encoding="utf-8")
    (tmp_path / "d.yaml").write_text("devices:" + page.partition("\ndevices:")[2].partition("```")[0])
    assert read_devices(tmp_path / "d.yaml")["board"].threads == 4
    table = [line for line in page.splitlines() if line.startswith("| `")]
    assert [key for key in DeviceEntry.model_fields if not any(f"`{key}`" in line for line in table)] == []


def test_the_form_that_the_message_shows_is_one(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(FORM)
    assert read_devices(tmp_path / "d.yaml")["board"].python == "env/bin/python"


def test_the_file_is_not_needed_for_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "devices.yaml").write_text("damaged: [")
    assert [device.title for device in resolve_devices(["local", "ssh://a"])] == ["local", "ssh://a"]
    with pytest.raises(ConfigError, match=r"; configs/devices.yaml is read where it is named: --devices configs/"):
        resolve_devices(["pi4"])
    with pytest.raises(ConfigError, match="configs/devices.yaml: line 1"):
        resolve_devices(["pi4"], Path("configs/devices.yaml"))


def test_a_file_of_the_current_folder_runs_no_command_unnamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "own"))
    (tmp_path / "configs").mkdir()
    text = "devices: {pi4: {address: ssh://x, ssh_options: [-o, 'ProxyCommand=touch here']}}"
    (tmp_path / "configs" / "devices.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is neither an address"):
        resolve_devices(["pi4"])
    assert default_file() == shipped_folder() / "devices.yaml"
    (tmp_path / "own" / "qkd").mkdir(parents=True)
    (tmp_path / "own" / "qkd" / "devices.yaml").write_text("devices: {pi4: {address: ssh://mine}}")
    assert resolve_devices(["pi4"])[0].address == "ssh://mine"


def test_the_shipped_file_and_its_examples_bind(tmp_path: Path) -> None:
    shipped = shipped_folder() / "devices.yaml"
    assert list(read_devices(shipped)) == ["here"] and "devices" not in shipped_configs()
    text = shipped.read_text()
    head, _, examples = text.partition("# pi4:")
    lines = [line.removeprefix("#") for line in f"# pi4:{examples}".splitlines()]
    path = tmp_path / "d.yaml"
    path.write_text(head + "\n".join(f" {line}" for line in lines))
    assert list(read_devices(path)) == ["here", "pi4", "jetson", "phone"]


def test_ls_devices_knows_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "qkd").mkdir()
    (tmp_path / "qkd" / "devices.yaml").write_text(GOOD)
    rows = table("devices")
    assert rows["pi4"] == f"for bench: ssh://pi@board:2222 ({tmp_path / 'qkd' / 'devices.yaml'})"
    assert default_file() == tmp_path / "qkd" / "devices.yaml" and {"local", "cpu"} <= set(rows)
