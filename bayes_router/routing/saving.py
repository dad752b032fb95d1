"""The files that keep evidence and risk beside the weights of a run or a patch."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bayes_router.files import first_line, write_whole
from bayes_router.routing.evidence import Evidence
from bayes_router.routing.risk import Risk, RiskHead

EVIDENCE = "evidence.safetensors"
RISK = "risk.safetensors"


def save_evidence(folder: Path, evidence: Evidence | None) -> None:
    """Write the file of a run or patch folder; without evidence one of before goes."""
    if evidence is None:
        (folder / EVIDENCE).unlink(missing_ok=True)
        return
    kept = {name: tensor.contiguous() for name, tensor in evidence.tensors().items()}
    write_whole(folder / EVIDENCE, lambda path: save_file(kept, path))


def load_evidence(folder: Path, num_layers: int, width: int) -> Evidence | None:
    """What a folder keeps; None where it was made without.

    Raises:
        ValueError: the file is damaged or another's.
    """
    path = folder / EVIDENCE
    if not path.is_file():
        return None
    try:
        return Evidence.from_tensors(load_file(path), num_layers, width)
    except (ValueError, SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected the evidence of this fit; damaged or another's: "
            f"{first_line(error)}; delete it to go without"
        ) from error


def save_risk(folder: Path, risk: Risk | None) -> None:
    """Write the file of a run or patch folder; without an estimate one of before goes."""
    if risk is None:
        (folder / RISK).unlink(missing_ok=True)
        return
    kept = {
        name: tensor.detach().cpu().contiguous() for name, tensor in risk.head.state_dict().items()
    }
    write_whole(folder / RISK, lambda path: save_file(kept, path))


def load_risk(folder: Path) -> Risk | None:
    """What a folder keeps; None where nothing was fitted.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / RISK
    if not path.is_file():
        return None
    try:
        kept = load_file(path)
        head = RiskHead(len(kept["mean"]), len(kept["body.0.bias"]))
        head.load_state_dict(kept)
    except (KeyError, SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected an estimate of risk; damaged: {first_line(error)}; delete it to go "
            f"without"
        ) from error
    return Risk(head)
