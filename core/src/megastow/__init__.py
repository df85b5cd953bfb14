"""megastow: stow a Megatron trainer's GPU memory in host memory between phases, and bring it back bit for bit."""

from importlib.metadata import PackageNotFoundError, version

from megastow.disk import DiskSpace
from megastow.errors import (
    AdapterSelectionError,
    AgreementError,
    CorruptionError,
    DeviceMemoryError,
    ForkedProcessError,
    HostMemoryError,
    InvalidArgumentError,
    InvalidTypeError,
    ManagerClosedError,
    MegastowError,
    NotOnHostError,
    OffloadedError,
    PeerError,
    ReadOnlyError,
    ResidueError,
    StateChangedError,
    TransferError,
    UnsupportedLayoutError,
    UnsupportedTensorError,
)
from megastow.factory import create_memory_manager, create_trainer_memory_manager
from megastow.handle import TransferHandle
from megastow.machine import HostLimits
from megastow.manager import MemoryManager
from megastow.megatron import MegatronInfo, detect_megatron
from megastow.plan import KindPlan, MovePlan
from megastow.read_only import ReadOnlyTensor
from megastow.referrers import Owner
from megastow.report import KindReport, MemoryFigures, TransferReport
from megastow.residue import LeftStorage, LeftTensor, OpenSegment, Residue
from megastow.state import Residency, StateKind
from megastow.swap import swap
from megastow.tiers import Tier

try:
    __version__ = version("megastow")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AdapterSelectionError",
    "AgreementError",
    "CorruptionError",
    "DeviceMemoryError",
    "DiskSpace",
    "ForkedProcessError",
    "HostLimits",
    "HostMemoryError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "KindPlan",
    "KindReport",
    "LeftStorage",
    "LeftTensor",
    "ManagerClosedError",
    "MegastowError",
    "MegatronInfo",
    "MemoryFigures",
    "MemoryManager",
    "MovePlan",
    "NotOnHostError",
    "OffloadedError",
    "OpenSegment",
    "Owner",
    "PeerError",
    "ReadOnlyError",
    "ReadOnlyTensor",
    "Residency",
    "Residue",
    "ResidueError",
    "StateChangedError",
    "StateKind",
    "Tier",
    "TransferError",
    "TransferHandle",
    "TransferReport",
    "UnsupportedLayoutError",
    "UnsupportedTensorError",
    "create_memory_manager",
    "create_trainer_memory_manager",
    "detect_megatron",
    "swap",
]
