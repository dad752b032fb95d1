"""Run by test_faults.py.

Fits in forked children of one process that has imported everything, and kills them.

`python -m tests.training.killed_fits SETTINGS OUT SEED KILLS` ends with status 0 when a fit has
survived KILLS kills and came to its end; it prints where each struck.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bayes_router.config import Config, load_config
from bayes_router.files import METRICS, STATE
from bayes_router.training.fit import fit
from bayes_router.transformer import saving

MOMENTS = (
    "any time",
    "half a state",
    "whole state, no name",
    "renamed state",
    "half the weights",
    "between two files",
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def arm(moment: str, countdown: int) -> None:
    """Make this process kill itself when a checkpoint comes to `moment`.

    At the `countdown`-th time.
    """
    left = countdown

    def strike() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            die()

    save, replace, save_weights = torch.save, os.replace, saving.save_file

    def half_a_state(state: object, path: Path) -> None:
        save(state, path)
        size = path.stat().st_size
        os.truncate(path, size // 2)
        strike()
        save(state, path)

    def half_the_weights(*arguments: object) -> None:
        Path(str(arguments[1])).write_bytes(b"\x10\0\0\0")
        strike()
        save_weights(*arguments)  # type: ignore[arg-type]

    def rename(
        before: Callable[[Path], bool], after: Callable[[Path], bool]
    ) -> Callable[[Path, Path], None]:
        def renaming(source: Path, target: Path) -> None:
            if before(Path(target)):
                strike()
            replace(source, target)
            if after(Path(target)):
                strike()

        return renaming

    def is_state(path: Path) -> bool:
        return path.name == STATE

    def no(_path: Path) -> bool:
        return False

    if moment == "half a state":
        torch.save = half_a_state  # type: ignore[assignment]
    elif moment == "whole state, no name":
        os.replace = rename(is_state, no)  # type: ignore[assignment]
    elif moment == "renamed state":
        os.replace = rename(no, is_state)  # type: ignore[assignment]
    elif moment == "half the weights":
        saving.save_file = half_the_weights  # type: ignore[assignment]
    elif moment == "between two files":
        os.replace = rename(no, lambda path: path.name == METRICS)  # type: ignore[assignment]


def attempt(config: Config, out: Path, moment: str, rng: random.Random) -> bool:
    """One fit that is to be killed at `moment`; whether it came to its end instead."""
    countdown, patience = rng.randint(1, 2), rng.uniform(0.02, 0.5)
    child = os.fork()
    if child == 0:
        arm(moment, countdown)
        try:
            resumes = (out / STATE).exists()
            fit(config, out, resume=resumes, overwrite=out.exists() and not resumes, progress=False)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    if moment == "any time":
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        if os.WEXITSTATUS(status) != 0:
            sys.exit(f"a fit failed after a kill at: {moment}")
        return True
    return False


def main() -> None:
    torch.set_num_threads(1)
    settings, out, seed, kills = sys.argv[1:]
    rng, struck = random.Random(int(seed)), 0
    config, folder = load_config(Path(settings)), Path(out)
    for _ in range(400):
        moment = MOMENTS[struck % len(MOMENTS)]  # each as often
        finished = attempt(config, folder, moment, rng)
        if not finished:
            struck += 1
            print(f"killed: {moment}", flush=True)
        if finished and struck < int(kills):
            (folder / STATE).unlink()  # too quick for us: another run of the same settings
            print("again", flush=True)
        elif struck >= int(kills):
            break
    if not finished:
        fit(
            config,
            folder,
            resume=(folder / STATE).exists(),
            overwrite=not (folder / STATE).exists(),
        )
    print(f"{struck} kills")


if __name__ == "__main__":
    main()
