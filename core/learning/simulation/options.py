"""What a simulation is asked to do: everything that its outcome depends on but the keys."""

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dtl import datasets
from dtl.core import defaults
from dtl.core.crypto.primitives import hash_fields
from dtl.core.encoding.fixed_point import Rounding, Stochastic, nearest
from dtl.core.errors import UsageError
from dtl.core.files.job_file import MAX_PARTICIPANTS
from dtl.core.learning.mlp import LocalTraining, check_hidden, check_seed
from dtl.core.learning.optimizers import Optimizer, make_optimizer
from dtl.core.learning.split import SplitOptions
from dtl.core.roles.key_center import JobOptions

_NAMES = ["alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy"]


class SimulationOptions(BaseModel):
    """Options of `dtl simulate`; `check` raises UsageError for what cannot work."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    participants: tuple[str, ...]
    rounds: int
    hidden: tuple[int, ...] = defaults.SIMULATION_HIDDEN
    local_epochs: int = defaults.SIMULATION_EPOCHS
    batch_size: int | None = None
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    lr: float | None = None
    local_lr: float | None = None
    weights: Literal["samples", "equal"] = "samples"
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    drop: float = 0.0
    alpha: float | None = None
    test: float = defaults.TEST_SHARE
    seed: int = defaults.SEED
    modulus_bits: int = defaults.MODULUS_BITS
    slot_bits: int = defaults.SLOT_BITS
    fraction_bits: int = defaults.FRACTION_BITS
    min_contributors: int = defaults.MIN_CONTRIBUTORS
    cipher: Literal["lattice", "direct"] = "lattice"
    insecure: bool = False

    def check(self) -> None:
        """Raise UsageError for options that cannot work, alone or together."""
        if self.rounds < 1:
            raise UsageError(f"--rounds: expected at least 1, found {self.rounds}")
        if not 0 <= self.drop < 1:
            raise UsageError(f"--drop: expected a probability below 1, found {self.drop}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"--lr: expected a positive number, found {self.lr}")
        if self.drop and not self.server_keeps_model:
            raise UsageError(
                f"--drop: not with --optimizer {self.optimizer}",
                "participants who keep the model themselves must see every sum; "
                "with --optimizer sgd the server keeps it, encrypted",
            )
        if self.local_lr is not None and (self.server_keeps_model or not self.local_epochs):
            raise UsageError(
                "--local-lr: only with --local-epochs and --optimizer momentum or adam",
                "with --optimizer sgd, --lr is that of the local epochs",
            )
        check_seed(self.seed)
        check_hidden(self.hidden)
        self.job.check()
        self.training(1, self.participants[0])

    @property
    def server_keeps_model(self) -> bool:
        """Whether the server updates an encrypted model; else it only adds gradients up."""
        return self.optimizer == "sgd"

    @property
    def step_lr(self) -> float:
        """What the optimiser multiplies a sum of contributions with."""
        if self.server_keeps_model and self.local_epochs:
            return 1.0  # the local epochs have taken their steps at that rate already
        return self.rate

    @property
    def rate(self) -> float:
        """The learning rate: --lr, or its default."""
        return defaults.SIMULATION_LR[self.optimizer] if self.lr is None else self.lr

    @property
    def upload_lr(self) -> float:
        """What a participant scales its upload with: the server cannot scale anything."""
        return self.step_lr if self.server_keeps_model else 1.0

    def make_optimizer(self) -> Optimizer:
        """A fresh optimiser."""
        return make_optimizer(self.optimizer, self.step_lr)

    @property
    def job(self) -> JobOptions:
        """What keygen is asked for."""
        return JobOptions(
            participants=self.participants,
            modulus_bits=self.modulus_bits,
            slot_bits=self.slot_bits,
            fraction_bits=self.fraction_bits,
            min_contributors=self.min_contributors,
            masks=True,
            cipher=self.cipher,
            insecure=self.insecure,
        )

    @property
    def split(self) -> SplitOptions:
        """What split-data is asked for."""
        return SplitOptions(self.participants, self.test, self.alpha, self.seed)

    def training(self, number: int, name: str) -> LocalTraining:
        """How `name` trains in a round; everyone shuffles differently, and repeatably."""
        lr = None
        if self.local_epochs:
            own = defaults.LOCAL_LR if self.local_lr is None else self.local_lr
            lr = self.rate if self.server_keeps_model else own
        seed = int.from_bytes(self._hash("training", number, name)[:4], "little")
        return LocalTraining(self.local_epochs, self.batch_size, lr, seed)

    def rounding_seed(self, number: int, name: str) -> str:
        """The text that fixes the rounding of one upload."""
        return self._hash("rounding", number, name).hex()[:32]

    def rounding_of(self, number: int, name: str) -> Rounding:
        """The rounding of one upload."""
        if self.rounding == "nearest":
            return nearest
        return Stochastic.from_text(self.rounding_seed(number, name))

    def is_present(self, number: int, name: str) -> bool:
        """Whether `name` takes part in a round: not so with probability `drop`."""
        chance = int.from_bytes(self._hash("presence", number, name)[:8], "little") / 2.0**64
        return chance >= self.drop

    def _hash(self, purpose: str, number: int, name: str) -> bytes:
        """Repeatable choices, from the seed: never for anything secret."""
        return hash_fields("dtl/v2/simulation", purpose, str(self.seed), str(number), name)


def participant_names(text: str) -> tuple[str, ...]:
    """The roster for `--participants`: a number, or names separated by commas."""
    text = text.strip()
    if text.isascii() and text.isdecimal():
        digits = text.lstrip("0")
        if len(digits) > len(str(MAX_PARTICIPANTS)) or int(digits or 0) > MAX_PARTICIPANTS:
            raise UsageError(f"--participants: at most {MAX_PARTICIPANTS}")
        count = int(digits or 0)
        if count <= len(_NAMES):
            return tuple(_NAMES[:count])
        return tuple(f"p{number:0{len(text)}}" for number in range(1, count + 1))
    return tuple(name.strip() for name in text.split(","))


def source_name(text: str) -> str:
    """A data set as it is remembered: a name, or the absolute path of a file."""
    return text if text in datasets.NAMES else str(Path(text).absolute())
