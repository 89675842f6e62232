"""Addresses and devices: what is taken, and what is refused before any program sees it."""

from __future__ import annotations

import subprocess

import pytest

from export.devices import Device, as_device
from export.devices.connections.shell import quote_program


@pytest.mark.parametrize(
    ("address", "target", "port"),
    [
        ("ssh://pi@raspberrypi.local", "pi@raspberrypi.local", None),
        ("ssh://10.0.0.2:2222", "10.0.0.2", 2222),
        ("ssh://MyAlias", "MyAlias", None),
        ("ssh://user@[::1]:22", "user@::1", 22),
        ("ssh://[::1]:22", "::1", 22),
        ("ssh://[fe80::1]", "fe80::1", None),
        ("adb://R58M123ABCD", "R58M123ABCD", None),
        ("adb://192.168.1.5:5555", "192.168.1.5:5555", None),
        ("adb://emulator-5554", "emulator-5554", None),
    ],
)
def test_addresses(address, target, port):
    device = as_device(address)
    assert (device.target, device.port, device.title) == (target, port, address)
    assert as_device(device) is device
    assert device.work_folder == ("/tmp" if address.startswith("ssh") else "/data/local/tmp")


@pytest.mark.parametrize(
    "address",
    ["", "pi", "Local", "http://pi", "ssh://", "ssh://-oProxyCommand=touch", "ssh://pi;rm", "ssh://pi/x", "ssh://p i",
     "ssh://user:secret@pi", "ssh://pi:99999", "ssh://pi:x", "ssh://$(id)", "adb://", "adb://-s", "adb://a b",
     "ssh://pi\n", "ssh://\x1b[31m"],
)  # fmt: skip
def test_what_is_no_address(address):
    with pytest.raises(ValueError, match=r"device .*ssh://\[user@\]host"):
        Device(address)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("timeout_s", 0.0, "timeout_s must be positive, got 0.0"),
        ("timeout_s", float("nan"), "timeout_s must be positive"),
        ("threads", 0, "threads must be at least 1, got 0"),
        ("python", "", "python must be a program"),
        ("python", "-c", "python must be a program"),
        ("python", "~pi/env/bin/python", "python: only ~/, the home folder there, is known, got '~pi/env/bin/python'"),
        ("folder", "relative", "folder must be an absolute path on the device, got 'relative'"),
        ("perf_test", "tool", "perf_test must be an absolute path"),
    ],
)
def test_fields_out_of_range(field, value, message):
    with pytest.raises(ValueError, match=message):
        Device("ssh://pi", **{field: value})


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("python3", "python3"),
        ("env/my tools/python", "$HOME/env/my tools/python"),
        ("./env/python", "$HOME/./env/python"),
        ("~/env/python", "$HOME/env/python"),
        ("/usr/bin/python3", "/usr/bin/python3"),
    ],
)
def test_a_relative_program_is_of_the_home_folder_wherever_it_is_called(tmp_path, program, found):
    script = f"printf %s {quote_program(program)}"
    done = subprocess.run(["sh", "-c", script], cwd="/", env={"HOME": str(tmp_path)}, capture_output=True, check=True)
    assert done.stdout.decode() == found.replace("$HOME", str(tmp_path))
