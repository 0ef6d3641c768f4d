"""One run of one engine: `python -m prefixtree.bench.engines.worker FOLDER`.

A process of its own, since an engine leaves state behind. `job` in the folder is a pickled `Job`;
a `Run` goes to `run`, pickled too, and a byte for each request that is answered to `progress`.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path
from threading import Thread
from time import perf_counter, sleep

from prefixtree.bench.engines import watch
from prefixtree.bench.engines.drivers import load
from prefixtree.bench.engines.job import Job, Run
from prefixtree.bench.engines.serving import Serving, play
from prefixtree.bench.engines.workload import FIRST_TOKEN

WARM_UP = 40
"""Tokens of the request that an engine answers before anything is measured."""


def main(folder: Path) -> None:
    Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    job: Job = pickle.loads((folder / "job").read_bytes())
    setup = job.setup
    watch.create(setup.steps)
    engine = load(job.engine).start(setup)
    _warm_up(engine)
    before = len(watch.read(setup.steps))
    begin = perf_counter()
    answers = []
    with (folder / "progress").open("ab", buffering=0) as progress:
        for answer in play(engine, job.workload):
            answers.append(answer)
            progress.write(b".")
    run = Run(answers, watch.read(setup.steps)[before:], perf_counter() - begin)
    (folder / "run").write_bytes(pickle.dumps(run))
    engine.close()


def _end_with(parent: int) -> None:
    """Ends this process and all that it has started when the one that wanted it is gone."""
    while os.getppid() == parent:
        sleep(1)
    os.killpg(0, signal.SIGKILL)


def _warm_up(engine: Serving) -> None:
    engine.submit("warm-up", [FIRST_TOKEN] * WARM_UP, 4)
    while not any(reply.done for reply in engine.receive()):
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]))
