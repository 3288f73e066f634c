"""A reader and checker of dtl's files, written from core/files/FORMATS.md and core/PROTOCOL.md.

It shares no code with dtl: plain integers, `pow` and `hashlib`; only what is not dtl's own
(Ed25519, HPKE, ChaCha20, scrypt) comes from `cryptography`. Slow, and for tests only.

Not in it: what `inspect` and `audit` print (of `audit` only whether all is well), shards, the
steps of optimisers (of `apply-sum` only what it checks before), `--adopt`, interrupted uploads,
and of the rules for grants all but one result a round and base; dtl's own tests stand alone there.
"""
