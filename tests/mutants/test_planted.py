"""Every planted fault still fits the code that it breaks, so that none is left out unseen."""

from tests.mutants.__main__ import ROOT
from tests.mutants.doubt import DOUBT
from tests.mutants.newer import NEWER
from tests.mutants.planted import FAULTS
from tests.mutants.program import OF_PROGRAM


def test_every_fault_fits_the_code_once() -> None:
    every = FAULTS + NEWER + DOUBT + OF_PROGRAM
    assert len({fault.name for fault in every}) == len(every) > 100
    stale = [
        f"{fault.file}: {fault.name}"
        for fault in every
        if (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) != 1
    ]
    assert not stale
