"""Exceptions: which exit code, and whether the message was written for people."""

from __future__ import annotations

import errno

import pytest

from qkd.failures import BAD_INPUT, FAILED, ConfigError, UsageError, classify
from qkd.files import refuse_pickle, write_json


def raised(function: object, *args: object) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - whatever it raises is looked at
        function(*args)  # type: ignore[operator]
    return caught.value


def test_a_config_error_is_the_users() -> None:
    failure = classify(ConfigError(["config.a: b", "config.c: d"]))
    assert (failure.message, failure.exit_code, failure.is_expected) == ("config.a: b\nconfig.c: d", BAD_INPUT, True)


def test_faults_are_counted_and_lines_are_not() -> None:
    assert classify(ConfigError(["config.a: b", "config.c: d"])).faults == 2
    assert classify(ValueError("one message\nof two lines")).faults == 1


def test_a_value_error_that_our_code_raises_is_the_users(tmp_path) -> None:  # type: ignore[no-untyped-def]
    failure = classify(raised(refuse_pickle, tmp_path / "w.pt", b"PK\x03\x04"))
    assert failure.exit_code == BAD_INPUT and failure.is_expected and "pickled" in failure.message


def test_a_value_error_from_elsewhere_is_unexpected(tmp_path) -> None:  # type: ignore[no-untyped-def]
    failure = classify(raised(write_json, tmp_path / "x.json", float("nan")))
    assert failure.exit_code == FAILED and not failure.is_expected
    assert failure.message.startswith("ValueError: ")
    assert not classify(raised(int, "x")).is_expected


def test_a_run_that_fails_by_our_own_word_is_expected() -> None:
    from export import ParityError, ParityReport
    from export.parity import Comparison

    side = Comparison(0.5, 1, 1.0, 1.0, None, None, None)
    report = ParityReport(2, side, side, None, None, (), None, 0, 2, False, (), "1", 1)
    error = raised(report.raise_if_worse)
    assert isinstance(error, ParityError)
    failure = classify(error)
    assert failure.exit_code == FAILED and failure.is_expected


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, FAILED), (errno.EIO, FAILED), (errno.EAGAIN, FAILED), (errno.ENOENT, BAD_INPUT),
     (errno.EACCES, BAD_INPUT), (errno.EROFS, BAD_INPUT), (errno.ENOTDIR, BAD_INPUT)],
)  # fmt: skip
def test_the_systems_errors(number: int, code: int) -> None:
    failure = classify(OSError(number, "why", "some/file"))
    assert (failure.message, failure.exit_code, failure.is_expected) == ("some/file: why", code, True)


def test_a_usage_error_is_the_users() -> None:
    assert issubclass(UsageError, ValueError) and issubclass(ConfigError, ValueError)


def test_an_error_without_words_still_has_a_line() -> None:
    assert classify(KeyError()).message == "KeyError: "
