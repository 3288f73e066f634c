"""Rounds between machines, with Flower as the courier: it carries dtl's files and starts apps.

Keys never enter Flower, and files are those of a run by hand. `rounds` is the server's side and
`node` a participant's, both without Flower; `server` and `client` are the apps around them.
`engine` starts Flower's programs, and `config` writes what they need.
"""

import os

SWITCHES = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
os.environ.update(SWITCHES)  # before anything of Flower's is imported or started
