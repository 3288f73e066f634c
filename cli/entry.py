"""Where the `dtl` command begins."""

import signal


def main() -> None:
    """Run the command line; an interruption before it listens ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dtl.cli import app

    app.main()
