"""Rounds between machines, with Flower as the courier: it carries dtl's files and starts apps.

Keys never enter Flower, and files are those of a run by hand. `rounds` is the server's side and
`node` a participant's, both without Flower; `server` and `client` are the apps around them.
`engine` starts Flower's programs, and `config` writes what they need.
"""
