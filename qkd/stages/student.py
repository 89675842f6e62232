"""The distill stage: a low-bit student from its start, through its phases, to settled weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qkd.agents import build_agent
from qkd.data import Splits
from qkd.files import sha256_of
from qkd.methods.auxiliary.training import train_auxiliary
from qkd.methods.peers.nets import Peer, peer_results
from qkd.methods.rotations.branches import branches_file, branches_mark, load_branches, train_branches
from qkd.progress import Progress
from qkd.roles.agents import agent_inputs, agent_mark, role_agent, training_settings
from qkd.roles.float_training import keep_last_checkpoint, warn_of_another_environment
from qkd.roles.images import run_images
from qkd.roles.nets import TAUGHT, WEIGHTS, guide_files, load_guide, net_facts, save_net
from qkd.roles.outcome import score, write_outcome
from qkd.roles.phases import Distillation, distillation
from qkd.roles.start import StudentStart, phases_of, student_images
from qkd.roles.views import run_view
from qkd.rundir import RunFolder
from qkd.training import Job, cpu_threads, fit
from qkd.training.precision import choose_device
from quantizers import Student, quantizer_scales, settle


def run(run: RunFolder, progress: Progress) -> None:
    """Distil the student (resuming), score it once on the test images, and write ``student/``.

    Raises:
        ValueError: If the data, a net, a loss term or a tap cannot be used.
        qkd.training.TrainingError: If the training diverges.
        OSError: If a file cannot be written.
    """
    warn_of_another_environment(run, progress)
    with cpu_threads(run.config.threads):
        _Distillation(run, progress).run()


class _Distillation:
    """One run of the stage; the steps share run, data and device."""

    def __init__(self, run: RunFolder, progress: Progress) -> None:
        self.folder, self.progress, self.config = run, progress, run.config
        self.device = choose_device(run.config.device)
        self.splits: Splits = student_images(run.config, run_images(run, progress)).to(self.device)
        self.start = StudentStart(run, self.splits, self.device, progress)

    def run(self) -> None:
        config, run = self.config, self.folder
        files = self.start.float_files() + train_auxiliary(run, self.splits, self.device, self.progress)
        files += train_branches(run, self.splits, self.device, self.progress)
        teacher = load_guide(run).to(self.device)
        student, peers = self.start.student(), self.start.peers()
        folder = run.folder("student")
        made = self._distillation(student, teacher, peers)
        fitted = fit(
            self._job(student, teacher, made, folder),
            self.progress,
            begin=lambda: self.start.calibrate(student, *made.low_bit),
        )
        settle(student)
        found = peer_results(peers, config, self.splits, self.device)
        save_net(folder / WEIGHTS, student, self.start.facts())
        files += self._keep_studied(teacher, made)
        outcome = score(
            "student",
            config.student_net,
            student,
            self.splits,
            config.data,
            fitted,
            parameters=sum(parameter.numel() for parameter in self.start.net().parameters()),
            weight_bits=config.student.quant.weight_bits,
            act_bits=config.student.quant.act_bits,
            start=self.start.kind,
            view=config.student.view,
            **({"peers": found} if found else {}),
        )
        files += [folder / WEIGHTS, folder / "metrics.jsonl", write_outcome(folder, outcome)]
        joint = [path for path in [branches_file(run)] if path is not None and path not in files]
        run.complete("distill", files, [*guide_files(run), *joint, *agent_inputs(run, "student")])
        keep_last_checkpoint(folder)

    def _distillation(self, student: Student, teacher: nn.Module, peers: tuple[Peer, ...]) -> Distillation:
        return distillation(
            self.config,
            phases_of(self.config.student),
            student,
            teacher,
            run_view(self.folder, self.config, self.splits),
            net=self.start.net(),
            splits=self.splits,
            peers=peers,
            branches=load_branches(self.folder, teacher, self.splits),
        )

    def _keep_studied(self, teacher: nn.Module, made: Distillation) -> list[Path]:
        """Write and score a teacher that learnt beside the student; return its files."""
        if all(partner.module is not teacher for partner in made.partners):
            return []
        name, splits = self.config.teacher.net, self.splits
        sizes = {"classes": len(splits.classes), "channels": splits.channels, "image_size": splits.image_size}
        place = self.folder.folder(TAUGHT)
        save_net(place / WEIGHTS, teacher, net_facts(name, **sizes))
        outcome = score("teacher, taught along", name, teacher, splits, self.config.data, None)
        return [place / WEIGHTS, write_outcome(place, outcome)]

    def _guide_marks(self) -> dict[str, str]:
        """Return the hashes of what the student learns from; a teacher's name is its folder."""
        files = {path.parent.relative_to(self.folder.path).as_posix(): path for path in guide_files(self.folder)}
        return {name: sha256_of(path) for name, path in files.items()}

    def _job(self, student: Student, teacher: nn.Module, made: Distillation, folder: Path) -> Job:
        config = self.config
        train = config.student.train
        source = self.start.file()
        agent = role_agent(self.folder, "student")
        return Job(
            role="student",
            model=student,
            config=train,
            data=config.data,
            splits=self.splits,
            agent=build_agent(agent, epochs=train.epochs, mean=self.splits.mean),
            phases=made.phases,
            seed=config.seed,
            device=self.device,
            folder=folder,
            fingerprint={
                "data": self.splits.fingerprint,
                **self._guide_marks(),
                **({"start": sha256_of(source)} if source is not None else {}),
                **branches_mark(self.folder),
                **agent_mark(agent),
            },
            settings=training_settings(config),
            scales=lambda: quantizer_scales(student),
            others={"teacher": teacher, **{partner.name: partner.module for partner in made.partners}},
            partners=made.partners,
        )
