"""The run folder: one experiment's files, its resolved config and environment written first, locked while in use."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qkd.config import RunConfig
from qkd.config.binding import plain_text
from qkd.files import (
    DamagedFileError,
    inside,
    make_folder,
    may_write,
    read_json,
    refuse_links_out,
    remove_unfinished,
    sha256_of,
    write_bytes,
    write_json,
    write_text,
)
from qkd.files.yaml_text import read_yaml
from qkd.moved import in_new_spelling
from qkd.nets.own.copies import change_nets, keep_net, module_hash, portable_net, resolved_nets
from qkd.run.environment import environment
from qkd.run.identity import BEHIND, changes, differences, identity, stage_settings

_SHA256 = re.compile("[0-9a-f]{64}")
_LOCK = ".lock"
NEW = {"manifests/bench.json": "new measurements"}  # input of a stage -> the reason given when it has changed
_MANIFESTS = "manifests"
_held_locks: dict[Path, int] = {}  # run folder -> open lock file of this process


class RunFolder:
    """The folder of one experiment.

    ``config.yaml`` and ``environment.json`` exist from the start. Each stage has its own folder, and once it is
    complete, a manifest with the SHA-256 of its files.

    Args:
        config: The experiment.
        path: The existing folder; use :meth:`open` to create and check it.
    """

    def __init__(self, config: RunConfig, path: Path) -> None:
        self.config = config
        self.path = path

    @classmethod
    def open(cls, config: RunConfig, runs_dir: Path = Path("runs")) -> RunFolder:
        """Open and lock the folder ``runs_dir / config.name``, creating it if it is missing.

        Args:
            config: The experiment. An existing folder must hold the same one, except for settings that no training
                depends on (:mod:`qkd.run.identity`): these are updated, and stages that use them become incomplete.
            runs_dir: Where run folders are kept; created if missing.

        Returns:
            The folder, locked for this process until :meth:`close` or the end of the process (however it ends).

        Raises:
            ValueError: If the folder holds a different config (the message lists the differing keys), other files, or a
                symbolic link that leads out of it.
            BlockingIOError: If another process is using the folder.
            OSError: If the folder cannot be created or written.
        """
        return cls(config, make_folder(Path(runs_dir) / config.name).resolve())._opened()

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Open and lock a run folder with the config that it holds.

        Raises:
            ValueError: If its config is damaged or from another version, or a link leads out of the folder.
            BlockingIOError: If another process is using the folder.
            OSError: If the folder cannot be read or written.
        """
        folder = Path(path).resolve()
        values = resolved_nets(_read_config(folder / "config.yaml"), folder)
        return cls(RunConfig.model_validate(values), folder)._opened()

    def _opened(self) -> RunFolder:
        path = self.path
        _refuse_foreign(path)
        refuse_links_out(path)
        if may_write():  # a process that only reads belongs to the training that has the lock
            _lock(path)
        try:
            remove_unfinished([path, *(folder for folder in path.rglob("*") if folder.is_dir())])
            self.config = kept_nets(self.config, path)
            self._write_or_compare_config()
            if not (path / "environment.json").exists():
                write_json(path / "environment.json", environment(self.config.seed))
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Release the lock; safe to call twice."""
        handle = _held_locks.pop(self.path, None)
        if handle is not None:
            os.close(handle)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def folder(self, name: str) -> Path:
        """Return the folder of a stage (``"teacher"``, ``"student/float"``), created if missing."""
        return make_folder(inside(self.path, name))

    def complete(self, stage: str, files: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
        """Write a stage's manifest: from now on :meth:`is_complete` is true as long as its files do not change.

        Args:
            stage: Name of the stage.
            files: What it wrote, inside the run folder.
            inputs: Files of the run folder that it was made from; if they change, the stage is incomplete, too.

        Raises:
            FileNotFoundError: If one of the files is missing.
        """
        if may_write():
            manifest = {"files": self._hashes(files), "inputs": self._hashes(inputs), **self._mark(stage)}
            self._write_manifest(stage, manifest)

    def extend(self, stage: str, files: Iterable[Path]) -> None:
        """Add files to the manifest of a stage that was complete before they were written, or update their hashes.

        Args:
            stage: Name of the stage.
            files: Inside the run folder.
        """
        if may_write():
            manifest = _read_manifest(self.path, stage)
            manifest["files"] = {**manifest["files"], **self._hashes(files)}
            self._write_manifest(stage, manifest)

    def unchanged_files(self, stage: str, source: Path) -> set[Path]:
        """Return the files that a stage made from the current version of a source and that have not changed since.

        Args:
            stage: Name of the stage, complete or not: its other inputs or settings may have changed.
            source: Inside the run folder, and among the stage's inputs.

        Returns:
            Their paths; empty if the stage has not run or had a different source.
        """
        try:
            manifest = _read_manifest(self.path, stage)
            name, sha256 = next(iter(self._hashes([source]).items()))
        except (DamagedFileError, OSError):
            return set()
        if manifest["inputs"].get(name) != sha256:
            return set()
        return {self.path / path for path, then in manifest["files"].items() if not _change(self.path, path, then)}

    def manifest_file(self, stage: str) -> Path:
        """Return the path of a stage's manifest, which exists once the stage is complete."""
        return manifest_of(self.path, stage)

    def adopt(self, stage: str, source: Path) -> None:
        """Copy a complete stage of another run with its inputs, so that it is complete here too.

        The caller must know that the other run's config means the same stage.

        Args:
            stage: Name of the stage.
            source: The other run's folder.

        Raises:
            ValueError: If the stage is not complete there.
            OSError: If a file cannot be read or written.
        """
        if not may_write():
            return
        other = RunFolder(self.config, Path(source).resolve())
        if why := other.why_incomplete(stage):
            raise ValueError(f"{source}: its stage {stage} is not complete ({why}); run it there first")
        manifest = _read_manifest(other.path, stage)
        for name in {**manifest["files"], **manifest["inputs"]}:
            target = inside(self.path, name)
            make_folder(target.parent)
            write_bytes(target, inside(other.path, name).read_bytes())
        self._write_manifest(stage, {**manifest, **self._mark(stage)})

    def is_complete(self, stage: str) -> bool:
        """Return whether a stage's manifest exists and every file in it still has the recorded hash."""
        return self.why_incomplete(stage) == ""

    def why_incomplete(self, stage: str) -> str:
        """Return why a stage is not complete: empty if it is, ``"not run"``, or the file that is missing or altered."""
        try:
            manifest = _read_manifest(self.path, stage)
        except FileNotFoundError:
            return "not run"
        except (DamagedFileError, OSError):
            return f"the manifest {_MANIFESTS}/{stage}.json is damaged"
        if why := self._why_other(stage, manifest):
            return why
        return _altered(self.path, manifest)

    def environment_changes(self) -> tuple[str, ...]:
        """Return how this process differs from the one that created the folder (package versions, Python, CPU)."""
        try:
            first = read_json(self.path / "environment.json")
        except (FileNotFoundError, DamagedFileError):
            return ()
        if not isinstance(first, dict) or not isinstance(first.get("packages"), dict):
            return ("environment.json is damaged, so the environment that the run was started in is unknown",)
        now = environment(self.config.seed)
        then = {"python": first.get("python"), "cpu": first.get("cpu"), **first["packages"]}
        here = {"python": now["python"], "cpu": now["cpu"], **now["packages"]}
        return tuple(f"{key}: {then.get(key)} then, {here[key]} now" for key in here if then.get(key) != here[key])

    def _mark(self, stage: str) -> dict[str, Any]:
        """Return what ties a manifest to this run and stage: the settings it depends on, as in its config."""
        try:
            values = _read_config(self.path / "config.yaml")
        except (OSError, ValueError):
            values = {}
        return {"stage": stage, "settings": stage_settings(stage, values)}

    def _why_other(self, stage: str, manifest: Mapping[str, Any]) -> str:
        """Return why a manifest does not belong to this run's stage; keys that only one side has are ignored."""
        mark = self._mark(stage)
        then = in_new_spelling(manifest.get("settings", {}), is_stored=True)
        changed = changes(then, mark["settings"])  # manifests of older versions have none
        behind = [key for key in changed if key.partition(".")[0] in BEHIND]
        if manifest.get("stage", stage) != stage or len(behind) < len(changed):
            return f"the manifest {_MANIFESTS}/{stage}.json belongs to another run or another stage"
        return "; ".join(f"{key} was {changed[key][0]}, is {changed[key][1]}" for key in behind)

    def _write_manifest(self, stage: str, manifest: Mapping[str, Any]) -> None:
        write_json(self.folder(_MANIFESTS) / f"{stage}.json", manifest)

    def _hashes(self, files: Iterable[Path]) -> dict[str, str]:
        hashes = {}
        for file in files:
            path = file if file.is_absolute() else self.path / file
            hashes[path.resolve().relative_to(self.path).as_posix()] = sha256_of(path)
        return hashes

    def _write_or_compare_config(self) -> None:
        file = self.path / "config.yaml"
        if not file.exists():
            write_text(file, plain_text(_plain(self.config)))
            return
        then, now = _read_config(file), _plain(self.config)
        changed = differences(identity(then), identity(now))
        if changed:
            raise ValueError(_another_config(self.path, changed))
        if then != now:
            write_text(file, plain_text(now))


def manifest_of(folder: Path, stage: str) -> Path:
    """Return the path of the manifest of a stage in a run folder, which exists once the stage is complete."""
    return folder / _MANIFESTS / f"{stage}.json"


def why_outdated(folder: Path, stage: str) -> str:
    """Return which file that a stage wrote or was made from is now missing or altered; empty if none is.

    Args:
        folder: The run folder, which is only read.
        stage: Name of the stage; one that has not run is not outdated.
    """
    try:
        return _altered(folder.resolve(), _read_manifest(folder.resolve(), stage))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):  # damaged, or behind a link
        return f"the manifest {_MANIFESTS}/{stage}.json is damaged"


def _altered(folder: Path, manifest: Mapping[str, Any]) -> str:
    files = {**manifest["files"], **manifest["inputs"]}
    return next((why for name, then in files.items() if (why := _change(folder, name, then))), "")


def _change(folder: Path, name: str, sha256: str) -> str:
    """Return how a file of a run has changed since it had this hash; empty if it has not."""
    try:
        path = inside(folder, name)
    except ValueError as error:
        return str(error)
    if not path.is_file():
        return f"{name} is missing"
    return "" if sha256_of(path) == sha256 else NEW.get(name, f"{name} has changed")


def _another_config(path: Path, changed: Mapping[str, tuple[str, str]]) -> str:
    lines = "\n".join(f"  {key}: {before} there, {after} here" for key, (before, after) in changed.items())
    is_students = all(key.partition(".")[0] == "student" for key in changed)
    way = f"; add `teacher.run={path}` to take its teacher instead of training it again" if is_students else ""
    return (
        f"{path} holds a run with another config:\n{lines}\n"
        f"give this run another name (name=...){way}; or use another --runs-dir, or delete the folder"
    )


def kept_nets(config: RunConfig, path: Path) -> RunConfig:
    """Return a config whose net files are copies in a run folder; make the copies and record their hashes there.

    Raises:
        ValueError: If a file is not Python, or the module of a net has changed since the run was started.
        OSError: If a file cannot be read or written.
    """
    values = config.model_dump(mode="json")
    hashes: dict[str, str] = {}

    def kept(net: str) -> str:
        if (found := module_hash(net)) is not None:
            hashes[net] = found
        return keep_net(net, path)

    changed = change_nets(values, kept)
    _hold_modules(path, hashes)
    return config if changed == values else RunConfig.model_validate(changed)


def _hold_modules(path: Path, hashes: Mapping[str, str]) -> None:
    """Record the hashes of the modules of nets, or compare them with the record; modules are not copied."""
    if not hashes:
        return
    file = make_folder(path / "nets") / "modules.json"
    then = read_json(file) if file.exists() else {}
    other = [net for net, sha256 in hashes.items() if then.get(net, sha256) != sha256]
    if other:
        raise ValueError(
            f"{path}: the module of {other[0]} has changed since the run was started; restore it, or give this run "
            f"another name (name=...)"
        )
    if then != hashes:
        write_json(file, {**then, **hashes})


def _plain(config: RunConfig) -> dict[str, Any]:
    return change_nets(config.model_dump(mode="json"), portable_net)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(file)
    except ValueError as error:  # not UTF-8, not YAML, or beyond the limits of the reader
        raise DamagedFileError(f"{file}: not YAML ({error}); delete the run folder, or use another name=") from error
    raw = in_new_spelling(raw, is_stored=True)
    try:
        return _plain(RunConfig.model_validate(raw))  # fills in the defaults of keys that are newer than the file
    except ValidationError:
        return raw if isinstance(raw, dict) else {}


def _refuse_foreign(path: Path) -> None:
    """Raise unless the folder is new, a run's, or one whose very first write was interrupted."""
    if (path / "config.yaml").exists():
        return
    others = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if others:
        raise ValueError(
            f"{path} is not a run folder: it has no config.yaml, but holds {', '.join(others[:3])}; "
            f"give the run another name (name=...), use another --runs-dir, or move the folder away"
        )


def _lock(path: Path) -> None:
    """Lock the folder for this process.

    A POSIX record lock: the system releases it when the process ends, however it ends, and forked workers that
    outlive it for a moment do not hold it. (Such a lock is lost when *any* descriptor of the file is closed, so each
    process opens it once and keeps it.) The library filelock uses `flock`, which forked workers inherit and keep, and
    its lock files do not name the owner.
    """
    if path in _held_locks:
        return
    file = path / _LOCK
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise ValueError(f"{file} is a link or a pipe, and would be written to; delete it") from error
        raise OSError(error.errno, f"cannot write {file}: {error.strerror}; choose another --runs-dir") from error
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
        os.close(handle)
        raise ValueError(
            f"{file} does not belong to this folder alone (it is a pipe, or a second name of another file); delete it"
        )
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(handle, 64).decode("utf-8", "replace").strip() or "unknown"
        os.close(handle)
        raise BlockingIOError(
            error.errno,
            f"{path} is in use by another process (id {owner}); wait for it to end, or give this run another name=",
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    _held_locks[path] = handle


def _read_manifest(folder: Path, stage: str) -> dict[str, Any]:
    """Return a manifest: the files that a stage wrote (at least one) and its sources, each with its hash.

    Raises:
        FileNotFoundError: If the stage has no manifest.
        DamagedFileError: If the file is not a manifest.
    """
    path = inside(folder, f"{_MANIFESTS}/{stage}.json")
    manifest = read_json(path)
    parts = [manifest.get(key) for key in ("files", "inputs")] if isinstance(manifest, dict) else [None]
    is_whole = all(isinstance(part, dict) and all(_is_hash(value) for value in part.values()) for part in parts)
    if not is_whole or not parts[0]:
        raise DamagedFileError(
            f"{path} is not a manifest: it needs `files` (at least one) and `inputs`, with their hashes"
        )
    return dict(manifest)


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
