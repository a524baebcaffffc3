"""The benchmarks run and print finite ratios; how large they are is no test's business."""

import json
import math

import pytest

from benchmarks.__main__ import main
from benchmarks.pictures import Pictures, decode, encoded_images


@pytest.mark.slow
def test_quick_benchmarks_print_finite_ratios(tmp_path, capsys):
    main(["extraction", "training", "--quick", "--json", str(tmp_path / "records.json")])
    printed = capsys.readouterr().out
    records = json.loads((tmp_path / "records.json").read_text())
    assert records["machine"]["cores"]
    ratios = [record["ratio"] for record in records["extraction"]]
    ratios += [record[name] for record in records["training"] for name in ("time_ratio", "memory_ratio")]
    assert len(ratios) == 8
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)
    for record in records["extraction"]:
        assert f"{record['ratio']:.2f}" in printed


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["speed"])
    assert "known are extraction, training, memory" in capsys.readouterr().err


def test_pictures_repeat_a_few_images_and_know_their_labels_unseen():
    pictures = Pictures(encoded_images(16), 130)
    image, label = pictures[129]
    assert (len(pictures), label) == (130, pictures.targets[129])
    assert decode(image, 8).shape == (3, 8, 8)
