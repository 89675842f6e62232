"""What ``qkd policy`` does: import a published search log, show a schedule, draw a grid of augmented images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkd.agents import POLICIES, Agent, Schedule, build_agent, read_schedule_file, save_schedule
from qkd.agents.policies.search_log import import_log
from qkd.config import AgentConfig, DataConfig
from qkd.config.bind_faults import did_you_mean
from qkd.data import load_splits
from qkd.failures import UsageError
from qkd.files import sha256_of, write_bytes, write_text
from qkd.report.stacks import schedule_picture
from qkd.seeding import stream

GRID_COLUMNS, GRID_CELL = 10, 64  # images per row, and minimum pixels per side
OF_A_RUN = ("file", "search", "teacher")  # policies whose schedule a run is given or finds
BUILTIN_EPOCHS = 200  # length at which a policy without a file is shown


@dataclass(frozen=True)
class PolicyReport:
    """A schedule, described.

    Args:
        name: Of the file or the policy.
        schedule: Policies over epochs; None where operations are drawn again for every image.
        facts: Further lines: name -> text.
        files: What was written.
    """

    name: str
    schedule: Schedule | None
    facts: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        rows = [
            {"epochs": one.epochs, "ops": [[op.name, op.probability, op.magnitude] for op in one.policy.ops]}
            for one in (self.schedule.segments if self.schedule else ())
        ]
        epochs = self.schedule.epochs if self.schedule else None
        files = [str(path) for path in self.files]
        return {"name": self.name, "epochs": epochs, "segments": rows, **self.facts, "files": files}

    def to_text(self) -> str:
        """Return the schedule as text: one block per segment, the likeliest operations first."""
        lines = [f"{self.name}: {self.schedule.epochs} epochs" if self.schedule else self.name]
        lines += [f"  {name}: {value}" for name, value in self.facts.items()]
        start = 0
        for segment in self.schedule.segments if self.schedule else ():
            end = start + segment.epochs
            ops = sorted(segment.policy.ops, key=lambda op: (-op.probability, op.name))
            words = ", ".join(f"{op.name} {op.probability:g}/{op.magnitude}" for op in ops if op.probability)
            lines.append(f"  epochs {start + 1}-{end}: {words or 'no operation'}")
            start = end
        lines += ["  (operation probability/magnitude 0..9)"] if self.schedule else []
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])


def import_policy(
    log: Path, out: Path, *, epochs: int, op_order: str, trial: str | None = None, role: str | None = None
) -> PolicyReport:
    """Write the schedule of a published search log as a schedule file; arguments as in `search_log.import_log`.

    Raises:
        qkd.agents.policies.search_log.SearchLogError: If the log cannot be read; nothing is written.
        OSError: If ``out`` cannot be written.
    """
    imported = import_log(log, epochs=epochs, op_order=op_order, trial=trial)
    origin = {
        "log": imported.file.name,
        "sha256": sha256_of(imported.file),
        "op_order": op_order,
        "lineage": list(imported.lineage),
    }
    save_schedule(imported.schedule, out, role=role, provenance=origin)
    facts: dict[str, Any] = {"records": imported.records, "lineage": " > ".join(imported.lineage)}
    facts |= {"notes": "; ".join(imported.notes)} if imported.notes else {}
    return PolicyReport(imported.file.name, imported.schedule, facts, (out,))


def show_policy(name: str, *, epochs: int | None = None, out: Path | None = None) -> PolicyReport:
    """Return what a schedule file or a policy does, and draw it if requested.

    Args:
        name: A schedule file, or a name of `qkd ls policies`.
        epochs: Length to stretch it to; default: its own.
        out: ``.svg`` or ``.png`` file.

    Raises:
        UsageError: If the name is neither, or there is nothing to draw, or ``out`` has another ending.
        ScheduleError: If the file is wrong.
        OSError: If ``out`` cannot be written.
    """
    agent, own_epochs, facts = _agent(name, epochs, mean=(0.5,))
    schedule = agent.schedule(own_epochs)
    if out is None:
        return PolicyReport(name, schedule, facts)
    if schedule is None:
        raise UsageError(f"{name} draws new operations for every image: there is no schedule to draw")
    picture = schedule_picture(f"{name}, {schedule.epochs} epochs", schedule)
    if out.suffix == ".svg":
        write_text(out, picture.to_svg() + "\n")
    elif out.suffix == ".png":
        write_bytes(out, picture.to_png())
    else:
        raise UsageError(f"--out must end in .svg or .png, got {out}")
    return PolicyReport(name, schedule, facts, (out,))


@dataclass(frozen=True)
class SampleReport:
    """A grid of images that was written."""

    file: Path
    epochs: tuple[int, ...]
    images: int

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        return {"file": str(self.file), "epochs": list(self.epochs), "images": self.images}

    def to_text(self) -> str:
        """Return one line."""
        rows = ", ".join(str(epoch) for epoch in self.epochs)
        return f"wrote {self.file}: {self.images} images without augmentation, and below at epochs {rows} (from 0)"


def sample_policy(
    name: str, data: DataConfig, *, epochs: Sequence[int], out: Path, seed: int = 0, length: int | None = None
) -> SampleReport:
    """Write a grid of augmented images: the first row without augmentation, then one row per epoch.

    Args:
        name: A schedule file, or a name of `qkd ls policies`.
        data: Whose first training images to show.
        epochs: From 0.
        out: ``.png`` file.
        seed: Of the draws.
        length: Of the training; default: that of the schedule file, or else one that includes the epochs.

    Raises:
        UsageError: If the name is unknown, an epoch is not within the training, or ``out`` is not a ``.png`` file.
        qkd.data.DataError: If the data set cannot be loaded.
        OSError: If ``out`` cannot be written.
    """
    if out.suffix != ".png":
        raise UsageError(f"--out must end in .png, got {out}")
    if not epochs or min(epochs) < 0:
        raise UsageError(f"--epochs must name epochs from 0, got {list(epochs)}")
    splits = load_splits(data, seed=seed)
    agent, total, _ = _agent(name, length, mean=splits.mean, padding=min(splits.image_shape[1:]) // 8)
    if max(epochs) >= total:
        raise UsageError(f"--epochs: {max(epochs)} is not within {total} epochs, 0..{total - 1}; see --length")
    samples = torch.arange(min(GRID_COLUMNS, len(splits.train)))
    images, labels = splits.train.batch(samples, "cpu")
    rows = [images]
    for epoch in epochs:
        generator = stream(seed, "sample", epoch)
        rows.append(agent.with_labels(images, labels, generator=generator, epoch=epoch, samples=samples)[0])
    write_bytes(out, _grid(rows))
    return SampleReport(out, tuple(epochs), len(images))


def _agent(
    name: str, epochs: int | None, *, mean: Sequence[float], padding: int = 4
) -> tuple[Agent, int, dict[str, Any]]:
    """Return the agent of a name, the length of its schedule, and facts about it."""
    path = Path(name)
    if name in OF_A_RUN and not path.exists():
        raise UsageError(
            f"{name}: its schedule is what a run is given or finds; name that file, such as "
            f"runs/NAME/search/student.schedule.yaml"
        )
    if name in POLICIES:
        length = epochs or BUILTIN_EPOCHS
        agent = build_agent(AgentConfig(policy=name, crop_padding=padding), epochs=length, mean=mean)
        return agent, length, {"agent": agent.describe()}
    if not path.suffix and not path.exists():
        known = sorted({*POLICIES} - {*OF_A_RUN})
        raise UsageError(f"{name}: neither a schedule file nor a policy; {did_you_mean(name, known)}")
    content = read_schedule_file(path)
    length = epochs or content.schedule.epochs
    agent = build_agent(AgentConfig(policy="file", schedule=path, crop_padding=padding), epochs=length, mean=mean)
    facts = {"role": content.role} if content.role else {}
    return agent, length, {**facts, **{str(key): value for key, value in content.provenance.items()}}


def _grid(rows: Sequence[Tensor]) -> bytes:
    """Return a PNG file of rows of images, each enlarged by a whole factor to at least ``GRID_CELL`` pixels."""
    from PIL import Image

    height, width = rows[0].shape[-2:]
    factor = max(1, -(-GRID_CELL // max(height, width)))
    cells = torch.stack(list(rows)).repeat_interleave(factor, 3).repeat_interleave(factor, 4)
    framed = torch.nn.functional.pad(cells, (2, 2, 2, 2), value=255)
    channels = framed.shape[2]
    page = framed.permute(0, 3, 1, 4, 2).reshape(framed.shape[0] * framed.shape[3], -1, channels)
    array = page.contiguous().numpy() if channels == 3 else page[:, :, 0].contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()
