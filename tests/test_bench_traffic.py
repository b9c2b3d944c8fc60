"""The counter of bytes, FLOPs and launches against counts by hand, and the command over a real config."""
import json

import pytest
import torch
import torch.nn.functional as F
from ijepa_kernels import column_sum

from bench import traffic
from bench.harness.traffic import COPY_RATE, MATMUL_RATE, Counter
from ijepa_fast.blocks import Attention
from ijepa_fast.flops import step_flops
from ijepa_fast.fp8 import SCALES


def counted(step, *weights):
    with Counter(weights, {}) as counter:
        step()
    return counter.total(), counter.by_kind()


def test_a_cast_a_product_and_a_sum_by_hand():
    weight = torch.empty(64, 32, device="meta", requires_grad=True)
    x = torch.empty(128, 32, device="meta", dtype=torch.bfloat16)
    total, kinds = counted(lambda: (x @ weight.to(torch.bfloat16).t() + 1).sum(0), weight)
    assert (total.weight_casts, total.launches, total.host_syncs) == (1, 4, 0)
    assert kinds["weight cast"].other_bytes == 64 * 32 * (4 + 2)
    assert kinds["product"].product_bytes == 2 * (128 * 32 + 64 * 32 + 128 * 64)
    assert kinds["product"].flops == total.flops == 2 * 128 * 32 * 64
    assert kinds["add"].other_bytes == 2 * 2 * 128 * 64
    assert kinds["sum"].other_bytes == 2 * (128 * 64 + 64)
    seconds = max(total.flops / MATMUL_RATE, kinds["product"].product_bytes / COPY_RATE)
    assert kinds["product"].predicted_ms == pytest.approx(1e3 * seconds)


def test_views_and_empty_tensors_cost_nothing_and_expanded_ones_one_row():
    x = torch.empty(8, 16, device="meta")
    total, _ = counted(lambda: torch.empty_like(x).view(16, 8).t()[1:].detach().unsqueeze(0).expand(5, -1, -1))
    assert (total.launches, total.other_bytes) == (0, 0)
    total, _ = counted(lambda: x[:1].expand(8, 16).neg())
    assert total.other_bytes == 4 * (16 + 8 * 16)


def test_what_a_gather_and_a_write_move():
    x, rows = torch.empty(1000, 16, device="meta"), torch.empty(10, device="meta", dtype=torch.int64)
    assert counted(lambda: x.index_select(0, rows))[0].other_bytes == 2 * 4 * 10 * 16 + 8 * 10
    assert counted(lambda: x.zero_())[0].other_bytes == 4 * 1000 * 16
    assert counted(lambda: x.mul_(2))[0].other_bytes == 2 * 4 * 1000 * 16


def test_a_sum_in_two_stages():
    x = torch.empty(5000, 3840, device="meta", dtype=torch.bfloat16)
    total, kinds = counted(lambda: column_sum(x))
    assert total.launches == 2
    partial = 4 * 70 * 3840  # 70 programs for each of the 15 blocks of 256 columns: 1,050 of the 1,056 there may be
    assert kinds["sum"].other_bytes == pytest.approx(2 * 5000 * 3840 + 2 * partial + 4 * 3840, rel=0.001)


def test_a_wait_of_the_host_counts():
    x = torch.empty(8, device="meta")
    assert counted(lambda: float(x.sum()))[0].host_syncs == 1


def test_the_backward_counts():
    x = torch.empty(4, 8, device="meta", requires_grad=True)
    weight = torch.empty(8, device="meta", requires_grad=True)
    _, kinds = counted(lambda: F.layer_norm(x, (8,), weight).backward(torch.empty(4, 8, device="meta")))
    element = 4 * 8 * 4  # of x; its backward reads x and the gradient twice
    statistics, weights = 2 * 4 * 4, 8 * 4
    assert kinds["norm"].other_bytes == (2 * element + statistics + weights) + (5 * element + statistics + 2 * weights)
    assert kinds["norm"].launches == 1 + 3


@pytest.fixture(scope="module")
def step(tiny_config):
    """A step of 8 images of the tiny config: ViT-Ti and one predictor block, 36 patches."""
    config = traffic.load(tiny_config, 8, [])
    return config, traffic.count(config, 8)


def test_flops_of_a_step_are_those_of_its_formula(step):
    config, counter = step
    masks = traffic.median_masks(config, 8)
    state = traffic.build_state(config)
    want = step_flops(
        *(state.encoder.size, state.predictor.size, config.model.patch_size),
        images=8,
        patches=36,
        context_lengths=masks.context.cu_seqlens.diff().numpy(),
        target_lengths=masks.target.cu_seqlens.diff().numpy(),
        context_of=masks.context_of.numpy(),
        covered=len(masks.covered.rows),
    )
    # The formula counts attention's backward as two forwards, the counter as the five products that there are: half a
    # forward more. Attention is 4 L^2 D of a block that is 24 L D^2 and more, here with L <= 36 and D = 192.
    assert want.total <= counter.total().flops <= 1.03 * want.total


def test_biases_are_summed_by_our_op(step):
    """Two launches each: of queries, keys and values in 12 + 1 blocks, and of the predictor's two projections. The one
    of PyTorch's is of the mask token."""
    assert step[1].by_kind()["sum"].launches == 2 * (13 + 2) + 1


def test_targets_in_e4m3_are_written_with_the_update(step, tiny_config):
    """A byte each and a scale a row, where bf16 has two bytes; no pass of its own, a launch for each of two widths."""
    counter = traffic.count(traffic.load(tiny_config, 8, ["model.target_dtype=fp8", "model.fp8_blocks=all"]), 8)
    before, after = step[1].by_kind()["optimizer"], counter.by_kind()["optimizer"]
    rows, wide = (3 + 4) * 192, 4 * 192
    elements = rows * 192 + 192 * wide
    assert before.other_bytes - after.other_bytes == 12 * (elements - 4 * (rows + 192))
    assert after.launches - before.launches == 2
    assert "copies of weights" not in counter.by_kind()


def test_targets_with_one_scale_are_rounded_in_the_next_forward(tiny_config, monkeypatch):
    """7 launches a weight: the largest magnitude, three of one number, what is to be rounded, its rounding, the scale.
    Bytes an element: 8 read for those, 4 and 4 for what is to be rounded, and the result."""
    monkeypatch.setitem(SCALES, "fc1", "tensor")
    words = ["model.target_dtype=fp8", "model.fp8_blocks=all"]
    counter = traffic.count(traffic.load(tiny_config, 8, words), 8)
    copies = counter.tallies["target forward", "copies of weights"]
    assert copies.launches == 7 * 12
    assert copies.other_bytes == 12 * (768 * 192 * 17 + 4)


def test_every_part_of_a_step_is_there(step):
    parts = step[1].by_part()
    forward = {f"{name} forward" for name in ("target", "context", "predictor")}
    assert set(parts) == forward | {"context backward", "predictor backward", "loss", "update"}
    assert parts["update"].flops == 0
    assert 1.9 < parts["context backward"].flops / parts["context forward"].flops < 2.5
    assert step[1].total().host_syncs == 0


def test_the_command_prints_one_object(step, tiny_config, capsys):
    traffic.main(["--config", str(tiny_config), "--micro-batch", "8", "--json"])
    result = json.loads(capsys.readouterr().out)
    total = step[1].total()
    for name in ("other_bytes", "launches", "weight_casts", "host_syncs", "flops", "predicted_ms"):
        assert result[name] == getattr(total, name)
        assert sum(part[name] for part in result["parts"].values()) == pytest.approx(result[name])


def test_attention_copies_none_of_its_gradients():
    with torch.device("meta"):
        attention, x = Attention(64, 2, torch.bfloat16), torch.empty(32, 64, dtype=torch.bfloat16)
        ends = torch.empty(3, dtype=torch.int32)

    def step():
        out, _ = attention(x, ends, 16)
        out.sum().backward()

    with Counter(list(attention.parameters()), {"": 2 * 16**2}) as counter:
        step()
    kinds = counter.by_kind()
    assert kinds["attention"].launches == 2
    assert "copy" not in kinds
