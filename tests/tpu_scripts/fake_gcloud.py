"""A gcloud for tests: notes every call and plays one TPU whose workers are folders.

FAKE_TPU names a folder with state.json: `workers`; `queue` and `node`, the states of the queued
resource and the TPU ("" is gone); `queue_reports` and `node_reports`, which a list tells first, one
a call; `fail`, a worker and a word: that worker fails when a command has the word. Calls go to
calls.jsonl. A command sent by ssh runs for real, in HOME = worker-<n>.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKE_TPU"])
STATE = ROOT / "state.json"


def main(arguments: list[str]) -> int:
    with open(ROOT / "calls.jsonl", "a") as calls:  # one short write: whole lines
        calls.write(json.dumps(arguments) + "\n")
    words = [word for word in arguments if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    state = json.loads(STATE.read_text())
    match words[2:4]:
        case ["queued-resources" | "tpu-vm" as kind, "list"]:
            resource = "queue" if kind == "queued-resources" else "node"
            reports = state[f"{resource}_reports"]
            if reports:
                state[resource] = reports.pop(0)
                STATE.write_text(json.dumps(state))
            if state[resource]:
                print(state[resource])
        case ["queued-resources", "create"]:
            STATE.write_text(json.dumps(state | {"queue": "ACTIVE", "node": "READY"}))
        case ["queued-resources", "delete"]:
            STATE.write_text(json.dumps(state | {"queue": "", "node": ""}))
            for home in ROOT.glob("worker-*"):
                shutil.rmtree(home)
        case ["tpu-vm", "describe"]:
            if not state["node"]:
                return complain("NOT_FOUND: no such TPU")
            print("10.0.0.2" if "ipAddress" in flags["format"] else state["workers"])
        case ["tpu-vm", "ssh"]:
            return ssh(state, flags["worker"], flags["command"])
        case ["tpu-vm", "scp"]:
            return scp(state, flags["worker"], words[4], words[5])
        case _:
            return complain(f"unknown: {arguments}")
    return 0


def ssh(state: dict, worker: str, command: str) -> int:
    if state["fail"] and state["fail"][0] == int(worker) and state["fail"][1] in command:
        return complain("ssh: connect to host: Connection timed out")
    home = ROOT / f"worker-{worker}"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        ["bash", "-c", command], cwd=home, env=os.environ | {"HOME": str(home)}, check=False
    ).returncode


def scp(state: dict, worker: str, source: str, target: str) -> int:
    if state["fail"] and state["fail"][0] == int(worker) and state["fail"][1] == "scp":
        return complain("scp: Connection closed")
    home = ROOT / f"worker-{worker}"
    home.mkdir(exist_ok=True)
    places = [
        home / place.partition(":")[2] if ":" in place else Path(place)
        for place in (source, target)
    ]
    return subprocess.run(["cp", "-r", *places], check=False).returncode


def complain(text: str) -> int:
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
