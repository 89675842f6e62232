"""Keys that a federated run does not read, or cannot honor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.config.experiment import RunConfig

# keys that clients read
FEDERATED_STUDENT = ("net", "net_options", "init", "weights", "head", "quant", "calibration_batches")


def federated_faults(config: RunConfig) -> list[str]:
    """Return the faults of a federated run's config: keys it does not read, or cannot honor.

    Args:
        config: Its keys are each valid by themselves.

    Returns:
        A sentence with the keys for each.
    """
    federated, student, teacher = config.federated, config.student, config.teacher
    if federated is None:
        return []
    fields = type(student).model_fields
    unread = [
        key
        for key in fields
        if key not in FEDERATED_STUDENT and getattr(student, key) != fields[key].get_default(call_default_factory=True)
    ]
    wrong = {
        "teacher: a federated run has none: leave it out, and name the net in student.net": (
            not teacher.untrained or config.teacher_net != config.student_net
        ),
        f"student: a federated run does not read {', '.join(unread)}; `federated` configures the clients": bool(unread),
        f"student.init: a federated student starts from `weights` or at random, got `{student.init}`": (
            student.init not in ("auto", "random")
        ),
        "federated.upload: `codes` needs weight_quantizer lsq: codes do not recover the shadow weights of "
        f"{student.quant.weight_quantizer}": (federated.upload == "codes" and student.quant.weight_quantizer != "lsq"),
        "data.batch_size: must be at least 2 with strategy fedgen: its generator has batch norm, which cannot take a "
        "single latent": federated.strategy == "fedgen" and config.data.batch_size < 2,
        "data.batch_statistics: clients have too few validation images to fill its batches; leave it out": (
            config.data.batch_statistics is not None
        ),
        "search: a federated run has no search; leave it out": config.search != type(config.search)(),
    }
    return [fault for fault, is_there in wrong.items() if is_there]
