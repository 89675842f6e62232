"""One device has nothing to do; what several need is refused or said before anything trains."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qkd.agents import build_agent
from qkd.config import AgentConfig, DataConfig, TrainConfig
from qkd.data import iterate
from qkd.engines import joining, launching, membership
from qkd.engines.engine import Engine, FirstFailedError, PeerLostError, agree, alone, current, shared_rows, using
from qkd.failures import BAD_INPUT, ConfigError
from qkd.files import delete_file, may_write, only_reading, read_json, write_json
from qkd.methods.method import Method
from qkd.methods.table import METHODS, _resolve, methods_of
from qkd.pipeline.devices import device_faults, require_devices
from qkd.progress import Silent
from qkd.run.folder import RunFolder
from qkd.testing import TinyNet, synthetic_splits, tiny_config
from qkd.training import Batch, Job, Phase, Trainer, accuracy, supervised_step
from qkd.training.origin import kernels_of, other_kernels, other_settings, settings_of
from qkd.training.precision import choose_device
from qkd.training.source import SharedSource, source_of

ROOT = Path(__file__).resolve().parents[3]


class Pretended(Engine):
    """One of several processes, as far as it does not wait for another."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.local_rank = rank, size, rank

    def share(self, images: int, most: int | None = None) -> slice:
        return shared_rows(images, self.rank, self.size, most)

    def texts(self, text: str) -> list[str]:
        return ["other" if rank != self.rank else text for rank in range(self.size)]


def test_one_device_does_everything_itself() -> None:
    engine, x = Engine(), torch.ones(3)
    engine.average([x])
    with engine.training([nn.BatchNorm2d(2)]), engine.on_whole_batches():
        assert engine.whole(x) is x and engine.sums({"x": x})["x"] is x
    assert engine.is_first and engine.size == 1 and engine.first(lambda: 3) == engine.in_turn(lambda: 3) == 3
    assert engine.decide(False) is False and engine.texts("a") == ["a"] and engine.share(7) == slice(0, 7)


def test_an_engine_is_current_within_its_block_alone() -> None:
    outer = current()
    with using(Pretended(1, 2)) as engine:
        assert current() is engine
        with alone():
            assert current().size == 1
        assert current() is engine
    assert current() is outer


@pytest.mark.parametrize(("images", "size"), [(6, 2), (6, 3), (128, 1)])
def test_shares_are_neighbors_and_whole(images: int, size: int) -> None:
    rows = [list(range(images))[shared_rows(images, rank, size)] for rank in range(size)]
    assert sum(rows, []) == list(range(images)) and len({len(own) for own in rows}) == 1


def test_an_uneven_share_is_refused_with_numbers_that_fit() -> None:
    with pytest.raises(ValueError, match=r"batch of 50 images .* 4 devices.* multiple of 4 \(e\.g\. 48 or 52\)"):
        shared_rows(50, 0, 4)
    with pytest.raises(ValueError, match=r"multiple of 4 \(e\.g\. 4\)"):
        shared_rows(2, 0, 4)
    with pytest.raises(ValueError, match=r"batch of 65 images \(all that there are\) .* \(e\.g\. 64\)"):
        shared_rows(65, 0, 2, most=65)
    with pytest.raises(ValueError, match=r"\(e\.g\. 4, and give as many images\)"):
        shared_rows(3, 0, 4, most=3)


def test_processes_that_see_other_files_are_named() -> None:
    with pytest.raises(ValueError, match=r"student: process 0 sees .* process 1 sees other; .* the same run folder"):
        agree({"checkpoint": 3}, Pretended(0, 2), "student")
    agree({"checkpoint": 3}, Engine(), "student")


@pytest.mark.parametrize("following", [0, 1])
def test_parts_of_batches_are_the_batches(following: int) -> None:
    split = synthetic_splits(train=20).train
    order = torch.arange(20).flip(0)

    def labels(part: slice | None) -> list[list[int]]:
        found = iterate(split, order, 8, "cpu", drop_last=True, following=following, part=part)
        return [labels.tolist() for _, labels in found]

    whole, parts = labels(None), [labels(slice(0, 4)), labels(slice(4, 8))]
    assert [first[:4] + second[:4] for first, second in zip(*parts, strict=True)] == [one[:8] for one in whole]
    assert all(len(one) == 4 + following for part in parts for one in part)
    assert [one[4:] for one in parts[1]] == [one[8:] for one in whole]  # what follows a batch follows its last part


def test_batches_are_scored_in_turn_as_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    splits, seen = synthetic_splits(val=50), []
    data = DataConfig(name="npz", path=Path("unused"), eval_batch_size=20)

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return torch.zeros(len(x), 4)

    for rank, sizes in ((0, [20, 10]), (1, [20]), (3, [])):
        seen.clear()
        with using(Pretended(rank, 2 if rank < 2 else 4)):
            accuracy(Net(), splits.val, splits, data, torch.device("cpu"))
        assert seen == sizes


def test_each_process_has_a_gpu_of_its_own_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with using(Pretended(2, 4)):
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:2")
        assert choose_device("cuda:1") == torch.device("cuda:1") and choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto") == torch.device("cuda")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes on this machine need one GPU each, but it has 1"):
        joining._backend("auto")
    assert joining._backend("cuda:0") == joining._backend("cpu") == "gloo"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert joining._backend("cuda") == "nccl"


# --- files


def test_who_only_reads_writes_and_deletes_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    written = write_json(kept, 1)
    with only_reading():
        assert not may_write() and write_json(kept, 2) != written and write_json(tmp_path / "new.json", 2)
        delete_file(kept)
    assert may_write() and read_json(kept) == 1 and not (tmp_path / "new.json").exists()
    delete_file(kept)
    assert not kept.exists()


def test_a_run_folder_is_read_beside_the_process_that_has_its_lock(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with RunFolder.open(config, tmp_path) as run, only_reading(), RunFolder.open(config, tmp_path) as other:
        (run.path / "teacher").mkdir()
        other.complete("teacher", [run.path / "config.yaml"])
        other.adopt("teacher", tmp_path / "nowhere")
        assert not run.is_complete("teacher")


# --- what is refused


def test_faults_are_said_before_training(tmp_path: Path) -> None:
    meta = [{"name": "meta", "epochs": 2, "meta": {"quiz_images": 12}}]
    config = tiny_config(tmp_path, {"student.phases": meta, "student.init": "random", "data.batch_size": 15})
    require_devices(config, 1)
    with pytest.raises(ConfigError, match=r"config\.data\.batch_size: a batch of 15 .*\n.*MetaDistil differentiates"):
        require_devices(config, 2)
    assert [fault for fault in device_faults(config, 3) if "batch_size" in fault] == []


def test_a_method_that_does_not_say_so_is_refused(tmp_path: Path) -> None:
    class Own(Method):
        pass

    assert "Own does not say that devices may share its batches" in Own(tiny_config(tmp_path)).why_one_device


def test_every_method_of_the_table_has_its_say(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    kinds = {name: _resolve(entry.place) for name, entry in METHODS.items()}
    assert all("why_one_device" in vars(kind) for kind in kinds.values())
    refused = {name for name, kind in kinds.items() if kind.why_one_device.fget(kind)}  # none of them asks the config
    assert refused == {"meta_distil", "data_free", "adaptation"} and methods_of(config)[-1].why_one_device == ""


# --- resuming


def test_another_number_of_devices_is_told_of_and_parts_of_batch_norm_are_refused(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    then, kernels = settings_of(job, 16), kernels_of(job)
    with using(Pretended(0, 2)) as engine:
        assert other_kernels(kernels, kernels_of(job)) == ["devices: 1 then, 2 now"]
        assert other_settings(then, settings_of(job, 16)) == []
        engine.synchronizes = False
        (fault,) = other_settings(then, settings_of(job, 16))
    assert fault == "parts of a batch with separate batch-norm statistics: 1 then, 2 now"


def test_a_source_that_gives_whole_batches_is_shared_by_rows(tmp_path: Path) -> None:
    batches = list(source_of(tiny_job(tmp_path)).batches(0, 0, 16))

    class Whole:
        images = 64

        def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
            yield from batches[first:]

    with using(Pretended(1, 2)):
        halves = list(SharedSource(Whole()).batches(0, 1, 16))
        own = list(source_of(tiny_job(tmp_path)).batches(0, 1, 16))
    assert len(halves) == len(own) == 3
    for half, direct, whole in zip(halves, own, batches[1:], strict=True):
        assert half.mixed is not None and direct.mixed is not None and whole.mixed is not None
        for one in (half, direct):
            assert torch.equal(one.images, whole.images[8:]) and torch.equal(one.labels, whole.labels[8:])
            assert one.samples is not None and torch.equal(one.samples, whole.samples[8:])  # type: ignore[index]
            assert one.mixed is not None and torch.equal(one.mixed.share, whole.mixed.share[8:])


def test_a_training_set_smaller_than_a_batch_must_be_shared_evenly_too(tmp_path: Path) -> None:
    job = replace(tiny_job(tmp_path), splits=synthetic_splits(train=15))
    with using(Pretended(0, 2)), pytest.raises(ValueError, match="a batch of 15 images"):
        Trainer(job, Silent())


def tiny_job(folder: Path) -> Job:
    net, splits, config = TinyNet(), synthetic_splits(), TrainConfig(epochs=1, lr=0.1)
    agent = build_agent(AgentConfig(policy="cutmix", crop_padding=1), epochs=1, mean=splits.mean)
    data = DataConfig(name="npz", path=Path("unused"), batch_size=16)
    phases = (Phase("supervised", 1, supervised_step(net)),)
    return Job("teacher", net, config, data, splits, agent, phases, 0, torch.device("cpu"), folder)


# --- starting, watching, speaking


@pytest.fixture
def member(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name, value in launching.member_environment(1, 2, Path("unused"), {}).items():
        monkeypatch.setenv(name, value)
    yield monkeypatch


def test_a_process_knows_its_place(member: pytest.MonkeyPatch) -> None:
    assert membership.is_member() and membership.is_started_by_us() and not membership.is_first()
    member.delenv(membership.MEETING)
    assert not membership.is_member() and membership.is_first(), "a rank alone is no torchrun"
    member.setenv("MASTER_ADDR", "localhost")
    member.setenv("MASTER_PORT", "1")
    assert membership.is_member() and not membership.is_first()
    member.setenv("WORLD_SIZE", "1")
    assert not membership.is_member()


def test_cores_are_divided_unless_their_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "usable_cpus", lambda: 8)
    assert launching.member_environment(0, 3, Path("unused"), {})["OMP_NUM_THREADS"] == "2"
    assert launching.member_environment(0, 3, Path("unused"), {"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"


def test_processes_run_nothing_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file there with the name of a standard module was run: `python -m` puts that folder first."""
    monkeypatch.chdir(tmp_path)
    for name in ("argparse", "grp", "socket", "qkd"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'a').write({name!r})")
    monkeypatch.setattr(sys, "path", [str(ROOT), "", *(one for one in sys.path if one)])
    assert launching.launch(["ls", "nets", "--json"], 2) == 0
    assert not (tmp_path / "was_run").exists()


LOST = membership.LOST


@pytest.mark.parametrize(
    ("codes", "code", "text"),
    [
        ([LOST, -9], 1, "process 1 of 2 was killed by SIGKILL, so all were stopped"),
        ([-15, LOST, None], 1, "process 0 of 3 was killed by SIGTERM"),
        ([2, 2], 2, ""),  # the first has said it
        ([LOST, 1], 1, "said by 1"),
        ([LOST, LOST], 1, "the processes lost contact"),
    ],
)
def test_one_says_why_all_have_stopped(tmp_path: Path, codes: list[int | None], code: int, text: str) -> None:
    logs = [tmp_path / f"{rank}.log" for rank in range(1, len(codes))]
    for rank, log in enumerate(logs, start=1):
        log.write_text(f"said by {rank}\n" if codes[rank] == 1 else "")
    stream = io.StringIO()
    assert launching._tell(codes, logs, stream) == code
    assert text in stream.getvalue() and stream.getvalue().count("\n") == (1 if text else 0)


def test_who_speaks_up(member: pytest.MonkeyPatch) -> None:
    assert not joining.speaks_up(ConfigError(["the same in all"])), "the first one has the same to say"
    assert joining.speaks_up(OSError("a disk of this machine")) and not joining.speaks_up(FirstFailedError())
    assert joining.exit_code(PeerLostError(), 1) == LOST and joining.exit_code(OSError(), BAD_INPUT) == BAD_INPUT


def test_processes_draw_the_same_where_each_computes_the_whole_batch() -> None:
    """MHGD drops heads; with other masks in each process, the mean of the gradients would be that of two losses."""
    drawn = []
    for rank in range(2):
        engine = Engine()
        engine.size, engine.rank, engine.step_seed = 2, rank, 5
        torch.manual_seed(100 + rank)
        after = torch.random.get_rng_state()
        with engine.same_draws():
            drawn.append(torch.rand(4))
        assert torch.equal(torch.random.get_rng_state(), after), "its own draws are as if there were no block"
    torch.manual_seed(5)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], torch.rand(4)), "as on one device"
    torch.manual_seed(3)
    with Engine().same_draws():
        assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(3)))
