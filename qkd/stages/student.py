"""The distill stage: a low-bit student from initialization, through its phases, to settled weights."""

from __future__ import annotations

from qkd.progress import Progress
from qkd.roles.agents import agent_inputs
from qkd.roles.images import run_images
from qkd.roles.learner import StudentRole, student_images
from qkd.roles.stored import warn_of_another_environment
from qkd.run.folder import RunFolder
from qkd.training import cpu_threads
from qkd.training.assembly import Context, assemble, train_part
from qkd.training.precision import choose_device


def run(run: RunFolder, progress: Progress) -> None:
    """Distill the student (resuming), score it once on the test images, and write ``student/``.

    Raises:
        ValueError: If the data, a net, a loss term or a tap cannot be used.
        qkd.training.TrainingError: If the training diverges.
        OSError: If a file cannot be written.
    """
    warn_of_another_environment(run, progress)
    with cpu_threads(run.config.threads):
        device = choose_device(run.config.device)
        splits = student_images(run.config, run_images(run, progress)).to(device)
        role = StudentRole(Context(run, splits, device, progress))
        files = [path for part in role.sub_trainings() for path in train_part(part)]
        run.folder("student")
        training = assemble(role)
        files += training.finish(training.run(progress))
        run.complete("distill", files, [*training.made.inputs, *agent_inputs(run, "student")])
        training.drop_checkpoints()
