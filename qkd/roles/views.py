"""What the teacher sees of a batch during distillation: the student's images, its own agent's, or clean ones."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qkd.agents import build_agent
from qkd.config import AgentConfig, RunConfig
from qkd.data import Splits, normalize
from qkd.roles.agents import role_agent
from qkd.run.folder import RunFolder
from qkd.seeding import stream
from qkd.training import Batch


def teacher_view(
    config: RunConfig, splits: Splits, agent: AgentConfig | None = None
) -> Callable[[Batch], Tensor] | None:
    """Return a function from a batch to the teacher's normalized images; None if it sees the student's.

    With ``own``, the teacher's agent augments the same raw images with its own random draws; with ``clean``, it sees
    the raw images.

    Args:
        config: Its ``student.view`` selects the view.
        splits: The images' mean and standard deviation.
        agent: The teacher's agent; defaults to that of the config.
    """
    if config.student.view == "same":
        return None
    if config.student.view == "clean":
        return lambda batch: normalize(batch.raw, splits.mean, splits.std)
    agent_of_teacher = build_agent(agent or config.teacher.agent, epochs=config.student.train.epochs, mean=splits.mean)

    def own(batch: Batch) -> Tensor:
        # Without positions in the data set, batches are distinguished by their step.
        names = (batch.epoch, batch.step) if batch.samples is None else (batch.epoch,)
        generator = stream(config.seed, "teacher_view", *names)
        seen = agent_of_teacher(batch.raw, generator=generator, epoch=batch.epoch, samples=batch.samples)
        return normalize(seen, splits.mean, splits.std)

    return own


def run_view(run: RunFolder, config: RunConfig, splits: Splits) -> Callable[[Batch], Tensor] | None:
    """Return :func:`teacher_view` with the agent that the run has found for its teacher, if it needs one.

    Args:
        run: The run.
        config: The run's config, or one with another length of the student's training.
        splits: The images' mean and standard deviation.
    """
    return teacher_view(config, splits, role_agent(run, "teacher") if config.student.view == "own" else None)
