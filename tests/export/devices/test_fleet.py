"""Several devices side by side: a failure is a row, and the others continue."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from export import Device, DeviceError, Settings, measure_devices
from export.devices import fleet
from export.devices.connections.capture import capture

QUICK = Settings(warmup=0, rounds=2, memory=False)


def test_real_devices_and_one_that_is_not_there(ssh_server, here, plain):
    devices = [
        Device(),
        ssh_server.device(python=here, name="board"),
        Device("ssh://127.0.0.1:1", name="gone"),
        Device("ssh://127.0.0.1:1", name="no adb either", provider="Foo"),
    ]
    said = []
    results = measure_devices(devices, {"a": plain}, QUICK, say=said.append)
    assert [result.device.title for result in results] == ["local", "board", "gone", "no adb either"]
    assert [bool(result.failure) for result in results] == [False, False, True, True]
    assert results[1].reports["a"].median_ms > 0 and "Connection refused" in results[2].failure
    assert any(line.startswith("board: ") for line in said) and any(line.startswith("local: ") for line in said)
    rows = json.loads(json.dumps([result.to_json() for result in results]))
    assert rows[2]["failure"] and rows[2]["models"] == {} and rows[0]["failure"] is None
    assert rows[1]["address"].startswith("ssh://")


def test_remote_devices_run_side_by_side_and_this_machine_last_and_alone(monkeypatch, plain):
    running, together, order = set(), [], []
    both = threading.Barrier(2, timeout=20)

    def slow(device, paths, settings, *, sample, say):
        running.add(device.title)
        if not device.is_local:
            both.wait()
        together.append(set(running))
        time.sleep(0.05)
        running.discard(device.title)
        order.append(device.title)
        raise DeviceError("enough")

    monkeypatch.setattr(fleet, "measure_on", slow)
    measure_devices([Device(), Device("ssh://a"), Device("ssh://b")], {"m": plain}, QUICK)
    assert order[-1] == "local" and {"ssh://a", "ssh://b"} in together and together[-1] == {"local"}


def test_two_entries_of_one_board_take_turns(monkeypatch, plain):
    """Side by side they would measure each other."""
    running, together, order = set(), [], []

    def slow(device, paths, settings, *, sample, say):
        running.add(device.title)
        time.sleep(0.05)
        together.append(set(running))
        running.discard(device.title)
        order.append(device.title)
        raise DeviceError("enough")

    monkeypatch.setattr(fleet, "measure_on", slow)
    one, four = (Device("ssh://pi@board", name=f"{count} threads", threads=count) for count in (1, 4))
    other = Device("ssh://root@Board:22", name="another user")
    results = measure_devices([one, Device("ssh://a"), four, other], {"m": plain}, QUICK)
    assert [result.device.title for result in results] == ["1 threads", "ssh://a", "4 threads", "another user"]
    assert all(len(names - {"ssh://a"}) <= 1 for names in together)
    assert [name for name in order if name != "ssh://a"] == ["1 threads", "4 threads", "another user"]


def test_an_interrupt_ends_what_the_devices_do(monkeypatch, plain):
    tidied = []

    def hang(device, paths, settings, *, sample, say):
        try:
            capture(["sleep", "60"], timeout_s=100.0)
        finally:
            tidied.append(device.title)
        raise DeviceError("killed")

    monkeypatch.setattr(fleet, "measure_on", hang)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with `&` ignores SIGINT
    try:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            measure_devices([Device("ssh://a"), Device("ssh://b"), Device()], {"m": plain}, QUICK)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10 and sorted(tidied) == ["ssh://a", "ssh://b"]


def test_faults_of_models_are_told_from_those_of_devices(plain):
    (result,) = measure_devices([Device(provider="Foo")], {"a": plain}, QUICK)
    assert result.is_input_fault and "provider 'Foo' is not in this onnxruntime" in result.failure
    (result,) = measure_devices([Device("ssh://127.0.0.1:1")], {"a": plain}, QUICK)
    assert not result.is_input_fault


def test_what_is_refused(plain, tmp_path):
    with pytest.raises(ValueError, match="there is no device to measure on"):
        measure_devices([], {"a": plain}, QUICK)
    with pytest.raises(ValueError, match="device local is named more than once"):
        measure_devices([Device(), Device()], {"a": plain}, QUICK)
    with pytest.raises(FileNotFoundError, match="no model file at"):
        measure_devices([Device()], {"a": tmp_path / "none"}, QUICK)
    with pytest.raises(ValueError, match="no model to measure"):
        measure_devices([Device()], {}, QUICK)


def test_a_devices_own_settings_stand_above_the_measurements():
    device = Device("ssh://a", threads=4, affinity=(2, 3), provider="P")
    own = Settings(threads=1, rounds=7, affinity=(0,)).on(device)
    assert (own.threads, own.affinity, own.providers, own.rounds) == (4, (2, 3), ("P",), 7)
    assert Settings(threads=3).on(Device("ssh://a")) == Settings(threads=3)
