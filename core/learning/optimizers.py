"""Optimisers: one step of the weights along a gradient, or along a sum of contributions.

The parameter server can only subtract what participants send: plain SGD. Momentum (Sutskever
et al., ICML 2013, equations 1 and 2) and Adam (Kingma and Ba, ICLR 2015, algorithm 1) run at
the participants, on the gradient sum that the server released; everyone holds the same state.
"""

import logging
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dtl.core.errors import DtlError, FormatError, NumericError, UsageError
from dtl.core.files.atomic import remove_second_names
from dtl.core.files.headers import check_same_shapes
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger
from dtl.core.files.tensor_writer import Unnamed, unnamed_arrays
from dtl.core.files.tensors import (
    Loaded,
    PlainMetadata,
    load_arrays,
    make_layout,
    read_arrays,
)
from dtl.core.learning.mlp import DTYPE, Weights
from dtl.core.roles.participant import stepping

logger = logging.getLogger("dtl")

MOMENTUM = 0.9
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
STATE_DTYPE = "F64"


class Optimizer(Protocol):
    """Turns gradients into steps; `state` is what it remembers, as named arrays of float64."""

    state: Weights

    def step(self, weights: Weights, gradient: Weights) -> Weights:
        """Return the weights after one step; the state moves on."""
        ...


@dataclass
class Sgd:
    """w <- w - lr g."""

    lr: float
    state: Weights = field(default_factory=dict)

    def step(self, weights: Weights, gradient: Weights) -> Weights:
        """Return the weights after one step."""
        return {name: weights[name] - self.lr * gradient[name] for name in weights}


@dataclass
class Momentum:
    """v <- 0.9 v + g, w <- w - lr v."""

    lr: float
    state: Weights = field(default_factory=dict)

    def step(self, weights: Weights, gradient: Weights) -> Weights:
        """Return the weights after one step; the state holds v."""
        velocity = self.state or {name: np.zeros_like(array) for name, array in weights.items()}
        self.state = {name: MOMENTUM * velocity[name] + gradient[name] for name in weights}
        return {name: weights[name] - self.lr * self.state[name] for name in weights}


@dataclass
class Adam:
    """Steps of lr, scaled by running means of the gradient and of its square."""

    lr: float
    state: Weights = field(default_factory=dict)

    def step(self, weights: Weights, gradient: Weights) -> Weights:
        """Return the weights after one step; the state holds both means and the step count."""
        held, steps = self.state, float(self.state.get("steps", np.zeros(1))[0]) + 1
        if held and not (_counted(steps - 1) and _all_positive(held, "square.")):
            raise ValueError("no steps lead to this state")
        state, stepped = {"steps": np.array([steps])}, {}
        for name, array in weights.items():
            zeros = np.zeros_like(array)
            mean = BETA_1 * held.get(f"mean.{name}", zeros) + (1 - BETA_1) * gradient[name]
            square = BETA_2 * held.get(f"square.{name}", zeros) + (1 - BETA_2) * gradient[name] ** 2
            unbiased = np.sqrt(square / (1 - BETA_2**steps)) + EPSILON
            stepped[name] = array - self.lr * mean / (1 - BETA_1**steps) / unbiased
            state |= {f"mean.{name}": mean, f"square.{name}": square}
        self.state = state
        return stepped


def _counted(steps: float) -> bool:
    return steps >= 1 and steps.is_integer()


def _all_positive(arrays: Weights, prefix: str) -> bool:
    return all((a >= 0).all() for name, a in arrays.items() if name.startswith(prefix))


_KINDS: dict[str, type[Sgd | Momentum | Adam]] = {"sgd": Sgd, "momentum": Momentum, "adam": Adam}
NAMES = tuple(_KINDS)


def make_optimizer(name: str, lr: float, state: Weights | None = None) -> Optimizer:
    """The optimiser of that name; UsageError when there is none."""
    if name not in _KINDS:
        raise UsageError(f"--optimizer: expected {', '.join(NAMES)}, found {name}")
    return _KINDS[name](lr, state or {})


@dataclass(frozen=True)
class StateFiles:
    """What an optimiser remembered before a step (None: nothing yet), and where it goes after."""

    before: Path | None
    after: Path | None


@dataclass(frozen=True)
class Recording:
    """In whose ledger a step is recorded; `adopt` names whose model is taken over instead."""

    key: Key
    adopt: str | None = None


def apply_sum(
    total: Path,
    model: Path,
    output: Path,
    optimizer: Optimizer,
    state: StateFiles,
    force: bool,
    recording: Recording | None = None,
) -> PlainMetadata:
    """Write the model after one step along a released sum; returns what it says of itself.

    The new model is named by the sum: uploads based on it say which sum was applied, and
    their masks cancel only if everybody applied the same. With `recording`, sum and model are
    held against the participant's ledger, and the new model's content is recorded there: only
    then encrypt-grads accepts it as a base. Both files are finished before the ledger line,
    the state, and then the model, get their names; where only the state that follows is there,
    an interrupted step is completed. Raises FormatError for files that do not belong together,
    UsageError for a state that would be lost, NumericError for a step out of all range.
    """
    if state.after is not None and _same_place(state.after, output, state.before):
        raise UsageError(f"{state.after}: the new state needs a file of its own")
    added, before = load_arrays(total), load_arrays(model)
    metadata = added.metadata
    if metadata is None or metadata.kind != "sum":
        raise FormatError(f"{total}: expected a sum that open-model wrote")
    adopt = recording.adopt if recording else None
    if adopt is None:
        _check_precedes(before.metadata, metadata, model, total)
    found, expected = (make_layout(held.arrays, DTYPE) for held in (added, before))
    check_same_shapes(found, expected, total, model)
    for loaded in (added, before):
        loaded.check_content()
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(recording.key)) if recording else None
        opened = stepping.opened_sum(ledger, added) if ledger else None
        if ledger and opened and adopt is None:
            stepping.check_model_before(ledger, opened, before)
        if recording and adopt is not None:
            stepping.check_adopted(recording.key.job, adopt, added, before)
            stepped = before.arrays
        else:
            stepped = _step(before, added, optimizer, state)
        named = metadata.model_copy(update={"kind": "weights"})
        outputs = _state_outputs(state.after, optimizer.state, force)
        outputs.append(unnamed_arrays(output, stepped, DTYPE, named, force))
        entered = [stack.enter_context(unnamed) for unnamed in outputs]
        for finished in entered:
            finished.output.sync()
        content = entered[-1].content
        if ledger and opened:
            stepping.record_model(ledger, opened, content, adopt)
        for finished in entered:
            finished.output.commit()
    return named.model_copy(update={"content": content})


def _state_outputs(
    after: Path | None, held: Weights, force: bool
) -> list[AbstractContextManager[Unnamed]]:
    """The file of the optimiser's state, unless there is none or it is there already."""
    if after is None or not held:
        return []
    if not force and _holds(after, held):
        remove_second_names(after)
        return []
    return [unnamed_arrays(after, held, STATE_DTYPE, None, force)]


def _step(before: Loaded, added: Loaded, optimizer: Optimizer, state: StateFiles) -> Weights:
    """The weights after one step of the optimiser, whose state moves on."""
    weights, known, model = before.arrays, before.metadata, before.path
    if state.before is not None:
        optimizer.state = read_arrays(state.before)[0]
    elif known is not None and known.round and not isinstance(optimizer, Sgd):
        logger.warning(
            "no --state, although %s is of round %d: %s begins anew",
            *(model, known.round, type(optimizer).__name__.lower()),
        )
    remembered, fits = _shapes(optimizer), False
    # A state that does not fit is noticed by what it raises; numbers without end, below.
    with suppress(LookupError, TypeError, ValueError), np.errstate(all="ignore"):
        stepped = optimizer.step(weights, added.arrays)
        fits = state.before is None or remembered == _shapes(optimizer)
    if not fits:
        raise FormatError(f"{state.before}: not the state of this optimizer, for this model")
    if not _fit(stepped, np.float32) or not _fit(optimizer.state, np.float64):
        raise NumericError(f"{model}: the step leaves the range of {DTYPE}", "take a smaller --lr")
    return stepped


def _check_precedes(
    known: PlainMetadata | None, added: PlainMetadata, model: Path, total: Path
) -> None:
    """Raise FormatError for a model that the sum cannot be for, by what it says of itself."""
    if known is None:
        return
    if known.kind != "weights":
        raise FormatError(f"{model}: expected weights, found {known.kind}")
    if known.round >= added.round:
        raise FormatError(
            f"{model}: expected a model of a round before {added.round}, that of {total}, "
            f"found one of round {known.round}",
            "it has this sum in it already, or a later one: name the model before it",
        )


def _same_place(path: Path, *others: Path | None) -> bool:
    return path.resolve() in [other.resolve() for other in others if other is not None]


def _shapes(optimizer: Optimizer) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in optimizer.state.items()}


def _fit(arrays: Weights, dtype: type[np.floating[Any]]) -> bool:
    """Whether all values are finite in this dtype."""
    return all((np.abs(array) <= np.finfo(dtype).max).all() for array in arrays.values())


def _holds(path: Path, arrays: Weights) -> bool:
    """Whether a file holds exactly these arrays."""
    with suppress(DtlError):
        found, _ = read_arrays(path)
        return found.keys() == arrays.keys() and all(
            np.array_equal(found[name], array) for name, array in arrays.items()
        )
    return False
