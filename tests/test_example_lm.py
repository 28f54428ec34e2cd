"""The language model example on a synthetic text of a few hundred lines."""

import json
import os
import random
import subprocess
import sys

import pytest
from example_modules import EXAMPLES, imported

WORDS = ["the", "of", "and", "king", "house", "river", "stone", "bread", "water", "light", "mountain", "walked", "gave"]
TINY = "--steps 8 --batch 4 --length 16 --vocab-size 400 --width 16 --layers 1 --heads 2 --lr 0.02 --held-out 0.2"
TINY += " --compare-steps 0 --threads 1 --dtype fp32 --save-every 4"

pytest.importorskip("transformers", reason="the example needs the extra [demo]")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """1,000 lines of words: five blocks, of which one is held out."""
    order = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{' '.join(order.choices(WORDS, k=order.randint(3, 9)))}\n" for _ in range(1000)))
    return path


def test_it_trains_the_same_fused_and_not_and_goes_on_where_it_stopped(text, tmp_path, monkeypatch, capsys):
    with imported("lm", "data model compare train") as lm:

        def run(name: str, *more: str) -> dict:
            out = tmp_path / name
            assert lm.train.main([*TINY.split(), "--data", str(text), "--out", str(out), "--loss", "mixed", *more]) == 0
            return json.loads((out / "metrics.json").read_text())

        fused, rows = run("fused"), run("rows", "--no-fuse")
        assert fused["after"]["cross_entropy"] < fused["before"]["cross_entropy"] - 0.5
        assert rows["before"] == fused["before"]
        assert rows["after"]["cross_entropy"] == pytest.approx(fused["after"]["cross_entropy"], rel=1e-3)

        begin = lm.train.Objective.on_step_begin

        def interrupted(objective, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt
            begin(objective, args, state, control, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(lm.train.Objective, "on_step_begin", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run("parts")
        assert run("parts") == fused
        assert f"going on from {tmp_path / 'parts' / 'checkpoint-4'}" in capsys.readouterr().out
        with pytest.raises(lm.train.RunError, match=r"loss is 'mixed' there and 'focal' here.*--fresh"):
            run("parts", "--loss", "focal")


@pytest.mark.slow
def test_an_output_layer_divided_over_ranks_trains_alike(text, tmp_path):
    """With torchrun, which is the one command."""
    sizes = "--steps 6 --batch 4 --length 16 --vocab-size 313 --width 16 --layers 1 --heads 2 --held-out 0.2"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "lm/tensor_parallel.py"), "--data", str(text), "--out", str(tmp_path), *sizes.split()]
    environment = os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    done = subprocess.run([*command, "--threads", "2"], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert len(curves["together"]) == 6 and curves["together"][-1] < curves["together"][0]
    assert curves["together"] == pytest.approx(curves["alone"], rel=1e-5)
