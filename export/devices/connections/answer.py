"""Find the runner's answer in what a device wrote, and trust nothing in it."""

from __future__ import annotations

import json
import math
from typing import Any

from export.devices.connections.address import DeviceError
from export.devices.connections.capture import Captured, printable

TEXT_LIMIT = 2000  # characters of one text in an answer
DEEPEST = 8  # levels; the runner writes five
CRASHES = {4: "an illegal instruction", 6: "an abort", 7: "a bus error", 9: "a kill (out of memory?)", 11: "a crash",
           14: "its time limit"}  # fmt: skip


def marked(script: str, token: str) -> str:
    """Return a script of sh that prints the two marks around the output of another, and ends with its exit code.

    Args:
        script: Of POSIX sh; it must not call ``exit``.
        token: Made for this call, in hexadecimal digits.
    """
    return f"echo; echo '<<<qkd {token}'; {{ {script}; }}; code=$?; echo; echo 'qkd {token}>>>'; (exit $code)"


def between_marks(stdout: bytes, token: str) -> bytes | None:
    """Return the output between the two marks of a token; None if it is not there, or is cut off.

    What a login prints, a greeting say, is before it.
    """
    _, found, rest = stdout.partition(f"<<<qkd {token}".encode())
    body, ended, _ = rest.partition(f"qkd {token}>>>".encode())
    return body if found and ended else None


def read_answer(captured: Captured, token: str) -> dict[str, Any]:
    """Return the answer, its texts printable and bounded, its numbers finite.

    Args:
        captured: The output of the command.
        token: Made for this command; the answer is between marks that hold it.

    Raises:
        DeviceError: If there is none, it is not JSON, or the runner reports a failure.
        ValueError: If the runner refused the request (a model it cannot feed, a provider it lacks).
    """
    body = between_marks(captured.stdout, token)
    if body is None:
        raise DeviceError(_no_answer(captured))
    try:
        value = _clean(json.loads(body.decode("utf-8"), parse_constant=lambda _: None), 0)
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"the device's answer is not JSON ({printable(str(error))})") from error
    if not isinstance(value, dict):
        raise DeviceError("the device's answer is not what the runner writes: no group of keys")
    if "refused" in value:
        raise ValueError(str(value["refused"]))
    if "failed" in value:
        raise DeviceError(f"the runner failed on the device: {value['failed']}")
    return value


def _no_answer(captured: Captured) -> str:
    words = printable(captured.stderr) or printable(captured.stdout.decode("utf-8", "replace")) or "it said nothing"
    if captured.code in (126, 127):
        return (
            f"the Python of the device could not be started ({words}): name one that has onnxruntime, as `--python "
            f"env/bin/python` (a relative path starts in the home folder there) or `python:` in a devices file"
        )
    if "SyntaxError" in captured.stderr:
        return f"the Python of the device is too old: it must be 3.8 or newer ({words})"
    number = captured.code - 128 if captured.code > 128 else -captured.code
    if number in CRASHES:
        return f"the runner ended by {CRASHES[number]} (signal {number}); last output: {words}"
    return f"the device gave no answer (exit code {captured.code}): {words}"


def _clean(value: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    if isinstance(value, str):
        return printable(value, TEXT_LIMIT)
    if isinstance(value, dict):
        return {printable(key, TEXT_LIMIT): _clean(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner, depth + 1) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
