"""The command line of dtl: one thin file a command."""
