"""The names a config may hold: listed for people, and looked up in a config before it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from qkd.config.bind_faults import Fault, describe, did_you_mean

DATASET_NOTES = {
    "cifar10": "60,000 colour images 32x32, 10 classes (torchvision)",
    "cifar100": "60,000 colour images 32x32, 100 classes (torchvision)",
    "digits": "1,797 handwritten digits 8x8; comes with scikit-learn",
    "fashion-mnist": "70,000 grey images 28x28, 10 classes (torchvision)",
    "folder": "data.path with train/<class>/ and test/<class>/ of image files",
    "mnist": "70,000 handwritten digits 28x28 (torchvision)",
    "npz": "data.path with train.npz and test.npz, each `images` uint8 and `labels`",
    "svhn": "99,289 house numbers 32x32 in colour (torchvision)",
}

POLICY_NOTES = {
    "crop": "random crop after padding",
    "crop_flip": "random crop after padding, then a flip of half of the images",
    "cutmix": "CutMix: after crop and flip half of the images (the share `cutmix`) get a box of another one",
    "file": "a schedule of policies over the epochs, from the YAML file `schedule` names",
    "none": "images as they are",
    "pba": "the PBA operations, none to two an image, stronger in each third of the training, then crop and flip",
    "randaugment": "RandAugment: `operations` operations an image, all at `magnitude` of 0..30, then crop and flip",
    "search": "what this run's population search finds for the role, then crop and flip",
    "teacher": "for the student: the teacher's policy",
    "trivial": "TrivialAugment (wide): one operation an image at any magnitude, then crop and flip",
}

METHOD_NOTES = {  # what is switched on by a key of its own, not by a term
    "student.auxiliary": "a net between teacher and student, of the student's topology (Passalis et al. 2020)",
    "student.peers": "a student ensemble: nets of several widths or bits learn together (Walawalkar et al. 2020)",
    "student.phases: combine": "gradients of distillation clipped against the task's (Lee, Kim, Song 2018)",
    "student.phases: meta": "MetaDistil: a quiz teaches the teacher (Zhou, Xu, McAuley 2022)",
    "student.phases: teacher_terms": "co-study: teacher and student learn from each other (Kim et al. 2019, QKD)",
    "student.rotations": "HSSAKD: joint labels of class and rotation, branches, offline or online (Yang et al. 2021)",
    "teacher.members": "an ensemble teacher, or self-distillation with one net for both (Allen-Zhu, Li 2020)",
    "teacher.untrained": "Apprentice: a teacher that learns with its student (Mishra, Marr 2018)",
}

RUN_POLICIES = ("search", "teacher")  # which a run resolves before an agent is built


@dataclass(frozen=True)
class Listing:
    """What ``qkd ls`` prints: table -> name -> a few words (possibly none)."""

    tables: Mapping[str, Mapping[str, str]]

    def to_json(self) -> dict[str, dict[str, str]]:
        """Return the tables as plain data."""
        return {name: dict(rows) for name, rows in self.tables.items()}

    def to_text(self) -> str:
        """Return the tables as text, each under its name where there are several."""
        blocks = []
        for name, rows in self.tables.items():
            width = max((len(key) for key in rows), default=0)
            lines = [f"{key:<{width}}  {words}".rstrip() for key, words in rows.items()]
            blocks.append("\n".join(lines if len(self.tables) == 1 else [f"{name}:", *(f"  {line}" for line in lines)]))
        return "\n\n".join(blocks)


def table(name: str) -> dict[str, str]:
    """Return a table by its name: each entry with a few words about it.

    Args:
        name: A key of ``TABLES``.
    """
    return TABLES[name]()


def name_faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each name in raw config data that no table knows, and for loss terms that cannot be built.

    Args:
        data: Nested mappings and lists; what is missing or ill-typed is left to the schema.
    """
    yield from _unknown(data, ("data", "name"), "data set", "datasets")
    for role in ("teacher", "student"):
        yield from _unknown(data, (role, "net"), "net", "nets")
        yield from _unknown(data, (role, "agent", "policy"), "agent policy", "policies")
    yield from _unknown(data, ("student", "auxiliary", "net"), "net", "nets")
    peers = ("student", "peers", "nets")
    for index in range(_length(data, peers)):
        yield from _unknown(data, (*peers, index, "net"), "net", "nets")
    for learner in (("student",), ("student", "auxiliary")):
        yield from _term_faults(data, (*learner, "terms"))
        for index in range(_length(data, (*learner, "phases"))):
            for kind in ("terms", "teacher_terms"):
                yield from _term_faults(data, (*learner, "phases", index, kind))
        yield from _phase_faults(data, learner)


def _configs() -> dict[str, str]:
    from qkd.config.binding import shipped_configs

    return {name: _purpose(path.read_text(encoding="utf-8")) for name, path in shipped_configs().items()}


def _purpose(text: str) -> str:
    """Return the sentence after ``Purpose:`` in a config's opening comment, up to its first clause's end."""
    words: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#") or (words and ":" in line[:12]):
            break
        words.append(line.lstrip("# ").removeprefix("Purpose:").strip())
    return " ".join(words)


def _datasets() -> dict[str, str]:
    from qkd.data import DATASETS

    return {name: DATASET_NOTES.get(name, "") for name in sorted(DATASETS)}


def _nets() -> dict[str, str]:
    from qkd.nets import net_names

    return dict.fromkeys(net_names(), "")


def _losses() -> dict[str, str]:
    from qkd.terms import LOSSES

    rows = {name: f"{entry.summary} ({entry.source})" for name, entry in sorted(LOSSES.items())}
    return {**rows, **METHOD_NOTES}


def _quantizers() -> dict[str, str]:
    from qkd.config import QuantConfig

    roles: dict[str, list[str]] = {}
    for role in ("weight", "act"):
        for name in get_args(QuantConfig.model_fields[f"{role}_quantizer"].annotation):
            roles.setdefault(name, []).append("weights" if role == "weight" else "activations")
    return {name: " and ".join(users) for name, users in sorted(roles.items())}


def _devices() -> dict[str, str]:
    import torch

    rows = {"auto": "cuda where there is one, else cpu", "cpu": f"{torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        rows[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return {**rows, "local": "for bench: this machine", **_bench_devices()}


def _bench_devices() -> dict[str, str]:
    from qkd.device_file import default_file, read_devices

    file = default_file()
    return {name: f"for bench: {device.address} ({file})" for name, device in read_devices(file).items()}


def _policies() -> dict[str, str]:
    from qkd.agents import POLICIES

    return {name: POLICY_NOTES.get(name, "") for name in sorted({*POLICIES, *RUN_POLICIES})}


TABLES: dict[str, Callable[[], dict[str, str]]] = {
    "configs": _configs,
    "datasets": _datasets,
    "nets": _nets,
    "losses": _losses,
    "quantizers": _quantizers,
    "devices": _devices,
    "policies": _policies,
}


def _unknown(data: Mapping[str, Any], where: tuple[str | int, ...], kind: str, table_name: str) -> Iterator[Fault]:
    name = _get(data, where)
    if isinstance(name, str) and name not in (known := table(table_name)):
        hint = _net_hint(name, known) if table_name == "nets" else did_you_mean(name, known)
        hint = f"`qkd ls {table_name}` lists them" if hint.startswith("known: ") and len(known) > 20 else hint
        yield where, f"unknown {kind} {describe(name)}; {hint}"


def _net_hint(name: str, known: Mapping[str, str]) -> str:
    from qkd.nets import net_hint

    return net_hint(name, list(known)) or did_you_mean(name, known)


def _term_faults(data: Mapping[str, Any], where: tuple[str | int, ...]) -> Iterator[Fault]:
    from pydantic import ValidationError

    from qkd.config import TermConfig
    from qkd.terms import check_terms

    raw = _get(data, where)
    if not isinstance(raw, list):
        return
    terms, places = [], []
    for place, term in enumerate(raw):
        try:
            terms.append(TermConfig.model_validate(term))
            places.append(place)
        except ValidationError:
            continue  # the schema says what is wrong with this one
    if not terms:
        return
    for line in check_terms(terms, "terms"):
        path, _, what = line.partition(": ")
        keys = [int(key) if key.isdecimal() else key for key in path.replace("[", ".").replace("]", "").split(".")[1:]]
        if keys:
            yield (*where, places[int(keys[0])], *keys[1:]), what
        elif len(terms) == len(raw):  # of the list as a whole
            yield where, what


def _length(data: Mapping[str, Any], where: tuple[str | int, ...]) -> int:
    """Return how long a list is; 0 where there is none."""
    found = _get(data, where)
    return len(found) if isinstance(found, list) else 0


def _phase_faults(data: Mapping[str, Any], learner: tuple[str, ...]) -> Iterator[Fault]:
    """Yield what is wrong with the phases of ``student`` or its auxiliary; without any, with the one that it has."""
    from pydantic import TypeAdapter, ValidationError

    from qkd.config import AuxiliaryConfig, PhaseConfig, StudentConfig, TermConfig
    from qkd.methods.phase_checks import phase_faults

    section = _get(data, learner)
    if not isinstance(section, Mapping):
        return
    schema = StudentConfig if learner == ("student",) else AuxiliaryConfig
    raw, terms = section.get("phases"), section.get("terms")
    try:
        phases = [PhaseConfig.model_validate(phase) for phase in raw or [{"epochs": 1}]]
        own = schema.model_fields["terms"].default
        own = own if terms is None else TypeAdapter(tuple[TermConfig, ...]).validate_python(terms)
    except (ValidationError, TypeError):
        return  # the schema says what is wrong
    for index, key, what in phase_faults(own, phases, has_peers=section.get("peers") is not None):
        yield ((*learner, "phases", index, key) if raw else (*learner, "terms")), what


def _get(data: Any, where: tuple[str | int, ...]) -> Any:
    for key in where:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):  # not there, or no group or list: the schema says so
            return None
    return data
