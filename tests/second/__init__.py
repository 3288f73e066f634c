"""A reader and checker of dtl's files, written from core/files/FORMATS.md and core/PROTOCOL.md.

It shares no code with dtl: plain integers, `pow` and `hashlib`; only what is not dtl's own
(Ed25519, HPKE, ChaCha20, scrypt) comes from `cryptography`. Slow, and for tests only.

Not in it: what `inspect` prints, the verdicts of `audit`, shards, and, of what a command asks
its ledger, the rules for a second upload and for grants; dtl's own tests stand alone there.
"""
