"""A reader and checker of dtl's files, written from core/files/FORMATS.md and core/PROTOCOL.md.

It shares no code with dtl: plain integers, `pow` and `hashlib`; only what is not dtl's own
(Ed25519, HPKE, ChaCha20, scrypt) comes from `cryptography`. Slow, and for tests only.
"""
