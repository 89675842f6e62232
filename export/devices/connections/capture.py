"""Run a program whose output is not trusted: bounded in time and size, made printable before it is shown."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from export.devices.connections.address import DeviceError

OUTPUT_LIMIT = 8 << 20  # bytes; a result takes some kilobytes
KEPT_STDERR = 16 << 10  # bytes of the end of stderr, where the cause is
CHUNK = 1 << 16
SHOWN = 400  # characters of foreign text in a message
# ESC [ ... letter, ESC ] ... BEL or ESC \, the other two-character sequences; then every control character
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]P^_X].*?(?:\x07|\x1b\\|$)|\x1b.", re.DOTALL)


@dataclass(frozen=True)
class Captured:
    """The output of a program.

    Args:
        code: Its exit code; negative for the signal that ended it.
        stdout: Its whole output.
        stderr: The end of its messages, printable.
    """

    code: int
    stdout: bytes
    stderr: str


def printable(text: str, limit: int = SHOWN) -> str:
    """Return foreign text as one line that a terminal shows literally: no escape sequences, no control characters.

    Args:
        text: Anything.
        limit: Longest result, in characters; the middle of a longer text is left out.
    """
    plain = ESCAPES.sub("", text[: 64 * limit] if len(text) > 128 * limit else text)
    shown = "".join(letter if letter.isprintable() else " " for letter in plain.replace("�", "?"))
    words = " ".join(shown.split())
    return words if len(words) <= limit else f"{words[: limit // 2]} ... {words[-limit // 2 :]}"


def capture(
    command: Sequence[str],
    *,
    timeout_s: float,
    stdin: Iterable[bytes] = (),
    environment: dict[str, str] | None = None,
    say: Callable[[str], None] | None = None,
    holds_stdin: bool = False,
) -> Captured:
    """Run a program to its end.

    Args:
        command: The program and its arguments; no shell.
        timeout_s: Time after which it is killed, with the processes it started.
        stdin: Blocks that are fed to it; it may end without reading them.
        environment: Its environment; by default this process's.
        say: Called with each line of its stderr, made printable.
        holds_stdin: Whether its stdin stays open until it ends. If this process dies, however it dies, the system
            closes it: a program that watches it can end then, too.

    Raises:
        DeviceError: If it is not installed, does not end in time, or writes more than ``OUTPUT_LIMIT`` bytes.
        OSError: If a block of ``stdin`` cannot be read here; the program is killed at once.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # so that all of it can be killed
        )
    except OSError as error:
        raise DeviceError(f"cannot run {command[0]}: {error.strerror}; install it, or put it on the PATH") from error
    running = _Running(process, say)
    try:
        running.feed(stdin, closes=not holds_stdin)
        code = running.wait(timeout_s)
    finally:
        running.kill()
    return Captured(code, bytes(running.stdout), printable(running.stderr.decode("utf-8", "replace"), KEPT_STDERR))


def end_all() -> None:
    """Kill every program that is being captured; whoever waits for one gets its exit code."""
    for running in list(_RUNNING):
        running.signal()


class _Running:
    """A started program with a thread at each of its pipes."""

    def __init__(self, process: subprocess.Popen[bytes], say: Callable[[str], None] | None) -> None:
        self.process, self.say = process, say
        self.stdout, self.stderr = bytearray(), bytearray()
        self.excess = ""
        self.fault: Exception | None = None  # why what was to be fed could not be read
        _RUNNING.add(self)
        self.threads = [
            threading.Thread(target=self._read_stdout, daemon=True),
            threading.Thread(target=self._read_stderr, daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def feed(self, blocks: Iterable[bytes], *, closes: bool) -> None:
        """Start feeding stdin; at the end it is closed, or held."""
        thread = threading.Thread(target=self._write, args=(blocks, closes), daemon=True)
        thread.start()
        self.threads.append(thread)

    def wait(self, timeout_s: float) -> int:
        """Return the exit code once the program has ended and its pipes are empty."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise DeviceError(
                f"no end within {timeout_s:g} s: the device hangs or needs more time (timeout_s); last output: "
                f"{printable(self.stderr.decode('utf-8', 'replace')) or 'none'}"
            ) from error
        for thread in self.threads:
            thread.join(2.0)  # a background process may hold the pipes open
        if self.fault is not None:
            raise self.fault
        if self.excess:
            raise DeviceError(f"the device wrote more than {OUTPUT_LIMIT:,} bytes to {self.excess}; it was cut off")
        return code

    def kill(self) -> None:
        """End everything that still runs."""
        _RUNNING.discard(self)
        self.signal()
        self.process.wait()
        for thread in self.threads:
            thread.join(2.0)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()

    def _write(self, blocks: Iterable[bytes], closes: bool) -> None:  # noqa: FBT001
        pipe = self.process.stdin
        with contextlib.suppress(OSError, ValueError):  # it ended without reading: its exit code tells why
            for block in self._read(blocks):
                pipe.write(block)  # type: ignore[union-attr]
            if self.fault is not None:
                return
            if closes:
                pipe.close()  # type: ignore[union-attr]
            else:
                pipe.flush()  # type: ignore[union-attr]

    def _read(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield blocks; if one cannot be read here, end the program, which would wait for the rest."""
        try:
            yield from blocks
        except Exception as error:  # a file on a lost share, or one that is gone; `wait` raises it
            self.fault = error
            self.signal()

    def _read_stdout(self) -> None:
        for block in _blocks(self.process.stdout):
            self.stdout += block
            if len(self.stdout) > OUTPUT_LIMIT:
                return self._refuse("stdout")
        return None

    def _read_stderr(self) -> None:
        total, line = 0, b""
        for block in _blocks(self.process.stderr):
            total += len(block)
            self.stderr += block
            del self.stderr[:-KEPT_STDERR]
            if total > OUTPUT_LIMIT:
                return self._refuse("stderr")
            *lines, line = (line + block).split(b"\n")
            line = line[-CHUNK:]
            for one in lines if self.say else ():
                if words := printable(one.decode("utf-8", "replace")):
                    self.say(words)  # type: ignore[misc]
        return None

    def _refuse(self, name: str) -> None:
        self.excess = name
        self.signal()

    def signal(self) -> None:
        """Kill the program and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


_RUNNING: set[_Running] = set()  # so that an interrupted caller can end what its threads wait for


def _blocks(pipe: IO[bytes] | None) -> Iterable[bytes]:
    while pipe is not None:
        try:
            block = os.read(pipe.fileno(), CHUNK)
        except (OSError, ValueError):  # closed under our hands
            return
        if not block:
            return
        yield block
