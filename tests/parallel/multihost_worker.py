"""One host of tests/parallel/test_multihost.py: `python multihost_worker.py SCENARIO [FOLDER]`."""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flax_distil.data import audio_states
from flax_distil.data.utterances import Utterance
from flax_distil.errors import InputError
from flax_distil.parallel import multihost


def add_over_hosts() -> None:
    """Sum of rows that lie on different hosts, and what each host would read and write."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    rows = np.arange(6.0)
    mine = rows[multihost.host_slice(len(rows))]
    total = jax.jit(jnp.sum)(jax.make_array_from_process_local_data(sharding, mine))
    print(f"sum {float(total)} mine {mine.tolist()} main {multihost.is_main_host()}")
    multihost.barrier("end", timeout=20)


def wait_for_absent_host() -> None:
    if multihost.is_main_host():
        try:
            multihost.barrier("save-7", timeout=2)
        except TimeoutError as error:
            print(error)
        multihost.barrier("later", timeout=20)
    else:
        time.sleep(8)  # host 0 may be late by 6 s on a busy machine
        try:
            multihost.barrier("save-7", timeout=1)
        except TimeoutError as error:
            print(error)
        multihost.barrier("later", timeout=20)
    multihost.barrier("later", timeout=20)


def encode_together(folder: Path) -> None:
    """Seven clips in files of two: each host encodes a part and reads all of them."""
    audio_states.FILE_CLIPS = 2
    clips = [Utterance(str(number), np.full(160, number / 64, np.float32)) for number in range(7)]
    names = audio_states.clip_names(range(7), map(str, range(7)))
    encoded = []

    def encode(waveforms, _):
        encoded.append(int(waveforms[0, 0]) // 512)
        return waveforms[:, :2, None] / 32768

    there = audio_states.StateFolder(folder / "shared", names)
    kept = audio_states.load_or_encode([there], clips, encode, batch_size=2)
    print(f"encoded {encoded} read {(64 * kept.read(range(7))[:, 0, 0].astype(float)).tolist()}")
    disk = folder / f"disk-{jax.process_index()}"
    disk.mkdir()
    os.chdir(disk)  # a path that is another place on each host
    own = audio_states.StateFolder(Path("own"), names)
    try:
        audio_states.load_or_encode([own], clips, encode, batch_size=2)
    except InputError as error:
        print(error)


def together(folder: Path) -> None:
    """What needs two hosts and ends well, in one start of them."""
    add_over_hosts()
    encode_together(folder)
    stop_together()


def stop_together() -> None:
    """The last host is told to stop, as by a preemption."""
    step = 0
    with multihost.stop_signals() as stop:
        while not stop(step):
            if step == 5 and not multihost.is_main_host():
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            step += 1
    print(f"stopped before step {step}")


def lose_a_host() -> None:
    if not multihost.is_main_host():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    heartbeat, notices = int(os.environ.get("HEARTBEAT", "30")), sys.argv[1] == "together"
    multihost.start(heartbeat=heartbeat, connect=60, notices=notices)
    globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
