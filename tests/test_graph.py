"""Padded masks and captured steps: the numbers of the plain step, whatever batch the graph was captured for."""
import copy
import shutil
import sys

import pytest
import replay
import torch
from spoiled import spoil
from test_model import small_encoder

from bench.harness.workload import masks_to
from ijepa_fast import graph, run
from ijepa_fast.config import MaskConfig, load_config
from ijepa_fast.distributed import World
from ijepa_fast.errors import UserError
from ijepa_fast.fp8 import SCALES, use_fp8
from ijepa_fast.graph import GraphedBackward
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.metrics import read_log
from ijepa_fast.model import build_predictor, keep_copies
from ijepa_fast.objective import ijepa_loss
from ijepa_fast.optim import build_optimizer
from ijepa_fast.padding import COVERED_SIZES, SIZES, pad
from ijepa_fast.run import uses_graph
from ijepa_fast.train import main

GRID, BATCH = 6, 6
RULES = {
    "truncate": dict(collate="truncate", group=3),
    "ragged": dict(collate="ragged", sampler="corrected"),
    "several contexts": dict(collate="ragged", num_contexts=2, num_targets=3, context_scale=(0.5, 0.8)),
    "views": dict(collate="truncate", group=2, views=2),
}


def masks_of(rules, batch=BATCH, grid=GRID):
    return MultiBlockMasks(MaskConfig(min_keep=1, target_scale=(0.1, 0.2), **RULES[rules]), grid, 0, batch)


def models(compute_dtype=torch.float32):
    encoder = small_encoder(compute_dtype=compute_dtype)
    torch.manual_seed(0)
    predictor, target = build_predictor(encoder, depth=2, dim=48), small_encoder(compute_dtype=compute_dtype)
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(1.1)
    return encoder, predictor, target.requires_grad_(False)


def trained(encoder, predictor):
    return [p for model in (encoder, predictor) for p in model.parameters() if p.requires_grad]


def plain(parts, images, masks, denominator):
    loss = ijepa_loss(*parts, images, masks, denominator=denominator)
    return loss.detach(), torch.autograd.grad(loss, trained(*parts[:2]))


def images_of(seed):
    return torch.randn(BATCH, 3, 96, 96, generator=torch.Generator().manual_seed(seed))


def assert_same(got, want, tolerance=1e-6):
    """Sums over other numbers of rows: fp32 roundings, relative to a tensor's largest element."""
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=0)
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max().clamp(min=1e-3)))


@pytest.mark.parametrize("rules", RULES)
def test_padding_changes_neither_loss_nor_gradients(rules):
    sampler, parts = masks_of(rules), models()
    for step in range(3):
        masks, images = sampler.sample(step, 0, BATCH), images_of(step)
        padded = pad(masks, BATCH * GRID**2)
        by = 100.0 + step
        want = plain(parts, images, masks, by)
        assert_same(plain(parts, images, padded, torch.tensor(by)), want)


@pytest.mark.parametrize("rules", RULES)
def test_batches_come_in_few_sizes(rules):
    """And padding is less than one step, of 32 to the most tokens that the config can have."""
    sampler = masks_of(rules, batch=64, grid=14)
    sizes, wasted = set(), []
    for step in range(150):
        masks = sampler.sample(step, 0, 64)
        padded = pad(masks, 64 * 14**2)
        for real, long in ((masks.context, padded.context), (masks.target, padded.target)):
            most = len(real.image) * real.max_seqlen
            assert 0 <= len(long.indices) - len(real.indices) < most / SIZES + 1
            assert torch.equal(long.indices[: len(real.indices)], real.indices)
            assert long.cu_seqlens[-1] == len(long.indices)
            assert long.cu_seqlens.diff().max() <= real.max_seqlen
        sizes.add(padded.size)
        wasted.append(len(padded.context.indices) / len(masks.context.indices) - 1)
        assert 0 <= len(padded.covered) - len(masks.covered.rows) <= 64 * 14**2 / COVERED_SIZES
        assert torch.equal(padded.covered[: len(masks.covered.rows)], masks.covered.rows)
        assert torch.equal(padded.compared.cu_seqlens, masks.target.cu_seqlens)
    assert len(sizes) <= 30  # of contexts, targets and covered rows together
    assert len({size[1:3] + size[4:7] for size in sizes}) == 1  # sequences are always as many
    assert sum(len(size) for size in sizes) / len(sizes) == 9
    assert sum(wasted) / len(wasted) < 0.12


def two_batches_of_a_size(rules):
    sampler = masks_of(rules)
    by_size = {}
    for step in range(200):
        masks = sampler.sample(step, 0, BATCH)
        padded = pad(masks, BATCH * GRID**2)
        if padded.size in by_size and len(by_size[padded.size][0].context.indices) != len(masks.context.indices):
            return by_size[padded.size], (masks, padded)
        by_size.setdefault(padded.size, (masks, padded))
    raise AssertionError("no two batches of 200 have a size in common")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Arguments are checked as there, without looking at the values of tensors."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ijepa_kernels.") and hasattr(module, "can_read"):
            monkeypatch.setattr(module, "can_read", lambda _: False)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("rules", "precision"),
    [(rules, precision) for precision in ("float32", "bfloat16", "fp8") for rules in ("truncate", "ragged")]
    + [("ragged", "fp8 by one scale")],
)
def test_a_graph_computes_other_batches_and_weights_than_it_was_captured_for(rules, precision, monkeypatch):
    """Other images, masks, lengths, denominators, and weights after an update; nothing is left from the capture."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    parts = models(dtype)
    if precision == "fp8 by one scale":
        monkeypatch.setitem(SCALES, "qkv", "tensor")
        monkeypatch.setitem(SCALES, "fc1", "tensor")
    if precision.startswith("fp8"):
        use_fp8(parts[2], "all")
    bare = copy.deepcopy(parts)  # without copies of weights, which are then cast at each call
    for model in parts:
        keep_copies(model)
    # Rounded to bf16, or targets to e4m3, sums of another order become another number here and there.
    tolerance = 2e-6 if precision == "float32" else 2e-2
    graphed = GraphedBackward(*parts, "smooth_l1", capture=replay.capture)
    for step, (masks, padded) in enumerate(two_batches_of_a_size(rules)):
        images, by = images_of(step), 50.0 * (1 + step)
        graphed.zero()
        assert all(p.grad is g for p, g in zip(graphed.parameters, graphed.gradients, strict=True))
        loss = graphed(images, padded, by).clone()
        want = plain(bare, images, masks, by)
        assert_same((loss, graphed.gradients), want, tolerance)
        again = graphed(images, padded, by)
        assert_same((again, graphed.gradients), (loss, [2 * g for g in want[1]]), tolerance)
        with torch.no_grad():
            for model, twin in zip(parts, bare, strict=True):
                for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                    if p.ndim > 1:
                        p.mul_(1.3)
                        q.mul_(1.3)
    assert len(graphed._graphs) == 1


def test_the_recorder_replays_and_refuses_what_a_graph_cannot():
    x = torch.ones(3)
    result, again = replay.capture(lambda: (x * 2).sum())
    x.fill_(5)
    again()
    assert result == 30
    with pytest.raises(AssertionError, match="the host reads"):
        replay.capture(lambda: x * float(x.sum()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_a_captured_step_on_a_gpu(precision):
    """Six batches, with an update after each, beside the plain step: as one run is beside another in bf16."""
    sampler, results = masks_of("truncate"), []
    for graphs in (True, False):
        parts = [model.cuda() for model in models(torch.bfloat16)]
        if precision == "fp8":
            use_fp8(parts[2], "all")
        for model in parts:
            keep_copies(model)
        optimizer = build_optimizer(*parts)
        graphed = GraphedBackward(*parts, "smooth_l1") if graphs else None
        losses = []
        for step in range(6):
            masks, images = sampler.sample(step, 0, BATCH), images_of(step).cuda()
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (step + 1)
            if graphed is not None:
                graphed.zero()
                losses.append(float(graphed(images, pad(masks, BATCH * GRID**2).to(images.device), 100.0)))
            else:
                loss = ijepa_loss(*parts, images, masks_to(masks, images.device), denominator=100.0)
                loss.backward()
                losses.append(float(loss))
            optimizer.step(momentum=0.99)
            if graphed is None:
                optimizer.zero_grad()
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=2e-2)
    assert results[0][0] != pytest.approx(results[0][-1], rel=5e-2)


@pytest.mark.long
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_run_with_graphs_is_the_run_without(tiny_config, tmp_path, monkeypatch):
    """Several micro-batches a step, the last one smaller; and resumed from a checkpoint, with the optimizer's state.

    One update is skipped: its gradients, which stay where they are, are gone with the next.
    """
    spoil(monkeypatch, {7})
    words = ["--config", str(tiny_config), "optim.micro_batch=5", "log.probe_every=null", "log.tensorboard=false"]
    assert main([*words, "optim.epochs=2", f"train.folder={tmp_path / 'plain'}"]) == 0
    monkeypatch.setattr(run, "uses_graph", lambda *_: True)
    monkeypatch.setattr(graph, "CudaCapture", lambda: replay.capture)
    words.append(f"train.folder={tmp_path / 'graph'}")
    assert main([*words, "optim.epochs=2"]) == 0
    shutil.rmtree(tmp_path / "graph" / "checkpoints" / "step_00000010")
    assert main([*words, "optim.epochs=2", "--resume"]) == 0
    assert main([*words, "optim.epochs=2", "--dry-run", "--resume"]) == 0
    rows, want = (read_log(tmp_path / name)[0] for name in ("graph", "plain"))
    made = [[row["loss"] for row in some if row["loss"] is not None] for some in (rows, want)]
    assert made[0] == pytest.approx(made[1], rel=1e-5)
    assert [row["step"] for row in rows if row["loss"] is None] == [7]
    assert [row["mask-A"] for row in rows] == [row["mask-A"] for row in want]  # padding is not counted


@pytest.mark.parametrize(
    ("words", "device", "strategy", "text"),
    [
        ([], "cpu", "single", "needs a GPU"),
        ([], "cuda", "ddp", "one process, not ddp"),
        (["parallel.compile=true"], "cuda", "single", "exclude each other"),
    ],
)
def test_refuses(words, device, strategy, text, tiny_config):
    config, _ = load_config(tiny_config, ["train.cuda_graph=true", *words])
    world = World(0, 1, torch.device(device), strategy)
    with pytest.raises(UserError, match=text):
        uses_graph(config, world)
    assert not uses_graph(load_config(tiny_config, [])[0], world)
