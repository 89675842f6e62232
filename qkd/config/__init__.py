"""The schema of an experiment: every key of a config file, with its unit and its default."""

from qkd.config.data import AgentConfig, DataConfig, DomainConfig
from qkd.config.data_free import DataFreeConfig
from qkd.config.experiment import RunConfig, StudentConfig, TeacherConfig
from qkd.config.methods import (
    AdaptationConfig,
    AuxiliaryConfig,
    BranchTrainingConfig,
    PeerConfig,
    PeersConfig,
    RotationsConfig,
    SelfDistillationConfig,
    WidthConfig,
)
from qkd.config.sections import Cpu, Positive, Section, Threads
from qkd.config.stages import BenchConfig, ExportConfig, FederatedConfig, LogConfig, SearchConfig
from qkd.config.training import (
    DEFAULT_TERMS,
    LowBitConfig,
    MetaConfig,
    PhaseConfig,
    QuantConfig,
    StudentTrainConfig,
    TermConfig,
    TrainConfig,
)

__all__ = [
    "AdaptationConfig",
    "AgentConfig",
    "AuxiliaryConfig",
    "BenchConfig",
    "BranchTrainingConfig",
    "Cpu",
    "DEFAULT_TERMS",
    "DataConfig",
    "DataFreeConfig",
    "DomainConfig",
    "ExportConfig",
    "FederatedConfig",
    "LogConfig",
    "LowBitConfig",
    "MetaConfig",
    "PeerConfig",
    "PeersConfig",
    "PhaseConfig",
    "Positive",
    "QuantConfig",
    "RotationsConfig",
    "RunConfig",
    "SearchConfig",
    "Section",
    "SelfDistillationConfig",
    "StudentConfig",
    "StudentTrainConfig",
    "TeacherConfig",
    "TermConfig",
    "Threads",
    "TrainConfig",
    "WidthConfig",
]
