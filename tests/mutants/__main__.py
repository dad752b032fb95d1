"""Plant faults one at a time in a copy of the repository, and run the tests beside each.

`python -m tests.mutants [WORD ...] [--list]`: the faults whose file or name contains one of the
words; all by default, in about an hour on one core. A line a fault; status 1 where one was not
caught, or no longer fits the code. Not part of `make test`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.doubt import DOUBT
from tests.mutants.newer import NEWER
from tests.mutants.planted import FAULTS, Fault
from tests.mutants.program import OF_PROGRAM

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 600  # seconds; a fault that hangs the tests is caught, too


def main() -> int:
    """Plant, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="of the file or the name of a fault")
    parser.add_argument("--list", action="store_true", help="name the faults, plant none")
    options = parser.parse_args()
    chosen = [
        f
        for f in FAULTS + NEWER + DOUBT + OF_PROGRAM
        if not options.words or any(w in f"{f.file} {f.name}" for w in options.words)
    ]
    if options.list:
        print(*(f"{fault.file}: {fault.name}" for fault in chosen), sep="\n")
        return 0
    caught, missed, stale = 0, [], []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        for name in tracked():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        for fault in chosen:
            started = time.perf_counter()
            verdict = planted(fault, copy)
            print(
                f"{verdict:8} {fault.file}: {fault.name} ({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
            caught += verdict == "caught"
            missed += [fault] * (verdict == "MISSED")
            stale += [fault] * (verdict == "STALE")
    print(
        f"{caught} of {caught + len(missed)} caught"
        + (f"; {len(stale)} no longer fit the code" if stale else "")
    )
    return 1 if missed or stale else 0


def tracked() -> list[str]:
    """The files of the repository, as they lie in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def planted(fault: Fault, copy: Path) -> str:
    """What the tests say of a copy with this fault, which is taken out again."""
    path = copy / fault.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(fault.old) != 1:
        return "STALE"
    path.write_text(whole.replace(fault.old, fault.new), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *fault.tests.split(),
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return "caught"
    finally:
        path.write_text(whole, encoding="utf-8")
    return {0: "MISSED", 1: "caught", 2: "caught"}.get(done.returncode, "STALE")


if __name__ == "__main__":
    sys.exit(main())
