"""Wrong inputs to every command, in this process: one line each, and status 2.

The line names the field, what was expected, what came and, where there is one, the way out.
"""

import re
import shutil
from pathlib import Path

import pytest

from bayes_router.cli import main

LINE = re.compile(r"bayes-router: \S[^;]*: expected [^;]+; .+\n")
"""Field, what was expected, what came; on one line."""
LEAKS = ("Errno", "codec", "Error", "Traceback", "<class", "None")

ROWS = """
bench | --device abacus
bench | --seconds 0
bench | --seconds -3
bench | --seconds nan
bench | --seconds soon
bench | --lengths 0
bench | --lengths -5
bench | --lengths
bench | --lengths 64 long
bench | --mixes 10/60
bench | --mixes 10/60/40
bench | --mixes a/b/c
bench | --mixes 110/-5/-5
bench | --shapes 1x2x3
bench | --shapes 0x1x2x3
bench | --shapes 1x1x64xbig
bench | --out FILE
bench | --out FILE/below
bench | --cpu_time yes
bench | extra
bench | --gpu
evaluate |
evaluate | NOWHERE
evaluate | FILE
evaluate | EMPTY
evaluate | RUN more
evaluate | RUN --nosuch 1
evaluate | RUN --device abacus
evaluate | RUN --device cuda:99
evaluate | RUN --corpus nosuch
evaluate | RUN --corpus text:NOWHERE
evaluate | RUN --corpus text:
evaluate | RUN --corpus recall
evaluate | RUN --tokens 0
evaluate | RUN --tokens -4
evaluate | RUN --tokens many
evaluate | RUN --policy nosuch
evaluate | RUN --policy
evaluate | RUN --threshold 0.5
evaluate | RUN --policy conservative --threshold 1.5
evaluate | RUN --policy conservative --threshold nan
evaluate | RUN --budget 0
evaluate | RUN --budget -1
evaluate | RUN --budget 0.01
evaluate | RUN --budget nan
evaluate | RUN --budget inf
evaluate | RUN --budget little
evaluate | RUN --budget 0.3 --cost euros
evaluate | RUN --budget 0.3 --quality 0.1
evaluate | RUN --quality -1
evaluate | RUN --freeze 0.5
evaluate | RUN --freeze -0.1
evaluate | RUN --free 0
evaluate | RUN --free nan
evaluate | RUN --free 0.99
evaluate | RUN --free 0.2 --freeze 0.1
evaluate | RUN --quality nan
evaluate | RUN --quality good
evaluate | RUN --confidence 0.9
evaluate | RUN --quality 0.1 --confidence 0
evaluate | RUN --quality 0.1 --confidence 1
evaluate | RUN --quality 0.1 --confidence 2
evaluate | RUN --quality 0.1 --confidence sure
evaluate | RUN --budget 0.3 --curve_tokens 0
evaluate | RUN --budget 0.3 --curve_tokens none
evaluate | RUN --out FILE
evaluate | RUN --out FILE/below
fit | --preset huge
fit | --preset
fit | --config NOWHERE
fit | --config EMPTY
fit | --config FILE
fit | --config BINARY
fit | --out FILE
fit | --out FILE/below
fit | --resume --out NOWHERE
fit | --resume --out EMPTY
fit | --resume --out FILE
fit | --resume --out RUN --model.window 7
fit | --out RUN
fit | --corpus nosuch
fit | --corpus text:NOWHERE
fit | --corpus text:EMPTY
fit | --corpus text:
fit | --corpus /proc
fit | --steps 0
fit | --steps -1
fit | --steps many
fit | --steps 1.5
fit | --seed -1
fit | --seed x
fit | --device abacus
fit | --device cuda:99
fit | --nosuch 1
fit | more
fit | --train.lr 0
fit | --train.lr -1
fit | --train.lr nan
fit | --train.lr fast
fit | --train.precision half
fit | --train.batch_size 0
fit | --train.warmup -1
fit | --train.compile maybe
fit | --train.checkpoint_every -1
fit | --model.experts full
fit | --model.experts []
fit | --model.experts [full,full]
fit | --model.experts [full,magic]
fit | --model.d_model 7
fit | --model.d_model 0
fit | --model.num_layers 0
fit | --model.num_heads 3
fit | --model.window 0
fit | --model.window wide
fit | --model.route_by token
fit | --data.context 0
fit | --data.tokeniser morse
fit | --data.eval_tokens 0
fit | --prior.cost_ratio [0,0,0]
fit | --prior.cost_ratio [1,2,0.3]
fit | --prior.cost_ratio [1,0.3]
fit | --prior.cost_ratio cheap
fit | --prior.total_concentration 0
fit | --prior.temperature 0
fit | --prior.price -1
fit | --prior.map magic
fit | --schedule.kl_weight 0
fit | --schedule.anneal_from 2
fit | --schedule.start_experts [nosuch]
generate |
generate | RUN
generate | NOWHERE --prompt x
generate | EMPTY --prompt x
generate | RUN --prompt
generate | RUN --prompt x --tokens 0
generate | RUN --prompt x --tokens few
generate | RUN --prompt x --temperature -1
generate | RUN --prompt x --temperature nan
generate | RUN --prompt x --temperature hot
generate | RUN --prompt x --top_k -1
generate | RUN --prompt x --top_p 0
generate | RUN --prompt x --top_p 1.5
generate | RUN --prompt x --top_p nan
generate | RUN --prompt x --seed early
generate | RUN --prompt x --stop ab
generate | RUN --prompt x --stop
generate | RUN --prompt x --device abacus
generate | RUN --prompt x --nosuch
inspect |
inspect | NOWHERE
inspect | FILE
inspect | EMPTY
inspect | RUN --layer 9
inspect | RUN --layer -1
inspect | RUN --layer top
inspect | RUN --unit 3
inspect | RUN --unit -1
inspect | RUN --tokens 0
inspect | RUN --tokens -3
inspect | RUN --threshold 2
inspect | RUN --threshold -1
inspect | RUN --threshold nan
inspect | RUN --by nosuch
inspect | RUN --by risk
inspect | RUN --by heads --unit 0
inspect | RUN --by heads --threshold 0.5
inspect | RUN --by risk --layer 0
inspect | RUN --colour red
inspect | RUN --svg EMPTY
inspect | RUN --svg FILE/below
inspect | RUN --table EMPTY
inspect | RUN --table FILE/below
inspect | RUN --text NOWHERE
inspect | RUN --text EMPTY
inspect | RUN --text BINARY
inspect | RUN --text BLANK
inspect | RUN --corpus nosuch
inspect | RUN --base NOWHERE
inspect | RUN --gguf_file NOWHERE
inspect | RUN --context 64
report |
report | NOWHERE
report | FILE
report | EMPTY
report | RUN --out EMPTY
report | RUN --out FILE/below
report | RUN --out NOWHERE/below.html
report | RUN --tokens 0
report | RUN --tokens all
report | RUN --text NOWHERE
report | RUN --text BINARY
report | RUN --corpus nosuch
report | RUN --device abacus
report | RUN --base NOWHERE
report | RUN --context 64
report | RUN RUN
sweep |
sweep | --target_cost little
sweep | --target_cost 0
sweep | --target_cost 2
sweep | --target_cost nan
sweep | --target_cost 0.3 --target_entropy -1
sweep | --target_cost 0.3 --target_entropy 9
sweep | --target_entropy some
sweep | --target_cost 0.3 --preset huge
sweep | --target_cost 0.3 --cost euros
sweep | --target_cost 0.3 --cost flops --context 0
sweep | --target_cost 0.3 --map magic
sweep | --target_cost 0.3 --total_concentration 0
sweep | --target_cost 0.3 --price -1
sweep | --target_cost 0.3 --samples 0
sweep | --target_cost 0.3 --samples many
sweep | --target_cost 0.3 --out FILE
sweep | --target_cost 0.3 --out FILE/below
sweep | NOWHERE --target_cost 0.3
sweep | EMPTY --target_cost 0.3
sweep | RUN --steps -1
sweep | RUN --steps 1 --seeds 0
sweep | RUN --steps 1 --refit nothing
sweep | RUN --steps 1 --tokens 0
sweep | RUN --device abacus
sweep | RUN --nosuch 1
"""
WRONG = [line.split("|") for line in ROWS.strip().splitlines()]


@pytest.fixture(scope="module")
def places(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the capital words stand for."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty").mkdir()
    (folder / "file").write_text("no = [settings")
    (folder / "binary").write_bytes(b"\xff\xfe\x00\x81")
    (folder / "blank").write_text("")
    shutil.copytree(finished_run, folder / "run")
    names = ("empty", "file", "binary", "blank", "run", "nowhere")
    return {name.upper(): str(folder / name) for name in names}


@pytest.mark.parametrize(("command", "rest"), WRONG, ids=["".join(row) for row in WRONG])
def test_one_line_names_field_expected_and_got(
    command: str,
    rest: str,
    places: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = re.sub("|".join(places), lambda found: places[found[0]], rest).split()
    before = {path: path.stat().st_mtime_ns for path in Path(places["RUN"]).rglob("*")}
    status, error = main([command.strip(), *words]), capsys.readouterr().err
    assert status == 2 and LINE.fullmatch(error), error
    assert not [word for word in LEAKS if word in error], error
    assert not list(tmp_path.iterdir())  # nothing was begun
    assert before == {path: path.stat().st_mtime_ns for path in Path(places["RUN"]).rglob("*")}


@pytest.mark.parametrize("wrong", ["--quality -1", "--quality 0.1 --confidence 2"])
def test_what_nobody_can_promise_is_refused_before_the_run_is_read(
    wrong: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the run was read")

    monkeypatch.setattr("bayes_router.commands.evaluate.load_run", read)
    assert main(["evaluate", places["RUN"], *wrong.split()]) == 2
