"""Augmentation agents: typed policies and schedules, their files, and the batched engine that applies them."""

from qkd.agents.agent import POLICIES, Agent, build_agent
from qkd.agents.policies.policy import PBA_OPERATIONS, Op, Policy, Schedule, Segment
from qkd.agents.policies.schedule_file import (
    ScheduleError,
    ScheduleFile,
    load_schedule,
    read_schedule_file,
    save_schedule,
)

__all__ = [
    "Agent",
    "Op",
    "PBA_OPERATIONS",
    "POLICIES",
    "Policy",
    "Schedule",
    "ScheduleError",
    "ScheduleFile",
    "Segment",
    "build_agent",
    "load_schedule",
    "read_schedule_file",
    "save_schedule",
]
