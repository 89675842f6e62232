"""The teacher stage: a full-precision net, trained with the teacher's agent or taken from a file."""

from __future__ import annotations

from qkd.analysis.normalization import warn_of_normalization
from qkd.engines.engine import current
from qkd.progress import Progress
from qkd.roles.images import run_images
from qkd.roles.stored import warn_of_another_environment
from qkd.roles.teacher.borrowed import borrow_teacher
from qkd.roles.teacher.role import teacher_parts, teacher_role
from qkd.run.folder import RunFolder
from qkd.search.role_search import search_agent
from qkd.training import cpu_threads
from qkd.training.assembly import Context, assemble, train_part
from qkd.training.precision import choose_device


def run(run: RunFolder, progress: Progress) -> None:
    """Search the teacher's agent if the config says so, train the teacher (both resuming), score it once
    on the test images, and write ``teacher/``; or take all of that from another run.

    Raises:
        ValueError: If the data, the net or the given weights cannot be used.
        qkd.search.SearchError: If the search's whole population diverges.
        qkd.training.TrainingError: If the training diverges.
        OSError: If a file cannot be written.
    """
    if run.config.teacher.run is not None:
        borrow_teacher(run, run.config.teacher.run, progress)
        return
    warn_of_another_environment(run, progress)
    with cpu_threads(run.config.threads):
        search_agent(run, "teacher", progress)
        _run(run, progress)


def _run(run: RunFolder, progress: Progress) -> None:
    device, own = choose_device(run.config.device), run.config.teacher
    context = Context(run, run_images(run, progress).to(device), device, progress)
    run.folder("teacher")
    training = assemble(teacher_role(context))
    if own.train is None:
        progress.say("teacher: untrained" if own.untrained else f"teacher: {own.weights}, unchanged")
    if own.train is None and not own.untrained:
        current().first(lambda: warn_of_normalization(training.made.model, context.splits, progress))
    fitted = training.run(progress)
    others = [path for part in teacher_parts(context) for path in train_part(part)]
    run.complete("teacher", [*training.finish(fitted), *others], training.made.inputs)
    training.drop_checkpoints()
