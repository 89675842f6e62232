"""Keys without effect beside others: refused in new configs, read in those of older runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel

from qkd.image_size import height_width

if TYPE_CHECKING:
    from qkd.config.bind_faults import Fault
    from qkd.config.data import DataConfig
    from qkd.config.experiment import RunConfig, StudentConfig

MOST_BITS = 4  # of weights that the rules act on, as in quantizers.recipes.codes; a test keeps them equal
RULES = ("dampening", "oscillation_thresholds", "transition_rate")


def idle_faults(config: RunConfig) -> Iterator[Fault]:
    """Yield each key of a new config that has no effect beside the others, or a harmful one.

    They were accepted before, so that a run's own config may have them, and is still read.

    Args:
        config: Valid otherwise.

    Yields:
        Where the key is, and why it has no effect, or which harm it does.
    """
    teacher, student = config.teacher, config.student
    if teacher.members == 1 and (teacher.ensemble != "probability" or teacher.ensemble_temperature != 1):
        yield ("teacher",), "`ensemble` and `ensemble_temperature` are for `members` above 1, got 1"
    elif teacher.ensemble != "probability" and teacher.ensemble_temperature != 1:
        yield ("teacher", "ensemble_temperature"), f"is for `ensemble: probability`, got `{teacher.ensemble}`"
    yield from _idle_temperatures(student)
    yield from _mixed_by_the_teachers_policy(config)
    branches = None if student.rotations is None else student.rotations.teacher_branches
    if branches is not None and branches.joint and teacher.train is not None and teacher.train.keep == "best":
        yield (
            ("teacher", "train"),
            "`keep: best` keeps the teacher of one epoch and the branches of the last, which read other features "
            "(student.rotations.teacher_branches.joint); use keep: last",
        )
    if teacher.run is None:  # otherwise, images have the form that its teacher learned from
        yield from _idle_sizes(config.data)
    yield from _idle_rules(student)
    if student.data_free is not None:
        own = student.data_free
        for key in own.idle:
            yield ("student", "data_free"), f"method `{own.method}` does not read {key!r}; leave it out"


def _mixed_by_the_teachers_policy(config: RunConfig) -> Iterator[Fault]:
    """Yield what CutMix cannot be combined with, where the student has it by its policy `teacher`."""
    student, place = config.student, ("student", "agent")
    if student.agent.policy != "teacher" or not config.student_agent.cutmix_probability:
        return
    if student.view != "same":
        yield (
            place,
            f"`policy: teacher` is cutmix, and view `{student.view}` would show the teacher other images than the "
            f"student's mixtures; use view: same, or `cutmix: 0`",
        )
    if student.adaptation is not None:
        yield place, "`policy: teacher` is cutmix, which mixes labels, but images of the unseen domain have no labels"


def _idle_temperatures(student: StudentConfig) -> Iterator[Fault]:
    turned, peers = student.rotations, student.peers
    if turned is not None and turned.branch_weight == turned.logit_weight == 0 and _is_set(turned, "temperature"):
        yield (
            ("student", "rotations", "temperature"),
            "is of soft targets, but `branch_weight` and `logit_weight` are 0; remove it",
        )
    if peers is not None and peers.ensemble_weight == 0 and _is_set(peers, "temperature"):
        yield ("student", "peers", "temperature"), "is of soft targets, but `ensemble_weight` is 0; remove it"


def _is_set(section: BaseModel, key: str) -> bool:
    return bool(getattr(section, key) != type(section).model_fields[key].default)


def _idle_sizes(data: DataConfig) -> Iterator[Fault]:
    given = {"resize_size": data.resize_size, "interpolation": data.interpolation}
    for key, default in (("resize_size", None), ("interpolation", "bilinear")):
        if data.preprocess is not None and given[key] != default:
            yield (
                ("data", key),
                f"`preprocess` also sets it, as the weights need it, so that {given[key]} has no effect; leave it out, "
                "or give mean, std and sizes in place of `preprocess`",
            )
    size = None if data.image_size is None else min(height_width(data.image_size))
    if data.preprocess is None and data.resize_size is not None and size is not None and data.resize_size < size:
        yield (
            ("data", "resize_size"),
            f"{data.resize_size} is below `image_size`, so that the image would not cover it; give {size} or more, or "
            "a smaller `image_size`",
        )


def _idle_rules(student: StudentConfig) -> Iterator[Fault]:
    rules, where = student.low_bit, ("student", "low_bit")
    idle = [key for key in RULES if getattr(rules, key)]
    learning = [] if student.widths else [one for one in student.phases if one.trains == "student"]
    if idle and _fewest_bits(student) > MOST_BITS:
        yield (
            where,
            f"`{idle[0]}` acts on weights of at most {MOST_BITS} bits, but the student has none; leave it out",
        )
    elif rules.transition_rate is not None and learning and all(one.freeze_batch_norm for one in learning):
        yield (
            where,
            "`transition_rate` does not apply while batch norm is frozen, and all phases freeze it "
            "(freeze_batch_norm); leave it out (null beside a recipe that sets it), or add a phase without",
        )
    elif rules.oscillation_thresholds is not None and student.quant.weight_quantizer == "stats":
        yield (
            where,
            "`oscillation_thresholds` needs `quant.weight_quantizer: lsq`, got stats: its step size follows the "
            "weights, so that each freeze would move it, and with it all frozen weights",
        )


def _fewest_bits(student: StudentConfig) -> int:
    """Return the fewest bits of a weight, also on the way to the student's own widths."""
    quant = student.quant
    own = (quant.weight_bits, quant.first_bits, quant.last_bits)
    others = (one.get("weight_bits") for one in quant.overrides.values())
    widths = (one.weight_bits for one in student.widths)
    return min(bits for bits in (*own, *others, *widths) if bits is not None)
