"""Sections of the schema for the stages around training, and for federated training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from export import defaults
from export.moved import OldFields
from export.targets.table import Target, find_target
from qkd.config.sections import (
    MOST_MEMBERS,
    MOST_WORKERS,
    BatchSize,
    Cpu,
    Epochs,
    Fraction,
    Images,
    NonNegative,
    Optimizer,
    Positive,
    Section,
    Threads,
    UserPath,
)


class SearchConfig(Section):
    """The population search of an agent, for each role whose policy is ``search``."""

    members: Annotated[int, Field(ge=2, le=MOST_MEMBERS)] = Field(16, description="size of the population")
    epochs: Epochs = Field(200, description="each member's passes over the search's training images")
    interval_epochs: Epochs = Field(3, description="epochs between two exploit-and-explore points")
    train_images: Images = Field(4000, description="at most this many training images (stratified, seeded)")
    val_images: Images | None = Field(
        None,
        description="images that score a member, taken from the training images; default: the run's validation images",
    )
    compat: Literal["correct", "weights_only"] = Field(
        "correct",
        description="what a member copies from a better one: correct: the whole state; weights_only: as "
        "released, trained weights but neither optimizer state nor batch-norm statistics",
    )
    engine: Literal["local", "ray"] = Field("local", description="local: in this process; ray: Ray Tune (extra [ray])")
    workers: Annotated[int, Field(ge=1, le=MOST_WORKERS)] = Field(
        2, description="ray: members that train at the same time"
    )
    gpus_per_worker: NonNegative = Field(0.0, description="ray: share of a GPU that a worker gets")
    address: str | None = Field(None, description="ray: cluster to join, e.g. auto; default: a new one on this machine")
    worker_failures: Annotated[int, Field(ge=0, le=1000)] = Field(
        3, description="ray: how many lost workers a member survives"
    )

    @model_validator(mode="after")
    def _has_a_perturbation(self) -> SearchConfig:
        if self.interval_epochs >= self.epochs:
            raise ValueError(
                f"`interval_epochs` must be less than `epochs`, or no policy would ever be explored, "
                f"got {self.interval_epochs} of {self.epochs}"
            )
        return self


_READ_BY = {  # keys that not every strategy reads
    "proximal": ("fedprox",),
    "class_weight": ("feddistill",),
    "latent_weight": ("fedgen",),
    "latent_decay": ("fedgen",),
    "generator_steps": ("fedgen",),
    "generator_lr": ("fedgen",),
    "generator_decay": ("fedgen",),
    "noise": ("fedgen",),
}
MOST_CLIENTS = 100_000


class FederatedConfig(Section):
    """Training by clients that keep their images, instead of with a teacher (`qkd federate`)."""

    strategy: Literal["fedavg", "fedprox", "feddistill", "fedgen"] = Field(
        "fedgen",
        description="fedavg: average weights; fedprox: keep clients near the average; feddistill: also match "
        "the mean logits of each class; fedgen: also learn from a generator of latents, trained "
        "by the server",
    )
    clients: Annotated[int, Field(ge=1, le=MOST_CLIENTS)] = Field(
        10, description="number of clients that share the images"
    )
    alpha: Positive = Field(
        0.1,
        description="concentration of the Dirichlet draw that divides each class over the clients; small: "
        "each client has few classes",
    )
    least_images: Images = Field(2, description="minimum number of images per client")
    rounds: Epochs = Field(50, description="rounds of training; a low-bit run adds one of calibration before them")
    clients_per_round: Annotated[int, Field(ge=1, le=MOST_CLIENTS)] | None = Field(
        None, description="clients drawn for a round; default: all"
    )
    local_steps: Epochs = Field(20, description="steps of each client in a round, of data.batch_size images")
    precision: Literal["low_bit", "float"] = Field(
        "low_bit",
        description="low_bit: student.quant; float: the student's net without quantizers, from which a "
        "low-bit run can start",
    )
    upload: Literal["float", "codes"] = Field(
        "float",
        description="how a client sends low-bit weights: float: as shadow weights; codes: as codes and "
        "scales, which the server dequantizes and averages",
    )
    optimizer: Optimizer = Field(
        "sgd", description="the clients' optimizer, new in each round; sgd has Nesterov momentum"
    )
    lr: Positive = Field(0.01, description="learning rate of clients in the first round")
    lr_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="factor on the clients' learning rate per round"
    )
    momentum: Fraction = Field(0.9, description="Nesterov momentum, for sgd only")
    weight_decay: NonNegative = Field(0.0, description="weight decay of weights with at least two dimensions")
    scale_lr_factor: Positive = Field(1.0, description="learning rate of quantizer scales, as a factor of lr")
    clip_grad_norm: Positive | None = Field(None, description="largest gradient norm of a step")
    proximal: NonNegative = Field(0.01, description="fedprox: mu, the weight of the distance from the server's weights")
    class_weight: NonNegative = Field(1.0, description="feddistill: weight of the classes' mean logits")
    latent_weight: NonNegative = Field(10.0, description="fedgen: weight of the loss on latents in the first round")
    latent_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        0.98, description="fedgen: factor on latent_weight per round"
    )
    generator_steps: Epochs = Field(50, description="fedgen: generator steps per round")
    generator_lr: Positive = Field(3e-4, description="fedgen: learning rate of the generator (Adam)")
    generator_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        0.98, description="fedgen: factor on generator_lr per round"
    )
    noise: Images = Field(32, description="fedgen: size of the generator's noise vector")
    evaluate_every: Epochs = Field(
        1, description="rounds between evaluations: of test images by the server, of validation images by clients"
    )
    engine: Literal["local", "flower"] = Field(
        "local", description="local: in this process; flower: Flower's simulation on Ray (extra [flower])"
    )
    workers: Annotated[int, Field(ge=1, le=MOST_WORKERS)] = Field(
        2, description="flower: clients that train at the same time"
    )

    @model_validator(mode="after")
    def _clients_are_there(self) -> FederatedConfig:
        if self.clients_per_round is not None and self.clients_per_round > self.clients:
            raise ValueError(
                f"`clients_per_round` must be at most `clients`, got {self.clients_per_round} of {self.clients}"
            )
        if self.upload == "codes" and self.precision == "float":
            raise ValueError("`upload: codes` needs `precision: low_bit`: float weights have no codes")
        return self

    @model_validator(mode="after")
    def _keys_are_read(self) -> FederatedConfig:
        fields = type(self).model_fields
        unread = [
            key
            for key, strategies in _READ_BY.items()
            if self.strategy not in strategies and getattr(self, key) != fields[key].default
        ]
        if unread:
            raise ValueError(f"strategy `{self.strategy}` does not read {', '.join(map(repr, unread))}")
        return self


def _known_target(name: str | None) -> str | None:
    return name if name is None else find_target(name).name


class ExportConfig(OldFields, Section):
    """How the student is exported."""

    target: Annotated[str | None, AfterValidator(_known_target)] = Field(
        None,
        description="runtime that will run the student (`qkd ls targets`), such as openvino or "
        "onnxruntime>=1.17; decides flavor, pack, linear and opset; default: the installed ONNX "
        "Runtime",
    )
    flavor: Literal["ort", "qcdq", "qonnx"] = Field(
        "ort",
        description="ort: only student.onnx; qcdq, qonnx (FINN): an additional file; for other runtimes, see target",
    )
    pack: Literal["auto", "int8", "packed"] = Field("auto", description="storage of low-bit weights in student.onnx")
    linear: Literal["auto", "gemm", "matmul_nbits"] = Field(
        "auto", description="form of low-bit linear layers in student.onnx; auto: blocks of MatMulNBits for heavy ones"
    )
    strict: bool = Field(False, description="treat a layer that stays in float as an error instead of a warning")
    preprocess: Literal["outside", "inside"] = Field(
        "outside",
        description="outside: files take only normalized float32 images; inside: an additional file, "
        "student.uint8.onnx (flavor qcdq: student.qcdq.uint8.onnx), takes uint8 pixels and "
        "normalizes them itself",
    )
    layout: Literal["nhwc", "nchw"] = Field("nhwc", description="axis order of uint8 pixels: nhwc or nchw")

    @property
    def chosen_target(self) -> Target | None:
        """The target that ``target`` names, or None."""
        return None if self.target is None else find_target(self.target)

    @property
    def file_flavor(self) -> str:
        """Flavor of the file for the target; without one, ``flavor``."""
        return self.flavor if self.chosen_target is None else self.chosen_target.flavor

    @model_validator(mode="after")
    def _target_decides(self) -> ExportConfig:
        target = self.chosen_target
        if target is None:
            return self
        if "flavor" in self.model_fields_set and self.flavor not in ("ort", target.flavor):
            raise ValueError(f"`target: {target.name}` has flavor `{target.flavor}`; leave `flavor` out")
        if target.pack == "int8" and self.pack == "packed":
            raise ValueError(f"`target: {target.name}` takes weights as int8; leave `pack` out")
        if target.linear == "gemm" and self.linear == "matmul_nbits":
            raise ValueError(f"`target: {target.name}` has no MatMulNBits; leave `linear` out")
        return self

    @model_validator(mode="after")
    def _pixels_need_a_flavor(self) -> ExportConfig:
        if self.preprocess == "inside" and self.file_flavor == "qonnx":
            raise ValueError("`preprocess: inside` needs flavor `ort` or `qcdq`: readers of Quant nodes take floats")
        return self


class LogConfig(Section):
    """What is logged per epoch in the role's folder, in addition to metrics.jsonl."""

    csv: bool = Field(True, description="write metrics.csv, one line per epoch")
    tensorboard: bool = Field(False, description="write tensorboard/ (extra [tensorboard])")


def _as_names(value: object) -> object:
    """Split text such as ``cpu, lowbit`` into names; a list is returned as a tuple."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(","))
    return tuple(value) if isinstance(value, list) else value


ProviderNames = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_as_names)]


class BenchConfig(Section):
    """How latency is measured."""

    threads: Threads = Field(defaults.THREADS, description="intra-op threads")
    batch_size: BatchSize = Field(defaults.BATCH_SIZE, description="images per inference")
    warmup: Annotated[int, Field(ge=0, le=defaults.MOST_ROUNDS)] = Field(
        defaults.WARMUP, description="inferences before the clock starts"
    )
    rounds: Annotated[int, Field(ge=1, le=defaults.MOST_ROUNDS)] = Field(
        defaults.ROUNDS, description="timed inferences per model, interleaved"
    )
    on: tuple[str, ...] = Field(
        ("local",), min_length=1, description="local, ssh://[user@]host[:port], adb://SERIAL, or names of `devices`"
    )
    devices: UserPath | None = Field(
        None, description="devices file; default: ~/.config/qkd/devices.yaml, or else the shipped one"
    )
    providers: ProviderNames = Field(
        ("auto",),
        description="execution providers, one row each: cpu, lowbit or onnxruntime's names; auto: cpu, plus "
        "lowbit if the device gains from it and it takes part of the file",
    )
    affinity: tuple[Cpu, ...] = Field((), description="CPUs to pin the measurement to; empty: none")
    int8_baseline: bool = Field(False, description="also measure onnxruntime's static int8 of the float net")
    timeout_s: Positive = Field(defaults.TIMEOUT_S, description="longest duration of a command on a device, in seconds")
