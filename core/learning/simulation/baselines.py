"""What an encrypted run is held against, on the same shards and with the same contributors.

The *twin* trains in fixed point without encryption: its integers must be those of the opened
model, every one, in every round. The others show what encryption and joining forces change:
training in float64 without rounding, on the pooled data, and everyone alone.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dtl.core.encoding.fixed_point import FixedPoint
from dtl.core.errors import NumericError
from dtl.core.files.shards import Shard
from dtl.core.files.tensors import VectorDigest, from_reals, make_layout, to_reals
from dtl.core.learning import mlp
from dtl.core.learning.mlp import Weights
from dtl.core.learning.optimizers import Optimizer
from dtl.core.learning.simulation.options import SimulationOptions

Integers = dict[str, NDArray[np.int64]]
CENTRAL = "central"


@dataclass
class Learner:
    """Weights in float64, and the optimiser that moves them."""

    weights: Weights
    optimizer: Optimizer

    def step(self, gradient: Weights) -> None:
        """Move along a gradient, or a sum of contributions."""
        self.weights = self.optimizer.step(self.weights, gradient)

    def step_alone(self, gradient_at: Callable[[Weights], Weights]) -> None:
        """Train on by oneself; one that diverges keeps its last weights, and its bad score."""
        with suppress(NumericError):
            self.step(gradient_at(self.weights))


class Baselines:
    """The unencrypted runs; `advance` moves all of them by one round."""

    def __init__(
        self,
        options: SimulationOptions,
        initial: Weights,
        shards: Mapping[str, Shard],
        shares: Mapping[str, float],
    ) -> None:
        self._options, self._shares = options, shares
        self._shards = {name: shards[name] for name in options.participants}
        self.twin = Twin(options, initial)
        self.float = Learner(initial, options.make_optimizer())
        self.central = Learner(initial, options.make_optimizer())
        self.alone = {n: Learner(initial, options.make_optimizer()) for n in options.participants}
        self._pooled = Shard(
            np.concatenate([shard.x for shard in self._shards.values()]),
            np.concatenate([shard.y for shard in self._shards.values()]),
            next(iter(self._shards.values())).classes,
        )

    def advance(self, number: int, contributors: tuple[str, ...]) -> str | None:
        """One round; returns the digest V of the twin's integers, None where it was void.

        A void round changes nothing for those who train together. Alone, and on pooled data,
        training goes on in every round.
        """
        for name, learner in self.alone.items():
            learner.step_alone(partial(self._gradient, number, name, self._shards[name]))
        self.central.step_alone(partial(self._gradient, number, CENTRAL, self._pooled))
        if not contributors:
            return None
        total: Weights = {}
        for name in contributors:
            gradient = self._gradient(number, name, self._shards[name], self.float.weights)
            for tensor, array in gradient.items():
                total[tensor] = total.get(tensor, 0) + self._shares[name] * array
        self.float.step(total)
        weights = self.twin.weights
        return self.twin.advance(
            number,
            {n: self._gradient(number, n, self._shards[n], weights) for n in contributors},
            self._shares,
        )

    def _gradient(self, number: int, name: str, data: Shard, weights: Weights) -> Weights:
        return mlp.local_update(weights, data, self._options.training(number, name), name)


@dataclass
class Twin:
    """The same training in fixed point, on plain integers: PROTOCOL.md, section 5."""

    options: SimulationOptions
    initial: Weights
    clamped: int = 0
    _integers: Integers = field(default_factory=dict)
    _kept: Learner | None = None

    def __post_init__(self) -> None:
        o = self.options
        self._fixed_point = FixedPoint(o.slot_bits, o.fraction_bits, len(o.participants))
        self.weights = self.initial  # the first round trains on them as given, not as encoded
        if o.server_keeps_model:
            encode = self._fixed_point.encode_weights
            self._integers = {name: encode(array) for name, array in self.initial.items()}
        else:
            self._kept = Learner(self.initial, o.make_optimizer())

    def advance(
        self, number: int, gradients: Mapping[str, Weights], shares: Mapping[str, float]
    ) -> str:
        """Add up contributions as integers; returns the digest V of the result."""
        total: Integers = {name: np.zeros(a.shape, np.int64) for name, a in self.initial.items()}
        for name, gradient in gradients.items():
            for tensor, integers in self._encode(number, name, gradient, shares[name]).items():
                total[tensor] += integers
        decode = self._fixed_point.decode
        if self._kept is None:
            self._integers = {name: self._integers[name] - total[name] for name in total}
            result = self._integers
            self.weights = _as_stored({name: decode(array) for name, array in result.items()})
        else:
            result = total
            self._kept.step(_as_stored({name: decode(array) for name, array in total.items()}))
            self.weights = self._kept.weights = _as_stored(self._kept.weights)
        return self._digest(result)

    def _encode(self, number: int, name: str, gradient: Weights, share: float) -> Integers:
        """A contribution as integers; values are numbered through in packing order."""
        rounding = self.options.rounding_of(number, name)
        encoded, start = {}, 0
        for spec in make_layout(gradient, mlp.DTYPE):
            stored = _as_stored({spec.name: gradient[spec.name]})[spec.name]
            integers, clamped = self._fixed_point.encode_step(
                stored.ravel(), share * self.options.upload_lr, rounding, start
            )
            encoded[spec.name] = integers.reshape(stored.shape)
            start += integers.size
            self.clamped += clamped
        return encoded

    def _digest(self, integers: Integers) -> str:
        layout = make_layout(self.initial, mlp.DTYPE)
        values = sum(spec.values for spec in layout)
        state = VectorDigest(layout, values, self._fixed_point.slot_bits)
        for spec in layout:
            state.update(integers[spec.name].ravel())
        return state.hexdigest()


def _as_stored(arrays: Weights) -> Weights:
    """Arrays as they come back from a file: in single precision."""
    return {
        name: to_reals(from_reals(array.ravel(), mlp.DTYPE), mlp.DTYPE).reshape(array.shape)
        for name, array in arrays.items()
    }
