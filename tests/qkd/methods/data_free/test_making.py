"""What makes images: the generator's form, what a watched teacher tells, each objective, sources and their draws."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qkd.cli.entry import main
from qkd.config import AgentConfig, RunConfig
from qkd.config.data_free import FAMILIES, DataFreeConfig
from qkd.data import normalize
from qkd.image_size import height_width
from qkd.losses import class_similarity
from qkd.methods.data_free.checks import require_teacher_fits
from qkd.methods.data_free.inverting.inversions import DataImpressions, DeepInversion
from qkd.methods.data_free.making.generating import GeneratorStep, TrainedGenerator, build_generator, judged
from qkd.methods.data_free.making.kinds import KINDS, weights_of
from qkd.methods.data_free.making.objectives import OBJECTIVES, Moment, facts_of
from qkd.methods.data_free.making.samples import grid_png, is_sampled, read_arrays, to_pixels, write_arrays
from qkd.methods.data_free.making.sources import Generated, Noise, Pool, balanced_labels, draw_latents
from qkd.methods.data_free.making.watching import Watched
from qkd.methods.table import methods_of
from qkd.nets.generator import PUBLISHED_EPSILON, Generator, GeneratorGroup
from qkd.run.folder import RunFolder
from qkd.seeding import stream
from qkd.testing import TinyNet, synthetic_splits
from qkd.training import Batch

SIZES: dict[str, Any] = {"latent": 6, "classes": 4, "channels": 1, "image_size": 8, "width": 8}


def settings(method: str, **changes: Any) -> DataFreeConfig:
    own = {} if method in ("noise", "deep_inversion", "zskd") else {"latent": 6, "width": 8}
    return DataFreeConfig(method=method, **{**own, **changes})


def drawn(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return draw_latents(count, 6, 4, stream(seed, "test"), torch.device("cpu"))


# --- the generator


def test_the_published_form_layer_by_layer() -> None:
    net = Generator(latent=100, classes=10, channels=3, image_size=32)
    assert tuple(net.expand.weight.shape) == (128 * 8 * 8, 100)
    assert [norm.eps for norm in (net.norm1, net.norm2, net.norm3)] == [1e-5, PUBLISHED_EPSILON, PUBLISHED_EPSILON]
    assert PUBLISHED_EPSILON == 0.8 and not net.norm4.affine
    assert [conv.out_channels for conv in (net.conv1, net.conv2, net.conv3)] == [128, 64, 3]


@pytest.mark.parametrize("size", [4, 7, 8, 28, (6, 10)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_gray_or_color(size: Any, channels: int) -> None:
    net = Generator(**{**SIZES, "image_size": size, "channels": channels})
    images = net(*drawn(6))
    assert images.shape == (6, channels, *height_width(size))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(channels), atol=0.2, rtol=0)


@pytest.mark.parametrize("condition", ["product", "one_hot"])
def test_a_conditional_generator_reads_the_class(condition: str) -> None:
    net = Generator(**SIZES, condition=condition).eval()
    latents, labels = drawn(4)
    assert not torch.equal(net(latents, labels), net(latents, (labels + 1) % 4))
    plain = Generator(**SIZES).eval()
    assert torch.equal(plain(latents, labels), plain(latents, (labels + 1) % 4))


def test_a_group_keeps_the_order_of_labels() -> None:
    group = GeneratorGroup([Generator(**SIZES) for _ in range(2)]).eval()
    latents, labels = drawn(6)
    images = group(latents, labels)
    for place in range(6):
        own = group.generators[int(labels[place]) % 2](latents[place : place + 1], labels[place : place + 1])
        torch.testing.assert_close(images[place : place + 1], own)


@pytest.mark.parametrize("wrong", [{"width": 7}, {"latent": 0}, {"condition": "sum"}])
def test_a_generator_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sizes must be positive, width even and condition one of"):
        Generator(**{**SIZES, **wrong})


# --- what a teacher sees


def test_a_watched_teacher_tells_of_its_inside_and_stays_as_it_is() -> None:
    net = TinyNet()
    with torch.no_grad():
        net(torch.randn(8, 1, 8, 8))  # statistics of its own
    before = copy.deepcopy(net.state_dict())
    teacher, images = Watched(net), torch.randn(4, 1, 8, 8, requires_grad=True)
    seen = teacher(images)
    assert len(seen.inputs) == 3 and seen.feature is not None and seen.feature.shape == (4, 6)
    torch.testing.assert_close(seen.logits, net.head(seen.feature))
    entering = net.stem[0](images)
    torch.testing.assert_close(seen.inputs[0], entering)
    first = (entering.var((0, 2, 3), correction=0) - net.stem[1].running_var).norm()
    first += (entering.mean((0, 2, 3)) - net.stem[1].running_mean).norm()
    assert 0 < first.item() < seen.statistics().item()
    (seen.logits.sum() + seen.statistics()).backward()
    assert images.grad is not None and all(one.grad is None for one in net.parameters())
    assert all(torch.equal(before[name], one) for name, one in net.state_dict().items())
    assert not net.stem[1]._forward_pre_hooks and not net.training


def test_a_teacher_without_batch_norm_has_no_statistics() -> None:
    seen = Watched(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))(torch.randn(3, 1, 8, 8))
    assert float(seen.statistics()) == 0 and set(facts_of(seen)) == {"one_hot", "class_balance"}


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_objective_moves_its_generator(method: str) -> None:
    net = TrainedGenerator(build_generator(settings(method), synthetic_splits(), 0, "test"))
    latents, labels = drawn(8)
    images = net(latents, labels)
    student = TinyNet()
    moment = Moment(images, latents, labels, Watched(TinyNet())(images), net.references, student(images))
    OBJECTIVES[method](moment, weights_of(method, {})).loss.backward()
    gradients = [one.grad for one in net.parameters()]
    assert all(one is not None and bool(one.isfinite().all()) for one in gradients)
    assert any(float(one.abs().max()) > 0 for one in gradients if one is not None)


def test_every_generator_and_weight_has_a_place() -> None:
    of_generators = {name for name, family in FAMILIES.items() if family in ("generator", "adversarial", "joint")}
    assert set(OBJECTIVES) == of_generators
    assert weights_of("dafl", {"balance_weight": 2})["balance_weight"] == 2


def test_references_are_those_of_the_second_step_of_an_epoch(tmp_path: Path) -> None:
    splits, own = synthetic_splits(), settings("rdskd", steps_per_epoch=3)
    net = TrainedGenerator(build_generator(own, splits, 0, "test"))
    step = GeneratorStep(net, Watched(TinyNet()), own, splits, 0, tmp_path)
    found = []
    for number in range(3):
        latents, labels = drawn(8, number)
        step(Batch(latents[:, :, None, None], labels, latents, 0, number))
        found.append(net.references.clone())
    assert not found[0].any() and found[1].any() and torch.equal(found[1], found[2])
    assert (tmp_path / "samples" / "epoch_00000.npz").is_file()
    step = GeneratorStep(net, step.teacher, settings("rdskd", steps_per_epoch=1), splits, 0, tmp_path)
    net.references.zero_()
    step(Batch(latents[:, :, None, None], labels, latents, 0, 0))
    assert net.references.any(), "an epoch without a second step has them, too"


# --- images that are inverted


@pytest.mark.parametrize("kind", [DeepInversion, DataImpressions])
def test_an_inversion_gets_better_and_is_the_same_again(kind: Any) -> None:
    method = "deep_inversion" if kind is DeepInversion else "zskd"
    losses, images = [], []
    for steps in (1, 30, 30):
        own = settings(method, pool_steps=steps, lr=0.05)
        made = kind(Watched(_taught()), own, synthetic_splits(), 0, torch.device("cpu"))(0, 4, {})
        losses.append(made.loss)
        images.append(made.images)
    assert losses[1] < losses[0] and losses[1] == losses[2] and torch.equal(images[1], images[2])


def _taught() -> nn.Module:
    net = TinyNet()
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    return net


def test_targets_are_drawn_around_their_class() -> None:
    net = _taught()
    made = DataImpressions(Watched(net), settings("zskd", beta=(1.0,)), synthetic_splits(), 0, torch.device("cpu"))
    targets = torch.cat([made.targets(index, 40) for index in range(20)])
    torch.testing.assert_close(targets.sum(1), torch.ones(800))
    similarity = class_similarity(net.head.weight.detach().double())  # type: ignore[union-attr,operator]
    rows = (similarity - similarity.amin(1, keepdim=True)) / (
        similarity.amax(1, keepdim=True) - similarity.amin(1, keepdim=True)
    )
    expected = (rows + 1e-4) / (rows + 1e-4).sum(1, keepdim=True)
    for label in range(4):
        torch.testing.assert_close(targets[label::4].mean(0).double(), expected[label], atol=0.1, rtol=0)


# --- sources and files


def test_draws_depend_on_their_stream_alone() -> None:
    net = build_generator(settings("gdfq"), synthetic_splits(), 0, "test")
    pool = Pool(torch.arange(6.0).view(6, 1, 1, 1), torch.arange(6))
    for made in (
        Noise((1, 8, 8), torch.device("cpu")),
        Generated(net, latent=6, classes=4, device=torch.device("cpu"), asks=True),
        pool,
    ):
        first, again, other = (made.draw(4, stream(0, "made", number))[0] for number in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
    images, labels = pool.draw(15, stream(0, "made", 3))
    assert torch.equal(images.flatten(), labels.float())
    assert sorted(torch.bincount(labels).tolist()) == [2, 2, 2, 3, 3, 3]
    labels = draw_latents(10, 6, 4, stream(0, "labels"), torch.device("cpu"))[1]
    assert sorted(torch.bincount(labels).tolist()) == [2, 2, 3, 3]


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize(("count", "classes"), [(64, 100), (128, 100), (1, 3), (64, 10), (20, 10), (19, 10)])
def test_no_class_is_left_out_by_small_batches(count: int, classes: int, shuffled: bool) -> None:
    """Of 100 classes in batches of 64, the last 36 were never asked for, and in batches of 128 half as often."""
    batches = [balanced_labels(count, classes, stream(0, "labels", number), shuffled=shuffled) for number in range(300)]
    for labels in batches:
        found = torch.bincount(labels, minlength=classes)
        assert len(labels) == count and found.max() - found.min() <= 1
    total = torch.bincount(torch.cat(batches), minlength=classes).double()
    assert total.min() > 0.7 * total.mean() and total.max() < 1.4 * total.mean()


def test_pixels_and_files(tmp_path: Path) -> None:
    raw = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    mean, std = (0.3, 0.5), (0.2, 0.4)
    assert torch.equal(to_pixels(normalize(raw, mean, std), mean, std), raw)
    write_arrays(tmp_path / "a.npz", images=raw.numpy())
    assert np.array_equal(read_arrays(tmp_path / "a.npz")["images"], raw.numpy())
    np.savez(tmp_path / "b.npz", images=np.array([object()]))
    with pytest.raises(ValueError, match="not an npz file of plain arrays"):
        read_arrays(tmp_path / "b.npz")["images"]
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:60])
    with pytest.raises(ValueError, match="not an npz file of plain arrays"):
        read_arrays(tmp_path / "c.npz")
    assert [epoch for epoch in range(25) if is_sampled(epoch, 25)] == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert grid_png([np.zeros((2, 1, 4, 4), np.uint8)]).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="rows of images of the same size"):
        grid_png([])


def test_a_histogram_of_classes() -> None:
    found = judged(torch.eye(4).repeat(3, 1) * 50)
    assert found["class_histogram"] == [3, 3, 3, 3]
    assert found["histogram_entropy"] == pytest.approx(1) and found["mean_confidence"] == pytest.approx(1)
    assert judged(torch.eye(4)[:1].repeat(5, 1))["histogram_entropy"] == pytest.approx(0, abs=1e-9)


# --- what is refused, before anything is trained


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"method": "noise", "lr": 0.5}, "`noise` .noise. does not read 'lr'"),
        ({"method": "rdskd", "pool_images": 5}, "does not read 'pool_images'"),
        ({"method": "zskd", "beta": ()}, "beta"),
        ({"method": "dfad", "batch_size": 5}, "does not read 'batch_size'"),
        ({"method": "gdfq", "groups": 2}, "`groups` is for method `generative`"),
        ({"method": "rdskd", "batch_size": 9}, "`batch_size` must be even"),
    ],
)
def test_keys_that_a_method_does_not_read(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DataFreeConfig(**values)


@pytest.mark.parametrize(
    ("method", "changes", "weights", "match"),
    [
        ("dafl", {}, {"oh": 1}, "unknown weight `oh` of method `dafl`; known: one_hot_weight"),
        ("rdskd", {}, {"oh": 1}, "it has no weights"),
        ("rdskd", {"student.view": "clean"}, {}, "student.view: must be `same`"),
        ("rdskd", {"student.agent": {"policy": "cutmix"}}, {}, "student.agent: policy `cutmix`"),
        ("rdskd", {"student.agent": {"policy": "search"}}, {}, "student.agent: policy `search`"),
        ("rdskd", {"bench.int8_baseline": True}, {}, "bench.int8_baseline"),
        (
            "rdskd",
            {"student.phases": [{"epochs": 2, "meta": {"quiz_images": 4}}]},
            {},
            "meta and teacher_terms cannot be combined with data_free",
        ),
        (
            "rdskd",
            {"student.auxiliary": {"train": {"epochs": 1}}},
            {},
            "student.auxiliary: cannot be combined with data_free",
        ),
    ],
)
def test_what_reads_real_images_is_refused(
    method: str, changes: dict[str, Any], weights: dict[str, Any], match: str, config_of: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ValueError, match=match):
        methods_of(config_of(method, changes, weights=weights))


def test_an_ensemble_has_no_inside(config_of: Callable[..., RunConfig]) -> None:
    config = config_of("dafl")
    teacher = config.teacher.model_copy(update={"members": 2})
    with pytest.raises(ValueError, match="teacher.members: must be 1 with data_free method `dafl`"):
        methods_of(config.model_copy(update={"teacher": teacher}))


def test_a_teacher_that_lacks_what_is_read() -> None:
    plain, convolutional = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), nn.Sequential(nn.Conv2d(1, 2, 1))
    for method, kind in KINDS.items():
        if kind.needs_statistics:
            with pytest.raises(ValueError, match=f"`{method}` reads running .* but plain has none; .* rdskd"):
                require_teacher_fits(method, "plain", plain, 2, (1, 2, 2))
        else:
            require_teacher_fits(method, "plain", plain, 2, (1, 2, 2))
        if kind.needs_last_layer:
            with pytest.raises(ValueError, match="logits, but those of conv are the output of none"):
                require_teacher_fits(method, "conv", convolutional, 2, (1, 2, 2))
        with pytest.raises(ValueError, match=r"data_free\.groups: 3 generators for 2 classes; give at most 2"):
            require_teacher_fits(method, "plain", plain, 2, (1, 2, 2), groups=3)
        with pytest.raises(ValueError, match="at least two classes, got 1"):
            require_teacher_fits(method, "plain", plain, 1, (1, 2, 2))


def test_a_config_is_checked_before_the_teacher_trains(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(
        f"name: bad\ndata: {{name: npz, path: {data_folder}}}\nteacher: {{net: lenet5, train: {{epochs: 1}}}}\n"
        "student: {net: lenet5_half, init: random, quant: {weight_bits: 2, act_bits: 2}, train: {epochs: 1},\n"
        "  data_free: {method: deep_inversion}, agent: {policy: none}}\n"
    )
    assert main(["run", str(config), "--runs-dir", str(tmp_path / "runs")]) != 0
    assert "reads running statistics of the teacher's batch norms, but lenet5 has none" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "bad" / "teacher").exists()


# --- qkd generate


def test_generate_draws_samples_by_epoch_and_fresh_images(
    config_of: Callable[..., RunConfig],
    borrowed: Callable[[RunConfig], RunFolder],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    eager: None,  # noqa: ARG001
) -> None:
    from qkd.progress import Silent
    from qkd.stages import STAGES
    from qkd.stages.report import gather

    with borrowed(config_of("rdskd")) as run:
        asked = ["generate", str(run.path), "--out", str(tmp_path / "grid.png"), "--json"]
        assert main(asked) == 2
        assert "`qkd distill` with the run's config makes what is missing" in capsys.readouterr().err
        STAGES["distill"](run, Silent())
        shown = gather(run)
    assert "one row per epoch: 0, 1, 2. rdskd, 6 steps; the teacher sees each class" in next(iter(shown.pictures))
    assert shown.histogram is not None and "sees in 512 images" in shown.histogram
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == ["epoch 0", "epoch 1", "epoch 2", "fresh"] and sum(told["class_histogram"]) == 512
    first = (tmp_path / "grid.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    main(asked)
    assert (tmp_path / "grid.png").read_bytes() == first
    with pytest.raises(SystemExit):
        main([*asked[:3], str(tmp_path / "grid.gif")])


def test_an_agent_other_than_none_augments_made_images(
    config_of: Callable[..., RunConfig], borrowed: Callable[[RunConfig], RunFolder]
) -> None:
    from qkd.methods.data_free.making.sources import MadeSource
    from qkd.progress import Silent
    from qkd.roles.images import run_images
    from qkd.roles.learner import StudentRole, student_images
    from qkd.training.assembly import Context, assemble

    found = {}
    for policy in ("none", "crop"):
        agent = {"policy": policy, "crop_padding": 2, "flip": False}
        with borrowed(config_of("noise", {"student.agent": agent, "name": policy})) as run:
            splits = student_images(run.config, run_images(run))
            training = assemble(StudentRole(Context(run, splits, torch.device("cpu"), Silent())))
            assert training.job is not None and training.job.source is not None
            source = training.job.source(training.job)
            assert isinstance(source, MadeSource) and source.images == 32
            batches = list(source.batches(0, 0, 16))
            assert [batch.step for batch in batches] == [0, 1]
            again = next(iter(source.batches(0, 1, 16)))
            assert torch.equal(again.images, batches[1].images) and torch.equal(again.labels, batches[1].labels)
            found[policy] = batches[0]
    assert torch.equal(found["none"].raw, found["crop"].raw)
    assert not torch.equal(found["none"].images, found["crop"].images)
    assert AgentConfig(policy="none").policy == "none"
