import shutil

import pytest

from bayes_router.data.load import load_data
from bayes_router.training.checkpoint import load_run
from bayes_router.training.fitted_text import FITTED_TEXT, require_unread

REFUSED = r"texts: expected text that fit did not read.*text of which about 100% was fitted on"


@pytest.fixture(scope="module")
def data(finished_run):
    return load_data(load_run(finished_run)[0])[1]


def windows(source, skip=0):
    return list(source.windows(32, 4, 1000))[skip:]


def test_what_a_run_was_fitted_on_promises_nothing(finished_run, data):
    with pytest.raises(ValueError, match=REFUSED):
        require_unread(finished_run, None, windows(data.train))
    require_unread(finished_run, None, windows(data.valid))


def test_a_run_of_before_is_checked_against_its_corpus_where_that_is_there(
    finished_run, data, tmp_path
):
    old = shutil.copytree(finished_run, tmp_path / "old")
    (old / FITTED_TEXT).unlink()
    with pytest.raises(ValueError, match=REFUSED):
        require_unread(old, data.train, windows(data.train))
    with pytest.warns(UserWarning, match="is missing: whether the fit read"):
        require_unread(old, None, windows(data.train))
    (old / FITTED_TEXT).write_bytes((finished_run / FITTED_TEXT).read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{FITTED_TEXT}: expected the fingerprint .*delete it"):
        require_unread(old, None, windows(data.train))


def test_evaluate_asks_before_it_promises(finished_run, data, capsys, monkeypatch):
    from bayes_router.cli import main
    from bayes_router.commands import evaluate

    asked = []

    def refuse(folder, own, windows):
        asked.append((folder, len(own), sum(batch.tokens.numel() for batch in windows)))
        raise ValueError("texts: seen")

    monkeypatch.setattr(evaluate, "require_unread", refuse)
    main(["evaluate", str(finished_run), "--quality", "0.5", "--tokens", "512"])
    assert asked == [(finished_run, len(data.train), 512)]
    assert "texts: seen" in capsys.readouterr().err
