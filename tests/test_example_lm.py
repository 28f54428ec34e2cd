"""The language model example on a synthetic text of a few hundred lines."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "lm"
MODULES = ("data", "model", "compare", "train")
WORDS = ["the", "of", "and", "king", "house", "river", "stone", "bread", "water", "light", "mountain", "walked", "gave"]
TINY = "--steps 8 --batch 4 --length 16 --vocab-size 400 --width 16 --layers 1 --heads 2 --lr 0.02 --held-out 0.2"
TINY += " --compare-steps 0 --threads 1 --dtype fp32 --save-every 4"

pytest.importorskip("transformers", reason="the example needs the extra [demo]")


@pytest.fixture(scope="module")
def lm():
    """The example's modules. They import each other by bare names, which are taken back afterwards."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")  # as train.py would
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    torch.set_num_threads(threads)
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """1,000 lines of words: five blocks, of which one is held out."""
    order = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{' '.join(order.choices(WORDS, k=order.randint(3, 9)))}\n" for _ in range(1000)))
    return path


def _write_module(stem: Path, letter: str, blocks: list[str]) -> None:
    packed = [zlib.compress(block.encode()) for block in blocks]
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(f".{letter}zz").write_bytes(b"".join(packed))
    begins = [sum(len(part) for part in packed[:i]) for i in range(len(packed))]
    index = (struct.pack("<III", b, len(p), len(t)) for b, p, t in zip(begins, packed, blocks, strict=True))
    stem.with_suffix(f".{letter}zs").write_bytes(b"".join(index))


def test_a_sword_module_is_read(lm, tmp_path):
    verse = '<w lemma="strong:H07225">In the  beginning</w> he &amp; she.<note n="a">or, <hi>at</hi> first</note> '
    book = (
        f'<div type="book"/><title>The First</title><chapter n="1"/>{verse}<div sID="g" type="x-p"/>{"And so. " * 30}'
    )
    _write_module(tmp_path / "kjv" / "ot", "b", ["<div/> ", book, book.replace("First", "Second")])
    documents = lm.data.read_module(tmp_path / "kjv" / "ot", "b")
    assert [document.name for document in documents] == ["kjv ot 1", "kjv ot 2"]
    lines = documents[0].text.split("\n")
    assert lines == ["The First", "In the beginning he & she.", ("And so. " * 30).strip()]
    with pytest.raises(lm.data.DataError, match=r"cannot read .*nt\.bzs.*install sword-text-kjv"):
        lm.data.read_module(tmp_path / "kjv" / "nt", "b")


def test_the_modules_are_cached_whole(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lm.data, "SWORD", tmp_path / "modules")
    for part, letter in lm.data.PARTS:
        _write_module(tmp_path / "modules" / part, letter, ["Some words. " * 400_000, "Others. " * 100])
    documents = lm.data.load_documents(None)
    assert len(documents) == 6 and len({document.name for document in documents}) == 6
    monkeypatch.setattr(lm.data, "SWORD", tmp_path / "gone")
    assert lm.data.load_documents(None) == documents


def test_a_fetch_that_fails_leaves_nothing_behind(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(lm.data, "SWORD", Path("nowhere"))  # not even where this system has them installed
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(lm.data.DataError, match=r"apt-get install sword-text-kjv .* or .* --data text.txt"):
        lm.data.load_documents(None)
    assert list((tmp_path / "fusedloss").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"gr\xfcn", "not UTF-8 .byte 0xfc at 2"),
        (b"", "holds 0 lines"),
        (b"a\n\nb\n", "holds 2 lines of text; at least"),
    ],
)
def test_a_bad_file_is_refused(lm, tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(lm.data.DataError, match=message):
        lm.data.load_documents(path)
    with pytest.raises(lm.data.DataError, match="cannot read"):
        lm.data.load_documents(tmp_path / "none.txt")


def test_the_split_goes_by_document(lm):
    documents = [lm.data.Document(f"d{i}", "x" * (100 + i)) for i in range(50)]
    train, held = lm.data.split_by_document(documents, 0.1, seed=1)
    assert sorted(train + held) == sorted(documents) and 5 <= len(held) <= 6
    assert (train, held) == lm.data.split_by_document(documents, 0.1, seed=1)
    assert held != lm.data.split_by_document(documents, 0.1, seed=2)[1]
    assert [len(side) for side in lm.data.split_by_document(documents[:2], 0.9, seed=1)] == [1, 1]


def test_blocks_are_the_text_in_order(lm):
    documents = [lm.data.Document("a", "the king spoke\nthe river"), lm.data.Document("b", "bread & water")]
    tokenizer = lm.data.train_tokenizer(documents, 300)
    blocks = lm.data.make_blocks(documents, tokenizer, 4)
    whole = "the king spoke\nthe river<|end|>bread & water<|end|>"
    decoded = tokenizer.decode(blocks.flatten().tolist(), skip_special_tokens=False)
    assert whole.startswith(decoded) and blocks.shape[1] == 4 and len(whole) - len(decoded) < 20
    with pytest.raises(lm.data.DataError, match="less than a block of 9999"):
        lm.data.make_blocks(documents, tokenizer, 9999)


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


def test_the_loss_changes_after_the_warm_up(lm, text, tmp_path, monkeypatch):
    seen = []
    fuse_with = lm.model.fuse_with

    def noted(model, loss, **changing):
        seen.append((loss, changing["alpha"]() if changing else None))
        fuse_with(model, loss, **changing)

    monkeypatch.setattr(lm.train, "fuse_with", noted)
    _run(lm, text, tmp_path, "--loss", "mixed")
    assert seen == [("cross_entropy", None), ("mixed", 0.5 * 4 / 8)]


def test_a_stopped_run_goes_on_to_the_same_model(lm, text, tmp_path, monkeypatch, capsys):
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
    parts = _run(lm, text, tmp_path / "parts", "--loss", "mixed")
    assert f"going on from {tmp_path / 'parts' / 'checkpoint-4'}" in capsys.readouterr().out
    assert parts == whole
    assert _run(lm, text, tmp_path / "parts", "--loss", "mixed") == whole  # finished: measured again


def test_a_folder_of_another_run_is_refused(lm, text, tmp_path):
    _run(lm, text, tmp_path / "out", "--steps", "1")
    with pytest.raises(lm.train.RunError, match=r"loss is 'cross_entropy' there and 'focal' here.*--fresh"):
        _run(lm, text, tmp_path / "out", "--steps", "1", "--loss", "focal")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "more\n")
    with pytest.raises(lm.train.RunError, match="corpus is"):
        _run(lm, other, tmp_path / "out", "--steps", "1")
    assert _run(lm, text, tmp_path / "out", "--steps", "1", "--loss", "focal", "--fresh")["config"]["loss"] == "focal"


@pytest.mark.slow
def test_the_comparison_measures_both_sides(lm, text, tmp_path, capsys):
    comparison = _run(lm, text, tmp_path, "--steps", "1", "--loss", "focal", "--compare-steps", "2")["comparison"]
    fused, unfused = comparison["fused"], comparison["unfused"]
    assert fused["final_loss"] == pytest.approx(unfused["final_loss"], rel=1e-4)
    for figures in (fused, unfused):
        assert figures["step_ms"] > 0 and figures["peak_mib"] > figures["peak_above_start_mib"] >= 0
    assert "fused against unfused focal" in capsys.readouterr().out


@pytest.mark.slow
def test_an_output_layer_divided_over_ranks_trains_alike(text, tmp_path):
    """With torchrun, which is the one command."""
    sizes = (
        "--steps 6 --batch 4 --length 16 --vocab-size 313 --width 16 --layers 1 --heads 2 --held-out 0.2 --threads 2"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(FOLDER / "tensor_parallel.py"), "--data", str(text), "--out", str(tmp_path), *sizes.split()]
    environment = os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 ranks, vocabulary 157 + 156" in done.stdout
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert len(curves["together"]) == 6 and curves["together"][-1] < curves["together"][0]
    assert curves["together"] == pytest.approx(curves["alone"], rel=1e-5)
