"""Probes that train on images: attention over patches, fine-tuning; and the picture of an evaluation."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import RANDOM, TRAIN, VAL, evaluate, results, root, tiny  # noqa: F401 (fixtures)
from torch import nn

from ijepa_fast.evaluation.attentive import AttentiveHead
from ijepa_fast.evaluation.finetune import _Classifier, layer_groups
from ijepa_fast.evaluation.frozen import open_weights
from ijepa_fast.evaluation.supervised import _schedule

pytestmark = pytest.mark.long


def test_the_attentive_head_is_cross_attention_of_one_query():
    """Against torch's own multi-head attention, in float64."""
    torch.manual_seed(0)
    head = AttentiveHead(12, 3, 4).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    reference = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([head.q.weight, head.kv.weight]))
        reference.in_proj_bias.copy_(torch.cat([head.q.bias, head.kv.bias]))
        reference.out_proj.weight.copy_(head.proj.weight)
        reference.out_proj.bias.copy_(head.proj.bias)
    x = torch.randn(5, 7, 12, dtype=torch.float64)
    normal, query = head.norm1(x), head.query.expand(5, 1, 12)
    query = query + reference(query, normal, normal, need_weights=False)[0]
    query = query + head.fc2(torch.nn.functional.gelu(head.fc1(head.norm2(query))))
    torch.testing.assert_close(head(x), head.classifier(query[:, 0]))


def test_learning_rates_fall_from_block_to_block():
    net = _Classifier(open_weights(RANDOM).encoder, 4)  # two blocks
    net.encoder.pos_embed.requires_grad_(False)
    scale, decay = {}, {}
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    for group in layer_groups(net, 0.05):
        for parameter in group["params"]:
            scale[names[id(parameter)]] = group["lr_scale"]
            decay[names[id(parameter)]] = group["weight_decay"]
    assert set(names.values()) - set(scale) == {"encoder.pos_embed"}
    assert scale["head.weight"] == scale["encoder.norm.weight"] == 1
    assert scale["encoder.blocks.1.attn.qkv.weight"] == 0.75
    assert scale["encoder.blocks.0.mlp.fc2.bias"] == 0.75**2
    assert scale["encoder.patch_embed.proj.weight"] == 0.75**3
    assert (decay["encoder.blocks.0.mlp.fc2.weight"], decay["encoder.blocks.0.mlp.fc2.bias"]) == (0.05, 0)
    assert decay["encoder.norm.weight"] == 0


def test_the_schedule_warms_up_and_falls_to_zero():
    values = [_schedule(step, 20, 4) for step in range(20)]
    assert values[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert values[12] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))


def test_probes_that_train_learn(evaluate, tmp_path):  # noqa: F811
    """Classes of a few colours and shapes, against a chance of 25 %; the same when done again."""
    (tmp_path / "few.txt").write_text("\n".join(f"class_{c}/{n}.jpg" for c in range(4) for n in range(2)))
    words = "--probe", "attentive,finetune", "--json", tmp_path / "r.json", "--epochs", 20, "--lr", "0.003", "--list"
    outcome = evaluate(*words, tmp_path / "few.txt")
    assert (outcome.code, outcome.err) == (0, "")
    rows = results(tmp_path / "r.json")
    attentive = rows["attentive", "patches", "20 epochs, lr 0.003"]
    finetune = rows["finetune", "fine-tuned", "8 images, 20 epochs, lr 0.003"]
    assert attentive["value"] >= 0.5
    assert finetune["value"] > 0.4
    assert finetune["images"] == 4 * VAL
    assert evaluate(*words, tmp_path / "few.txt").code == 0
    again = results(tmp_path / "r.json")
    assert [again[key]["value"] for key in rows] == [row["value"] for row in rows.values()]


def test_a_learning_rate_that_diverges_is_one_sentence(evaluate):  # noqa: F811
    words = "--probe", "finetune", "--epochs", 2, "--lr", 1e30
    assert evaluate(*words).error == "fine-tuning diverged at a learning rate of 1e+30; give a lower one with --lr"


def test_the_picture_shows_curve_matrix_and_images(evaluate, tmp_path, monkeypatch):  # noqa: F811
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    outcome = evaluate("--probe", "knn", "--out", tmp_path / "new", "--json", tmp_path / "r.json", "--shots", "1,3")
    assert (outcome.code, outcome.err) == (0, "")
    rows = results(tmp_path / "r.json")
    left, right = figures[0].subfigs
    curve, matrix = left.axes
    points = curve.containers[0].lines[0].get_xydata()
    logistic = next(row for key, row in rows.items() if key[:2] == ("logistic", "last layer"))
    lowshot = [rows["lowshot", "last layer", f"{n} a class, 5 splits"]["value"] for n in (1, 3)]
    accuracies = [100 * value for value in (*lowshot, logistic["value"])]
    np.testing.assert_allclose(points, np.transpose([[4, 12, 4 * TRAIN], accuracies]))
    shares = np.asarray(matrix.images[0].get_array())
    assert shares.shape == (4, 4)
    np.testing.assert_allclose(shares.sum(1), 100)
    assert np.trace(shares) / 4 == pytest.approx(100 * logistic["value"])  # val has as many images of each class
    wrong = round((1 - logistic["value"]) * 4 * VAL)
    assert sum(bool(axis.images) for axis in right.axes) == min(wrong, 24) > 0
    with Image.open(tmp_path / "new" / "evaluation.png") as image:
        assert image.width > 1000


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--probe", "regress"], "regress needs the columns to predict: --columns NAME[,NAME]"),
        (["--probe", "kn"], "there is no probe 'kn'; the probes are knn, logistic"),
        (["--shots", "a"], "'a' is no list of whole numbers such as 10,20"),
        (["--batch", "0"], "--batch must be at least 1"),
    ],
)
def test_words_that_are_none(words, sentence, evaluate, capfd):  # noqa: F811
    with pytest.raises(SystemExit) as left:
        evaluate(*words)
    assert left.value.code == 2
    assert sentence in capfd.readouterr().err
