"""A multi-layer perceptron, trained by scikit-learn: weights, gradients, scores.

The gradient comes from scikit-learn's own step: plain SGD changes the weights by
-lr * gradient, so the gradient is what one full-batch step of lr 1 takes away. With local
epochs the same difference is the pseudo-gradient of FedAvg (McMahan et al., AISTATS 2017).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier

from dtl.core import defaults
from dtl.core.errors import FormatError, NumericError, UsageError
from dtl.core.files.atomic import PUBLIC_MODE
from dtl.core.files.shards import Shard, load_shard
from dtl.core.files.tensor_writer import write_arrays
from dtl.core.files.tensors import load_weights, make_initial_metadata, read_arrays

Weights = dict[str, NDArray[np.float64]]
WEIGHT, BIAS = "layer{}.weight", "layer{}.bias"
DTYPE = "F32"
_MAX_LAYER = 1 << 20
_NO_STEP = 1e-300  # a learning rate that changes no weight


@dataclass(frozen=True)
class LocalTraining:
    """How a participant trains: no `epochs` means the gradient at the given weights."""

    epochs: int = 0
    batch_size: int | None = None
    lr: float | None = None
    seed: int = defaults.SEED

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise UsageError(f"--local-epochs: expected a number from 0 on, found {self.epochs}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size: expected at least 1, found {self.batch_size}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise UsageError(f"--local-lr: expected a positive number, found {self.lr}")
        if not self.epochs and self.lr is not None:
            raise UsageError("--local-lr: only with --local-epochs")
        check_seed(self.seed)


def check_seed(seed: int) -> None:
    """Raise UsageError unless numpy can take the seed."""
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"--seed: expected 0 to 2^32 - 1, found {seed}")


def check_hidden(hidden: Sequence[int]) -> None:
    """Raise UsageError unless these can be the sizes of hidden layers."""
    if any(not 1 <= size <= _MAX_LAYER for size in hidden):
        raise UsageError(f"--hidden: expected layer sizes of 1 to {_MAX_LAYER}, such as 64,32")


def init_model(
    shard: Path, output: Path, hidden: Sequence[int], seed: int = 0, force: bool = False
) -> Weights:
    """Write fresh public initial weights for the shape of a shard."""
    check_seed(seed)
    check_hidden(hidden)
    data = load_shard(shard)
    network = _network(data, tuple(hidden), learning_rate_init=_NO_STEP, random_state=seed)
    weights = _single_precision(_weights_of(network))
    metadata = make_initial_metadata(weights, DTYPE)
    write_arrays(output, weights, DTYPE, metadata, force, PUBLIC_MODE)
    return weights


def compute_gradients(
    model: Path, shard: Path, output: Path, training: LocalTraining, force: bool = False
) -> Weights:
    """Write the gradient, or the pseudo-gradient of local epochs, of a model on a shard.

    The round, base and content of the model go along in the metadata.
    """
    weights, metadata = load_weights(model)
    gradients = local_update(weights, load_shard(shard), training, str(model))
    based = metadata.model_copy(update={"kind": "gradients"})
    write_arrays(output, gradients, DTYPE, based, force)
    return gradients


def local_update(weights: Weights, data: Shard, training: LocalTraining, what: str) -> Weights:
    """Return weights - trained weights: the gradient, or the pseudo-gradient of local epochs."""
    hidden = _hidden_of(weights, data, what)
    samples = len(data.x)
    if training.epochs:
        lr = defaults.LOCAL_LR if training.lr is None else training.lr
        batch = min(samples, training.batch_size or defaults.BATCH_SIZE)
    else:  # one step of lr 1 over the whole batch: the difference is the gradient itself
        lr = 1.0
        batch = samples
        if training.batch_size is not None and training.batch_size < samples:
            chosen = np.random.default_rng(training.seed).choice(
                samples, training.batch_size, replace=False
            )
            data, batch = data.subset(chosen), training.batch_size
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            network = _network(
                data,
                hidden,
                batch_size=batch,
                learning_rate_init=lr,
                random_state=training.seed,
                shuffle=training.epochs > 0,
            )
            network = _load(network, weights)
            for _ in range(training.epochs or 1):
                network.partial_fit(data.x, data.y)
        except ValueError:  # scikit-learn's own word for weights that are not finite
            raise _diverged() from None
        trained = _weights_of(network)
        difference = {name: weights[name] - trained[name] for name in weights}
    largest = np.finfo(np.float32).max
    if not all((np.abs(array) <= largest).all() for array in difference.values()):
        raise _diverged()
    return difference


def _diverged() -> NumericError:
    return NumericError("local training diverged", "take a smaller learning rate")


def evaluate(model: Path, shard: Path) -> tuple[float, float, int]:
    """(accuracy, cross-entropy loss, samples) of a model on a shard."""
    weights, metadata = read_arrays(model)
    if metadata is not None and metadata.kind != "weights":
        raise FormatError(f"{model}: expected a model, found {metadata.kind}")
    return score(weights, load_shard(shard), str(model))


def score(weights: Weights, data: Shard, what: str) -> tuple[float, float, int]:
    """(accuracy, cross-entropy loss, samples) of weights on samples."""
    hidden = _hidden_of(weights, data, what)
    network = _load(_network(data, hidden, learning_rate_init=_NO_STEP), weights)
    chances = network.predict_proba(data.x)
    accuracy = float(np.mean(chances.argmax(axis=1) == data.y))
    loss = float(log_loss(data.y, chances, labels=np.arange(len(data.classes))))
    return accuracy, loss, len(data.y)


def _network(data: Shard, hidden: tuple[int, ...], **options: object) -> MLPClassifier:
    """A network of scikit-learn's with its weights allocated (and drawn from random_state)."""
    network = MLPClassifier(
        hidden_layer_sizes=hidden,
        solver="sgd",
        momentum=0.0,
        nesterovs_momentum=False,
        learning_rate="constant",
        alpha=0.0,
        **options,
    )
    # scikit-learn allocates weights in a first fit only, so make one, of a single sample.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="Got `batch_size`")
        network.partial_fit(data.x[:1], data.y[:1], classes=np.arange(len(data.classes)))
    return network


def _weights_of(network: MLPClassifier) -> Weights:
    weights = {}
    for number, (matrix, bias) in enumerate(
        zip(network.coefs_, network.intercepts_, strict=True), 1
    ):
        weights[WEIGHT.format(number)] = np.array(matrix, np.float64)
        weights[BIAS.format(number)] = np.array(bias, np.float64)
    return weights


def _load(network: MLPClassifier, weights: Weights) -> MLPClassifier:
    layers = len(network.coefs_)
    network.coefs_ = [weights[WEIGHT.format(i)].copy() for i in range(1, layers + 1)]
    network.intercepts_ = [weights[BIAS.format(i)].copy() for i in range(1, layers + 1)]
    return network


def _hidden_of(weights: Weights, data: Shard, what: str) -> tuple[int, ...]:
    """The hidden layer sizes; FormatError unless the weights are an MLP for these samples."""
    layers = len(weights) // 2
    outputs = len(data.classes) if len(data.classes) > 2 else 1
    sizes = [data.x.shape[1]]
    for number in range(1, layers + 1):
        bias = weights.get(BIAS.format(number), np.empty(0))
        sizes.append(len(bias) if bias.ndim == 1 else 0)
    shapes = {
        name.format(number): shape
        for number in range(1, layers + 1)
        for name, shape in (
            (WEIGHT, (sizes[number - 1], sizes[number])),
            (BIAS, (sizes[number],)),
        )
    }
    if not layers or sizes[-1] != outputs or shapes != {n: a.shape for n, a in weights.items()}:
        raise FormatError(
            f"{what}: expected an MLP from {sizes[0]} features to {outputs} outputs",
            "this command knows only the networks that dtl init-model --data SHARD makes",
        )
    return tuple(sizes[1:-1])


def _single_precision(weights: Weights) -> Weights:
    return {name: array.astype(np.float32).astype(np.float64) for name, array in weights.items()}
