import shutil

import pytest
import torch

from bayes_router.routing.saving import EVIDENCE
from bayes_router.routing.watch import watching
from bayes_router.training.checkpoint import load_run


def test_a_run_keeps_its_evidence_and_one_of_before_loads_without(finished_run, tmp_path):
    _, model = load_run(finished_run)
    tokens = torch.randint(256, (2, 32))
    with watching(model.controller) as watch:
        model(tokens)
    assert torch.isfinite(watch.log_evidence).all() and watch.log_evidence.shape == (2, 2, 32)
    old = shutil.copytree(finished_run, tmp_path / "old")
    (old / EVIDENCE).unlink()
    assert load_run(old)[1].controller.evidence is None


def test_damaged_evidence_is_refused(finished_run, tmp_path):
    broken = shutil.copytree(finished_run, tmp_path / "broken")
    (broken / EVIDENCE).write_bytes((finished_run / EVIDENCE).read_bytes()[:100])
    with pytest.raises(
        ValueError, match=rf"{EVIDENCE}: expected the evidence of this fit; .*delete it"
    ):
        load_run(broken)


def test_random_bytes_are_less_like_the_fits_text_than_its_own(finished_run):
    config, model = load_run(finished_run)
    from bayes_router.training.fit import load_data

    own = next(load_data(config)[1].valid.windows(32, 16, 512)).tokens
    with watching(model.controller) as watch:
        model(own)
        like = watch.log_evidence.mean()
        model(torch.randint(256, own.shape, generator=torch.Generator().manual_seed(0)))
    assert float(like) > float(watch.log_evidence.mean()) + 0.2
