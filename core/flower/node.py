"""A participant's node: opens the base, trains, encrypts; reveals masks. It knows no engine.

Everything of the participant's own is named in the configuration of its node, never in that of
the run: its key, its shard, its folder, and the function that trains.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_bytes
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dtl.core.encoding.fixed_point import Rounding, Stochastic
from dtl.core.errors import FormatError, UsageError
from dtl.core.files.atomic import machine_errors, write_file
from dtl.core.files.container import is_container
from dtl.core.files.key_file import Key, read_passphrase
from dtl.core.files.tensor_writer import write_arrays
from dtl.core.files.tensors import load_weights, open_tensors, weights_metadata
from dtl.core.flower import evidence
from dtl.core.learning import mlp
from dtl.core.public.verification import Evidence
from dtl.core.roles import participant

Arrays = dict[str, np.ndarray[Any, Any]]
_DTYPE = "F64"  # of gradients: what training took away, exactly


@dataclass(frozen=True)
class UpdateContext:
    """What a user's `local_update(arrays, context)` is told besides the arrays.

    `settings` are those of the run and of the node; the node's count where both name one.
    """

    participant: str
    round: int
    data: Path
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Node:
    """A participant's node: its key, and what its configuration names."""

    key: Key
    folder: Path
    own: Mapping[str, Any]
    settings: Mapping[str, Any]

    @classmethod
    def load(cls, own: Mapping[str, Any], run: Mapping[str, Any]) -> "Node":
        """The node of a configuration of its own, in a run with settings for all.

        Raises UsageError when its configuration does not name what it must.
        """
        missing = [name for name in ("key", "data", "folder") if name not in own]
        if missing:
            raise UsageError(f"the node's configuration does not name {', '.join(missing)}")
        path, folder = Path(str(own["key"])), Path(str(own["folder"]))
        job = Path(str(own.get("job", path.with_name("job.json"))))
        key = Key.load(path, job, lambda: _passphrase(own))
        key.require("participant")
        with machine_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(key, folder, own, {**run, **own})

    def contribute(
        self, number: int, base: bytes, along: Mapping[str, bytes] | None = None
    ) -> bytes:
        """The upload for a round on a base: a release, or initial weights.

        `along` are the files that a release can be recomputed from: see `evidence`.
        """
        upload = self.folder / f"round-{number}.upload"
        if not upload.exists():
            model = self._open(base, along or {})
            gradients = self.folder / "gradients.safetensors"
            self._train(number, model, gradients)
            options = participant.UploadOptions(
                rounding=self._rounding(number),
                weight=self.own.get("weight"),
                round=number,
                model=model,
                accept_differencing=bool(self.own.get("accept-differencing", False)),
            )
            participant.encrypt_gradients(self.key, gradients, upload, options)
            gradients.unlink()
        return upload.read_bytes()

    def reveal(self, number: int, close: bytes) -> bytes:
        """The reveal that answers a close file."""
        asked, reveal = (self.folder / f"round-{number}.{end}" for end in ("close", "reveal"))
        write_file(asked, close, force=True)
        participant.reveal_masks(self.key, asked, reveal, force=True)
        return reveal.read_bytes()

    def receive(self, release: bytes, along: Mapping[str, bytes] | None = None) -> None:
        """Open a release into the folder: model.safetensors."""
        self._open(release, along or {})

    def _open(self, base: bytes, along: Mapping[str, bytes]) -> Path:
        """Open a release, or check initial weights; returns the file of the model.

        After an attempt that did not open, no other release is tried: only a person can decide
        that, with `open-model --after-failure`, so nothing here passes `after_failure`.
        """
        received, opened = self.folder / "base", self.folder / "model.safetensors"
        write_file(received, base, force=True)
        if is_container(received):
            with self._evidence(along) as found:
                options = participant.OpenOptions(evidence=found)
                participant.open_release(self.key, received, opened, options, force=True)
            return opened
        source = open_tensors(received)
        try:
            if weights_metadata(source).round:
                raise FormatError("expected a release or initial weights, found an opened model")
        finally:
            source.close()
        return received

    @contextmanager
    def _evidence(self, along: Mapping[str, bytes]) -> Iterator[Evidence | None]:
        """What came along, as files, where this node recomputes what it opens; else None.

        Raises UsageError where it is to recompute and was sent no upload.
        """
        if not self.own.get("recompute", False):
            yield None
            return
        if not any(name.startswith(evidence.UPLOAD) for name in along):
            raise UsageError(
                "the node's configuration says recompute, but the server sent no uploads",
                "dtl flower-config --send-uploads",
            )
        with TemporaryDirectory(prefix=".along-", dir=self.folder) as folder:
            yield evidence.write(Path(folder), along)

    def _train(self, number: int, model: Path, gradients: Path) -> None:
        """Write what training took from the weights, by the user's function or dtl's own."""
        data = Path(str(self.own["data"]))
        place = self.own.get("local-update")
        if place is None:
            training = mlp.LocalTraining(
                epochs=int(self.settings.get("local-epochs", 1)),
                batch_size=self.settings.get("batch-size"),
                lr=self.settings.get("local-lr"),
                seed=int(self.settings.get("seed", 0)),
            )
            mlp.compute_gradients(model, data, gradients, training, force=True)
            return
        before, metadata = load_weights(model)
        told = UpdateContext(self.key.name, number, data, self.settings)
        after = load_function(str(place))({n: a.copy() for n, a in before.items()}, told)
        if {n: np.shape(a) for n, a in after.items()} != {n: a.shape for n, a in before.items()}:
            raise UsageError(f"{place}: expected arrays of the names and shapes that it was given")
        taken = {
            name: array - np.asarray(after[name], np.float64) for name, array in before.items()
        }
        # Base, opened and content of what was read: the ledger is asked about these very tensors.
        based = metadata.model_copy(update={"kind": "gradients"})
        write_arrays(gradients, taken, _DTYPE, based, force=True)

    def _rounding(self, number: int) -> Rounding:
        seed = self.own.get("rounding-seed")
        if seed is None:
            return Stochastic(token_bytes(32))
        return Stochastic.from_text(f"{seed}-{self.key.name}-{number}")


def load_function(place: str) -> Callable[[Arrays, UpdateContext], Arrays]:
    """The function that FILE.py:NAME names; UsageError when there is none."""
    file, _, name = place.rpartition(":")
    spec = importlib.util.spec_from_file_location("dtl_local_update", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise UsageError(f"local-update: expected FILE.py:FUNCTION, found {place}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{file}: no function {name}")
    found: Callable[[Arrays, UpdateContext], Arrays] = function
    return found


def _passphrase(own: Mapping[str, Any]) -> bytes:
    if "passphrase-file" not in own:
        raise UsageError("the key is boxed: the node's configuration must name passphrase-file")
    return read_passphrase(Path(str(own["passphrase-file"])))
