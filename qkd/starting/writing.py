"""The few lines of a first config, with comments, for the contents of a folder."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkd.config.binding import bind, name_of
from qkd.config.filling import TUNING_LR
from qkd.files import write_text
from qkd.files.yaml_text import parse_yaml
from qkd.foreign.shown import shown_line
from qkd.foreign.user_code import file_of, is_place, place_fault
from qkd.image_size import height_width
from qkd.nets import WeightsError, build_net, load_weights
from qkd.nets.imagenet import IMAGENET, weights_file
from qkd.nets.own.copies import resolved_nets
from qkd.nets.own.spelling import parse_net
from qkd.starting.looking import Look

SMALL = 64  # pixels per side up to which a net for small images is proposed
STEPS_AN_EPOCH = 10  # minimum: with fewer, a net learns little in thirty epochs
LARGEST_BATCH, SMALLEST_BATCH = 128, 8
TUNING_EPOCHS = 10
_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*(:[A-Za-z_]\w*)?")  # text that may need no quotes
_CODE = re.compile(r"w([2-8])a([2-8])")


@dataclass(frozen=True)
class FirstConfig:
    """A config file that was written.

    Args:
        file: Its path.
        text: Its contents.
        look: What the folder contains; None without a folder.
        note: What was found out about the given weights; empty without weights.
    """

    file: Path
    text: str
    look: Look | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        seen = None if self.look is None else self.look.to_json()
        return {"file": str(self.file), "config": self.text, "data": seen, "note": self.note}

    def to_text(self) -> str:
        """Return what was found and written, and what to do next."""
        seen = [] if self.look is None else [self.look.to_text()]
        note = [f"weights: {self.note}"] if self.note else []
        file = _argument(self.file)
        next_steps = f"next: qkd run {file} --dry-run   (two batches of everything), then: qkd run {file}"
        return "\n".join([*seen, *note, f"wrote {self.file.as_posix()}", next_steps])


def first_config(
    look: Look | None, folder: Path | None, file: Path, *, net: str | None = None, weights: Path | None = None,
    bits: str = "w4a4", name: str | None = None,
) -> FirstConfig:  # fmt: skip
    """Write a config for a folder of images.

    Args:
        look: What the folder contains. None without a folder: the digits that come with the toolkit are used.
        folder: Its path, as the config should give it.
        file: Where to write.
        net: As on the command line: the path of a net's file is relative to the current folder. If omitted, one that
            fits the size of the images.
        weights: The teacher's weights: a file, or ``imagenet``.
        bits: Bits of weights and activations, such as ``w4a4``.
        name: Of the run; defaults to that of the file.

    Returns:
        What was written, and what to tell the user about it.

    Raises:
        ValueError: If bits, net or weights cannot be used.
        OSError: If a file cannot be read or written.
    """
    match = _CODE.fullmatch(bits)
    if match is None:
        raise ValueError(f"--bits must be like w4a4 or w2a2, with 2 to 8 bits each, got {bits!r}")
    chosen = net or _net_for(look)
    _require_net(chosen)
    start, note = _start(chosen, look, weights)
    head = _head(look, folder)
    text = _text(head, name or name_of(file), _data(look, folder, start), _teacher(_from_config(chosen, file), start),
                 (int(match[1]), int(match[2])))  # fmt: skip
    bind(resolved_nets(parse_yaml(text), file.resolve().parent))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    return FirstConfig(file, text, look, note)


def _text(head: str, name: str, data: str, teacher: str, bits: tuple[int, int]) -> str:
    return f"""{head}
# `qkd show FILE` prints all keys with their values, `qkd show --explain KEY` what a key means.
name: {_scalar(name)}                     # results go to runs/{name}
data: {data}
teacher: {teacher}
student:                         # same net as the teacher, starts from its weights (or: net: ...)
  quant: {{weight_bits: {bits[0]}, act_bits: {bits[1]}}}      # 2 to 8; the first and last layer use 8
  recipe: default                # training options for these bits (qkd show --explain student.recipe), 30 epochs
"""


def _head(look: Look | None, folder: Path | None) -> str:
    if look is None:
        return "# Written by `qkd init`: uses handwritten digits in place of your images (qkd init FOLDER)."
    command = shown_line(f"qkd init {_argument(folder or Path())}")  # a newline in a name would end the comment
    return f"# Written by `{command}`: {look.words};\n# {look.held_out}."


def _argument(path: Path) -> str:
    """Return a path as a shell and `qkd` read it: not as an option, nor as a home folder."""
    text = path.as_posix()
    return shlex.quote(f"./{text}" if text.startswith(("-", "~")) else text)


def _data(look: Look | None, folder: Path | None, start: dict[str, Any]) -> str:
    if look is None:
        return "{name: digits}"
    batch = max(SMALLEST_BATCH, min(LARGEST_BATCH, 1 << max(0, (look.train // STEPS_AN_EPOCH).bit_length() - 1)))
    values: dict[str, Any] = {"name": look.kind, "path": str(folder)}
    values |= {} if look.image_size is None else {"image_size": look.image_size}
    values |= {} if batch == LARGEST_BATCH else {"batch_size": batch}
    values |= {"preprocess": "torchvision"} if start.get("weights") == IMAGENET else {}
    return _flow(values)


def _teacher(net: str, start: dict[str, Any]) -> str:
    return _flow({"net": net, **start})


def _flow(values: dict[str, Any]) -> str:
    """Return a group of keys on one line of YAML."""
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in values.items()) + "}"


def _scalar(value: Any) -> str:
    if isinstance(value, dict):
        return _flow(value)
    if not isinstance(value, str):
        return json.dumps(value)  # which is YAML, too
    if _PLAIN.fullmatch(value) and parse_yaml(value) == value:  # 2024, 1e5, null and true are not text in YAML
        return value
    quoted = json.dumps(value, ensure_ascii=False)  # YAML has no pairs of escapes for one character
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)


def _net_for(look: Look | None) -> str:
    size = 8 if look is None else look.image_size or look.largest
    return "resnet20" if max(height_width(size)) <= SMALL else "torchvision/resnet18"


def _require_net(net: str) -> None:
    spelling = parse_net(net)
    if spelling.is_own and (fault := place_fault(spelling.name)):
        raise ValueError(f"--net {net}: {fault}")


def _from_config(net: str, file: Path) -> str:
    """Return a net as the config names it: the path of its file relative to the config's folder."""
    source = file_of(net) if is_place(net) else None
    if source is None:
        return net
    relative = os.path.relpath(source.resolve(), file.resolve().parent)
    return f"{Path(relative).as_posix()}:{net.rpartition(':')[2]}"


def _start(net: str, look: Look | None, weights: Path | None) -> tuple[dict[str, Any], str]:
    """Return the teacher's keys other than its net, and what was found out about its weights."""
    if weights is None:
        _built(net, look)
        return {"train": {"epochs": 30, "lr": 0.1}}, ""
    # ImageNet's weights come with `preprocess: torchvision`, which turns gray images to color
    file, made = weights_file(weights, net), _built(net, look, channels=3 if str(weights) == IMAGENET else None)
    try:
        said = load_weights(made, file)
    except WeightsError as error:
        try:
            said = load_weights(made, file, head="new")
        except WeightsError:
            raise error from None  # the weights do not fit with a new head either
        train = {"epochs": TUNING_EPOCHS, "lr": TUNING_LR}
        return {"weights": str(weights), "head": "new", "train": train}, said
    return {"weights": str(weights)}, f"they fit{', ' + said if said else ''}; the teacher is not trained again"


def _built(net: str, look: Look | None, *, channels: int | None = None) -> Any:
    size = 8 if look is None else look.image_size or look.largest
    classes, found = (10, 1) if look is None else (len(look.classes), look.channels)
    return build_net(net, classes=classes, channels=channels or found, image_size=size)
