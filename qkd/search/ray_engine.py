"""The engine on a Ray cluster: each member is a Ray Tune trial, and a custom scheduler keeps the rounds in step.

A turn depends only on its states, its policy and the seed, so a turn that was lost with its worker is taken again, and
the search finds the same schedule as the local engine. States and journal are in the run folder, which all workers
must see under the same path.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from qkd.config import SearchConfig
from qkd.search.board import SearchBoard
from qkd.search.journal import Journal, Turn
from qkd.search.population import Score, SearchError
from qkd.search.trial import Trial

MESSAGE_LENGTH = 300  # of a worker's error; Ray adds advice on memory to every lost worker
HINT = "install the extra: pip install 'qkd-toolkit[ray]', or use search.engine=local"


def run_ray(journal: Journal, build: Callable[[], Trial], board: SearchBoard, settings: SearchConfig) -> None:
    """Take all open turns of the journal on Ray workers, until the search ends.

    Args:
        journal: The search so far.
        build: Builds what the members share; called once in each worker, so it must be picklable (a module's function
            or a `functools.partial` of one).
        board: Shows the population after each turn.
        settings: Workers, GPUs, cluster, and how many lost workers a member survives.

    Raises:
        ImportError: If Ray Tune is not installed.
        SearchError: If a member fails more often than ``settings.worker_failures``, or the whole population diverges.
        OSError: If the journal cannot be written.
    """
    ray, tune = _import_ray()
    board.show(journal)
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray, settings)
    errors = ""
    try:
        # Tune restarts a worker that is lost during a turn, but gives up if it is lost while starting: begin again
        for _ in range(1 + settings.worker_failures):
            errors = _run(tune, journal, build, board, settings)
            if journal.is_done:
                return
    finally:
        if is_ours:
            ray.shutdown()
    raise SearchError(
        f"a member of the {journal.role}'s search failed repeatedly on its workers: {errors}; what was found so "
        f"far is kept, and the same command continues from there"
    )


def _run(tune: Any, journal: Journal, build: Callable[[], Trial], board: SearchBoard, settings: SearchConfig) -> str:
    """Let Tune take turns until the search is done or a member has failed too often; return the errors."""
    scheduler = rounds_scheduler(journal, board)
    with tempfile.TemporaryDirectory(prefix="qkd-ray-") as storage:
        with contextlib.redirect_stdout(sys.stderr):  # Tune announces itself; stdout is for results
            results = _tuner(tune, journal, build, scheduler, settings, storage).fit()
        if scheduler.failure is not None:
            raise scheduler.failure
        return "; ".join(_last_line(error) for error in results.errors) or "no worker gave a reason"


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:MESSAGE_LENGTH]


def member_trainable() -> type:
    """Return the Tune trainable of a member: a step is a turn, described by the trial's config."""
    _, tune = _import_ray()

    class SearchMember(tune.Trainable):  # type: ignore[name-defined, misc]
        """Takes turns; everything persistent is in the run folder, so there is nothing to save."""

        def setup(self, config: dict[str, Any]) -> None:
            self.trial: Trial = config["build"]()
            self.turn = Turn.from_json(config["turn"])

        def step(self) -> dict[str, Any]:
            score = self.trial.take(self.turn)
            # as text, since Tune flattens nested results before schedulers get them
            return {"score": json.dumps(asdict(score)), "number": self.turn.number, "member": self.turn.member}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            """Take another turn of this or another member; nets and images are kept."""
            self.turn = Turn.from_json(new_config["turn"])
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:  # noqa: ARG002
            """Write nothing."""

        def load_checkpoint(self, checkpoint: Any) -> None:  # noqa: ARG002
            """Read nothing."""

    return SearchMember


def rounds_scheduler(journal: Journal, board: SearchBoard) -> Any:
    """Return the Tune scheduler that runs a journal's turns: members wait at the end of a round for all others.

    Args:
        journal: Receives the scores and provides the open turns.
        board: Shows the population after each turn.
    """
    from ray.tune.experiment import Trial as TuneTrial
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler

    class Rounds(FIFOScheduler):  # type: ignore[misc]
        """Gives members their turns; ``failure`` is the error that ended the search early."""

        failure: Exception | None = None

        def choose_trial_to_run(self, tune_controller: Any) -> Any:
            turns = {turn.member: turn for turn in journal.turns()} if self.failure is None else {}
            for trial in tune_controller.get_trials():
                turn = turns.get(trial.config["member"])
                if turn is not None and trial.status in (TuneTrial.PENDING, TuneTrial.PAUSED):
                    trial.set_config({**trial.config, "turn": turn.to_json()})
                    return trial
            return None

        def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
            try:
                self._record(result)
            except (SearchError, OSError) as error:
                self.failure = error
            if journal.is_done or self.failure is not None:
                self._stop_others(tune_controller, trial)
                return str(TrialScheduler.STOP)
            tune_controller.pause_trial(trial, should_checkpoint=False)
            return str(TrialScheduler.NOOP)

        def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
            """End the search, since the round cannot end without this member."""
            self._stop_others(tune_controller, trial)

        def _record(self, result: Mapping[str, Any]) -> None:
            open_members = {turn.member for turn in journal.turns()}
            if result["number"] == journal.number and result["member"] in open_members:
                journal.record(result["member"], Score(**json.loads(result["score"])))
                board.show(journal)

        def _stop_others(self, tune_controller: Any, trial: Any) -> None:
            for other in tune_controller.get_trials():
                if other is not trial:
                    tune_controller.stop_trial(other)

    return Rounds()


def _tuner(
    tune: Any, journal: Journal, build: Callable[[], Trial], scheduler: Any, settings: SearchConfig, storage: str
) -> Any:
    placeholder = journal.turns()[0].to_json()
    resources = {"cpu": 1, **({"gpu": settings.gpus_per_worker} if settings.gpus_per_worker else {})}
    space = {"member": tune.grid_search(list(range(settings.members))), "build": build, "turn": placeholder}
    return tune.Tuner(
        tune.with_resources(member_trainable(), resources),
        param_space=space,
        tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True, metric="member", mode="max"),
        run_config=tune.RunConfig(
            name=f"search-{journal.role}",
            storage_path=storage,
            failure_config=tune.FailureConfig(max_failures=settings.worker_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _connect(ray: Any, settings: SearchConfig) -> None:
    if settings.address is not None:
        ray.init(address=settings.address, log_to_driver=False, logging_level="WARNING")
        return
    ray.init(num_cpus=settings.workers, include_dashboard=False, log_to_driver=False, logging_level="WARNING")


def _import_ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise ImportError(f"search.engine: `ray` needs Ray Tune, which is not installed ({error}); {HINT}") from error
    return ray, tune
