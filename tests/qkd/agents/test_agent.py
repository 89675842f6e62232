"""Agents built from a config: names, determinism, what each does, and what they say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qkd.agents import (
    PBA_OPERATIONS,
    POLICIES,
    Agent,
    Op,
    Policy,
    Schedule,
    ScheduleError,
    Segment,
    build_agent,
    save_schedule,
)
from qkd.agents.agent import agent_of_schedule
from qkd.config import AgentConfig

MEAN = (0.49, 0.48, 0.45)
EVERYTHING = Policy(tuple(Op(name, 0.7, 5) for name in PBA_OPERATIONS * 2))


def images(channels: int = 3, side: int = 32, count: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def agent_named(name: str, folder: Path, channels: int = 3) -> Agent:
    schedule = None
    if name == "file":
        schedule = folder / "schedule.yaml"
        save_schedule(Schedule((Segment(1, Policy()), Segment(1, EVERYTHING))), schedule)
    return build_agent(AgentConfig(policy=name, schedule=schedule), epochs=4, mean=MEAN[:channels])


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (1, 8)])
def test_every_agent_keeps_shape_and_type_and_repeats_with_its_seed(
    name: str, channels: int, side: int, tmp_path: Path
) -> None:
    agent, batch = agent_named(name, tmp_path, channels), images(channels, side)
    before = batch.clone()
    first, second = (agent(batch, generator=torch.Generator().manual_seed(1), epoch=3) for _ in range(2))
    other = agent(batch, generator=torch.Generator().manual_seed(2), epoch=3)
    assert first.shape == batch.shape and first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert torch.equal(batch, before)
    assert torch.equal(first, other) == (name == "none")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_an_agent_leaves_the_global_generator_alone(name: str, tmp_path: Path) -> None:
    agent = agent_named(name, tmp_path)
    before = torch.get_rng_state()
    agent(images(), generator=torch.Generator().manual_seed(1), epoch=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("cuts", [(48,), (1, 46, 1), (7, 16, 25)])
def test_an_image_becomes_the_same_in_whatever_batch_it_is(name: str, cuts: tuple[int, ...], tmp_path: Path) -> None:
    agent, batch = agent_named(name, tmp_path), images()
    samples = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[: len(batch)]
    whole = agent(batch, generator=torch.Generator().manual_seed(1), epoch=3, samples=samples)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(5))
    parts = [
        agent(batch[rows], generator=torch.Generator().manual_seed(1), epoch=3, samples=samples[rows])
        for rows in order.split(list(cuts))
    ]
    assert torch.equal(torch.cat(parts), whole[order])
    other = agent(batch, generator=torch.Generator().manual_seed(1), epoch=3, samples=samples + 1000)
    assert torch.equal(other, whole) == (name == "none")


def test_samples_must_number_the_images() -> None:
    agent = build_agent(AgentConfig(), epochs=1, mean=MEAN)
    with pytest.raises(ValueError, match=r"samples must number 48 images, got shape \(47,\)"):
        agent(images(), generator=torch.Generator(), epoch=0, samples=torch.arange(47))


def test_none_returns_the_images() -> None:
    agent = build_agent(AgentConfig(policy="none"), epochs=1, mean=MEAN)
    assert torch.equal(agent(images(), generator=torch.Generator(), epoch=0), images())


def test_crop_never_flips_and_crop_flip_does() -> None:
    # The left half is dark and the right half bright: a mirrored image shows on every row.
    batch = torch.zeros((200, 1, 32, 32), dtype=torch.uint8)
    batch[..., 16:] = 255
    for name, expects_flips in (("crop", False), ("crop_flip", True)):
        agent = build_agent(AgentConfig(policy=name), epochs=1, mean=(0.5,))
        out = agent(batch, generator=torch.Generator().manual_seed(0), epoch=0)
        is_mirrored = out[:, 0, 16, 8] > out[:, 0, 16, 24]
        assert bool(is_mirrored.any()) == expects_flips
        assert 128 in out  # padding of the mean's value


def test_a_schedule_is_followed_over_the_epochs(tmp_path: Path) -> None:
    save_schedule(Schedule((Segment(1, Policy()), Segment(1, Policy((Op("Invert", 1.0, 0),))))), tmp_path / "s.yaml")
    config = AgentConfig(policy="file", schedule=tmp_path / "s.yaml", crop_padding=0, flip=False)
    agent = build_agent(config, epochs=4, mean=MEAN)
    batch = images()
    for epoch in (0, 1):
        assert torch.equal(agent(batch, generator=torch.Generator().manual_seed(0), epoch=epoch), batch)
    late = agent(batch, generator=torch.Generator().manual_seed(0), epoch=2)
    is_inverted = (late == 255 - batch).flatten(1).all(1)
    is_same = (late == batch).flatten(1).all(1)
    assert bool((is_inverted | is_same).all()) and 0 < int(is_same.sum()) < len(batch) // 2


def test_the_final_cutout_is_applied() -> None:
    agent = build_agent(AgentConfig(policy="crop", crop_padding=0, cutout=8), epochs=1, mean=(1.0,))
    out = agent(torch.zeros((64, 1, 32, 32), dtype=torch.uint8), generator=torch.Generator(), epoch=0)
    assert int((out == 255).sum((1, 2, 3)).max()) == 64


def test_agents_say_what_they_do(tmp_path: Path) -> None:
    empty = Schedule((Segment(7, Policy()),))
    for name in ("none", "crop", "crop_flip"):
        assert agent_named(name, tmp_path).schedule(7) == empty
    for name in ("trivial", "randaugment"):
        assert agent_named(name, tmp_path).schedule(7) is None
    assert agent_named("file", tmp_path).schedule(4) == Schedule((Segment(2, Policy()), Segment(2, EVERYTHING)))
    assert agent_named("none", tmp_path).describe() == "none"
    assert agent_named("randaugment", tmp_path).describe() == (
        "randaugment, 2 operations at magnitude 9, crop after padding 4, flip"
    )


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown policy 'crop_flp'; did you mean 'crop_flip'"):
        build_agent(AgentConfig(policy="crop_flp"), epochs=1, mean=MEAN)
    with pytest.raises(ValueError, match="changes nothing, but cutout is 8"):
        build_agent(AgentConfig(policy="none", cutout=8), epochs=1, mean=MEAN)
    with pytest.raises(ValueError, match="positive epochs"):
        build_agent(AgentConfig(), epochs=0, mean=MEAN)
    with pytest.raises(ValueError, match="fractions 0..1"):
        build_agent(AgentConfig(), epochs=1, mean=(125.0,))
    with pytest.raises(ScheduleError, match="absent.yaml"):
        build_agent(AgentConfig(policy="file", schedule=tmp_path / "absent.yaml"), epochs=1, mean=MEAN)


def test_wrong_calls_are_refused() -> None:
    agent = build_agent(AgentConfig(), epochs=2, mean=MEAN)
    with pytest.raises(TypeError, match="uint8"):
        agent(images().float(), generator=torch.Generator(), epoch=0)
    with pytest.raises(ValueError, match="1 channels, but the agent's mean has 3"):
        agent(images(1), generator=torch.Generator(), epoch=0)
    with pytest.raises(ValueError, match=r"epoch must be 0\.\.1, got epoch=2"):
        agent(images(), generator=torch.Generator(), epoch=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_cpu_generator_gives_the_same_batch_on_the_gpu(name: str, tmp_path: Path) -> None:
    agent = agent_named(name, tmp_path)
    on_cpu, on_gpu = (
        agent(images().to(device), generator=torch.Generator().manual_seed(1), epoch=3) for device in ("cpu", "cuda")
    )
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize(("crop_offsets", "last"), [("all", 4), ("released", 3)])
def test_crop_offsets(crop_offsets: str, last: int) -> None:
    """All 2p + 1 places of a crop are drawn; role-kd's released code never draws the last one."""
    agent = build_agent(
        AgentConfig(policy="crop", crop_padding=2, crop_offsets=crop_offsets),  # type: ignore[arg-type]
        epochs=1, mean=(0.0,),
    )  # fmt: skip
    shown = torch.zeros(600, 1, 9, 9, dtype=torch.uint8)
    shown[:, :, 4, 4] = 255  # a point in the middle shows where the window was
    seen = agent(shown, generator=torch.Generator().manual_seed(0), epoch=0)
    rows, columns = seen[:, 0].flatten(1).argmax(1) // 9, seen[:, 0].flatten(1).argmax(1) % 9
    for place in (rows, columns):
        assert sorted({6 - int(one) for one in place}) == list(range(last + 1))
    assert ("never at the last offset" in agent.describe()) == (crop_offsets == "released")


def test_a_found_schedule_crops_as_the_config_says() -> None:
    config = AgentConfig(policy="search", crop_padding=2, crop_offsets="released", flip=False)
    agent = agent_of_schedule(Schedule((Segment(1, Policy()),)), config, epochs=1, mean=(0.0,))
    assert agent.leaves_last and agent.padding == 2 and agent.cutmix == 0
    mixing = config.model_copy(update={"cutmix": 0.7})
    assert agent_of_schedule(Schedule((Segment(1, Policy()),)), mixing, epochs=1, mean=(0.0,)).cutmix == 0.7
