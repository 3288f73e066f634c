"""The server's Flower app: finds the participants' nodes, and leads the rounds.

A node that is registered under a name speaks for the participant of that name and for nobody
else. Nodes that are not registered say themselves for whom they speak; their uploads are signed
all the same, so that they cannot make up anything.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from dtl.core.errors import DtlError, QuorumError, UsageError
from dtl.core.files.atomic import machine_errors
from dtl.core.files.job_file import Job
from dtl.core.files.key_file import Key, read_passphrase
from dtl.core.flower import payload
from dtl.core.flower.rounds import (
    CONTRIBUTE,
    NOTHING,
    POLL_SECONDS,
    RELEASE,
    REVEAL,
    Conductor,
    Plan,
)

HELLO_SECONDS = 60.0
MESSAGE_TYPES = {
    CONTRIBUTE: "train.contribute",
    REVEAL: "query.reveal",
    RELEASE: "evaluate.release",
}
_HELLO = "query.hello"

logger = logging.getLogger("flwr.dtl")
app = ServerApp()


@dataclass
class Nodes:
    """The participants' nodes, by Flower's grid: a `Courier`."""

    grid: Grid
    job: Job
    timeout: float
    registered_only: bool
    _speaks_for: dict[int, str] = field(default_factory=dict)

    def ask(
        self,
        step: str,
        names: Collection[str],
        number: int,
        file: Path,
        along: Mapping[str, Path] = NOTHING,
    ) -> Iterator[tuple[str, bytes]]:
        """Send a file to the nodes of the named; yield (name, file) as answers come in."""
        nodes = {node: name for node, name in self._nodes().items() if name in names}
        absent = sorted(set(names) - set(nodes.values()))
        if absent:
            logger.info("round %d: not there: %s", number, ", ".join(absent))
        with machine_errors(file):
            more = {name: path.read_bytes() for name, path in along.items()}
            content = payload.pack(file.read_bytes(), more, round=number)
        for node, reply in self._exchange(MESSAGE_TYPES[step], content, nodes, self.timeout):
            if payload.is_failure(reply):
                logger.warning("round %d: %s: %s", number, step, _failed_at(nodes[node]))
                continue
            try:
                yield nodes[node], payload.file_of(reply)
            except DtlError as error:
                logger.warning("round %d: %s: %s: %s", number, nodes[node], step, error.message)

    def present(self) -> Collection[str]:
        """For whom nodes are there."""
        return set(self._nodes().values())

    def _nodes(self) -> dict[int, str]:
        """For whom the nodes that are there speak: one node each."""
        nodes = sorted(self.grid.get_nodes(), key=lambda info: info.last_activated_at)
        here = {info.node_id: info.name for info in nodes}
        strangers = [node for node in here if node not in self._speaks_for]
        for node in strangers:
            if here[node] or self.registered_only:
                self._speaks_for[node] = here[node]
        unknown = [node for node in strangers if node not in self._speaks_for]
        for node, reply in self._exchange(_HELLO, payload.pack(round=0), unknown, HELLO_SECONDS):
            if payload.is_failure(reply):
                logger.warning("%s", _failed_at(f"node {node}"))
                continue
            try:
                self._speaks_for[node] = payload.file_of(reply).decode("ascii", "replace")
            except DtlError as error:
                logger.warning("node %d: %s", node, error.message)
        found: dict[str, int] = {}
        for node in here:  # the last one counts: one that was killed may still be listed
            name = self._speaks_for.get(node, "")
            if self.job.participant(name) is not None:
                found[name] = node
        return {node: name for name, node in found.items()}

    def wait(self, seconds: float, by_hand: Collection[str]) -> None:
        """Wait for everyone who has a node, so long; QuorumError if then there are too few."""
        deadline = time.monotonic() + seconds
        while len(found := {*self.present(), *by_hand}) < len(self.job.participants):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        if len(found) < self.job.min_contributors:
            raise QuorumError(f"only {len(found)} participants are there")

    def _exchange(
        self, kind: str, content: RecordDict, nodes: Collection[int], seconds: float
    ) -> Iterator[tuple[int, RecordDict]]:
        """Send a content to nodes; yield (node, answer) one by one, as long as there is time.

        One by one, so that no more than one file of an answer is in memory.
        """
        if not nodes:
            return
        messages = [Message(content, node, kind, ttl=seconds) for node in nodes]
        pending = dict(zip(self.grid.push_messages(messages), nodes, strict=True))
        deadline = time.monotonic() + seconds
        while pending and time.monotonic() < deadline:
            for identifier in list(pending):
                for reply in self.grid.pull_messages([identifier]):
                    node = pending.pop(identifier)
                    if reply.has_error():
                        logger.warning("node %d: failed (code %d)", node, reply.error.code)
                    else:
                        yield node, reply.content
            time.sleep(POLL_SECONDS if pending else 0)


def _failed_at(name: str) -> str:
    """What the server can say of a failure: nodes do not tell why."""
    return f"a step failed at {name}; its own log says why"


def _text(context: Context, name: str) -> str:
    found = context.run_config.get(name)
    if found is None:
        raise UsageError(f"the run's configuration does not name {name}")
    return str(found)


def _number(context: Context, name: str, default: float) -> float:
    found = context.run_config.get(name, default)
    number = isinstance(found, int | float) and not isinstance(found, bool)
    if not number or not 0 < found < math.inf:  # a NaN is neither
        raise UsageError(f"the run's configuration: {name}: expected a positive number")
    return float(found)


def _passphrase(context: Context) -> Callable[[], bytes]:
    return lambda: read_passphrase(Path(_text(context, "passphrase-file")))


def main(grid: Grid, context: Context) -> None:
    """Lead the rounds; a failure ends the run as failed."""
    path = Path(_text(context, "key"))
    job = Path(str(context.run_config.get("job") or path.with_name("job.json")))
    try:
        key = Key.load(path, job, _passphrase(context))
        key.require("server")
        seconds = _number(context, "round-timeout", 600)
        plan = Plan(
            folder=Path(_text(context, "folder")),
            initial=Path(_text(context, "initial")),
            rounds=int(_number(context, "rounds", 1)),
            by_hand=[
                name for name in str(context.run_config.get("by-hand", "")).split(",") if name
            ],
            patience=seconds,
            send_uploads=bool(context.run_config.get("send-uploads", False)),
        )
        only = bool(context.run_config.get("registered-only", False))
        nodes = Nodes(grid, key.job, seconds, only)
        nodes.wait(_number(context, "start-timeout", 120), plan.by_hand)
        last = Conductor(key, plan, nodes).run()
    except DtlError as error:
        logger.error("dtl: error: %s", error.message)
        raise
    context.state["dtl"] = ConfigRecord({"release": str(last)})


app.main()(main)
