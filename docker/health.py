"""The image's health check: exits with 1 where a Ray node of this container does not answer, else with 0."""

import os
import sys
import urllib.request
from pathlib import Path

AGENT = "http://127.0.0.1:{port}/api/local_raylet_healthz"


def main() -> int:
    """Ask the agent of the node, if there is one."""
    if not any("raylet" in _command(process) for process in Path("/proc").iterdir() if process.name.isdigit()):
        return 0  # a command without Ray
    port = os.environ.get("RAY_DASHBOARD_AGENT_PORT", "52365")
    try:
        with urllib.request.urlopen(AGENT.format(port=port), timeout=5) as answer:
            return 0 if answer.read().strip() == b"success" else 1
    except OSError:
        return 1


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")[0].rpartition(b"/")[2].decode(errors="replace")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
