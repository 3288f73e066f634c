"""The participant's Flower app: takes each message to the node, and the answer back."""

import logging
import os
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from dtl.core.errors import DtlError
from dtl.core.flower import payload
from dtl.core.flower.node import Node

DEBUG_VARIABLE = "DTL_DEBUG"  # for who writes a local_update: where it fails, in the own log

logger = logging.getLogger("flwr.dtl")
app = ClientApp()


def _answer(message: Message, context: Context, step: Callable[[Node, int], bytes]) -> Message:
    """Do a step and reply; of a failure, the reply says nothing but that there was one.

    What failed stands in the node's own log.
    """
    try:
        node = Node.load(context.node_config, context.run_config)
        number = int(payload.word(message.content, "round"))
        content = payload.pack(step(node, number), name=node.key.name)
    except (Exception, SystemExit) as error:  # a user's function may do anything
        told = error.message if isinstance(error, DtlError) else type(error).__name__
        logger.error("dtl: %s", told, exc_info=bool(os.environ.get(DEBUG_VARIABLE)))
        content = payload.pack_failure()
    return Message(content, reply_to=message)


def _files(message: Message) -> tuple[bytes, dict[str, bytes]]:
    """The base in a message, and what came along to recompute it from."""
    return payload.file_of(message.content), payload.along_of(message.content)


def hello(message: Message, context: Context) -> Message:
    """Say which participant the node speaks for."""
    return _answer(message, context, lambda node, _: node.key.name.encode())


def contribute(message: Message, context: Context) -> Message:
    """Open the base, train, encrypt; reply with the upload."""
    return _answer(
        message,
        context,
        lambda node, number: node.contribute(number, *_files(message)),
    )


def reveal(message: Message, context: Context) -> Message:
    """Reply with the reveal that answers a close file."""
    return _answer(
        message, context, lambda node, number: node.reveal(number, payload.file_of(message.content))
    )


def release(message: Message, context: Context) -> Message:
    """Open the last release into the node's folder."""

    def step(node: Node, _: int) -> bytes:
        node.receive(*_files(message))
        return b""

    return _answer(message, context, step)


app.query("hello")(hello)
app.train("contribute")(contribute)
app.query("reveal")(reveal)
app.evaluate("release")(release)
