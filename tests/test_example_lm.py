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
def lm():
    with imported("lm", "data model compare train") as modules:
        yield modules


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """1,000 lines of words: five blocks, of which one is held out."""
    order = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{' '.join(order.choices(WORDS, k=order.randint(3, 9)))}\n" for _ in range(1000)))
    return path


def test_the_split_goes_by_document(lm):
    documents = [lm.data.Document(f"d{i}", "x" * (100 + i)) for i in range(50)]
    train, held = lm.data.split_by_document(documents, 0.1, seed=1)
    assert sorted(train + held) == sorted(documents) and 5 <= len(held) <= 6
    assert (train, held) == lm.data.split_by_document(documents, 0.1, seed=1)
    assert held != lm.data.split_by_document(documents, 0.1, seed=2)[1]


def test_blocks_are_the_text_in_order(lm):
    documents = [lm.data.Document("a", "the king spoke\nthe river"), lm.data.Document("b", "bread & water")]
    tokenizer = lm.data.train_tokenizer(documents, 300)
    blocks = lm.data.make_blocks(documents, tokenizer, 4)
    whole = "the king spoke\nthe river<|end|>bread & water<|end|>"
    decoded = tokenizer.decode(blocks.flatten().tolist(), skip_special_tokens=False)
    assert whole.startswith(decoded) and blocks.shape[1] == 4 and len(whole) - len(decoded) < 20


def _run(lm, text, out, *more: str) -> dict:
    assert lm.train.main([*TINY.split(), "--data", str(text), "--out", str(out), *more]) == 0
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "mixed", "dsc"])
def test_every_loss_trains_the_same_fused_and_not(lm, text, tmp_path, loss):
    fused = _run(lm, text, tmp_path / "fused", "--loss", loss)
    assert fused["after"]["cross_entropy"] < fused["before"]["cross_entropy"] - 0.5
    rows = _run(lm, text, tmp_path / "rows", "--loss", loss, "--no-fuse")
    assert rows["before"] == fused["before"]
    assert rows["after"]["cross_entropy"] == pytest.approx(fused["after"]["cross_entropy"], rel=1e-3)


def test_a_stopped_run_goes_on_to_the_same_model_and_no_other_run_does(lm, text, tmp_path, monkeypatch, capsys):
    whole = _run(lm, text, tmp_path / "whole", "--loss", "mixed")
    begin = lm.train.Objective.on_step_begin

    def interrupted(objective, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt
        begin(objective, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lm.train.Objective, "on_step_begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(lm, text, tmp_path / "parts", "--loss", "mixed")
    assert _run(lm, text, tmp_path / "parts", "--loss", "mixed") == whole
    assert f"going on from {tmp_path / 'parts' / 'checkpoint-4'}" in capsys.readouterr().out
    with pytest.raises(lm.train.RunError, match=r"loss is 'mixed' there and 'focal' here.*--fresh"):
        _run(lm, text, tmp_path / "parts", "--loss", "focal")


@pytest.mark.slow
def test_an_output_layer_divided_over_ranks_trains_alike(text, tmp_path):
    """With torchrun, which is the one command."""
    sizes = (
        "--steps 6 --batch 4 --length 16 --vocab-size 313 --width 16 --layers 1 --heads 2 --held-out 0.2 --threads 2"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "lm/tensor_parallel.py"), "--data", str(text), "--out", str(tmp_path), *sizes.split()]
    environment = os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert len(curves["together"]) == 6 and curves["together"][-1] < curves["together"][0]
    assert curves["together"] == pytest.approx(curves["alone"], rel=1e-5)
