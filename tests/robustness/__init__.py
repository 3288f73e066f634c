"""Fuzz, faults and searches for secrets: the commands on bad files and on bad days.

One small job, played once, gives every kind of file and the state before every command
(`scenario`). `fuzzing` mutates the files, `faults` breaks the machine under the commands.
"""
