import copy
import dataclasses
import json

import pytest
import torch

from bench.harness.profiling import peak_bytes
from ijepa_fast import plan
from ijepa_fast.config import load_config
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.model import build_encoder, build_predictor
from ijepa_fast.objective import ijepa_loss
from ijepa_fast.optim import build_optimizer

GIANT = "configs/vitg16_in22k.yaml"
SMALL = [
    "model.name=vit_tiny", "model.predictor_depth=4", "model.predictor_dim=96", "model.patch_size=16",
    "data.root=.", "data.image_size=224", "optim.global_batch_size=8", "optim.micro_batch=8",
    "mask.collate=ragged", "parallel.cpu_threads=1",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_memory_is_what_a_real_run_takes(checkpointing, monkeypatch):
    """Peak sum of live tensor storages of two micro-batches and an update, on a CPU in fp32, within 10 %.

    ViT-Ti/16 at the shapes of ViT-B/16, so that activations, which are what is hard to foresee, are 9/10 of it.
    """
    config, _ = load_config("configs/vitb16_in1k.yaml", SMALL)
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny", image_size=224, patch_size=16)
    predictor = build_predictor(encoder, depth=4, dim=96)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    for model in (encoder, predictor):
        for block in model.modules():
            if hasattr(block, "checkpointing"):
                block.checkpointing = checkpointing
    optimizer = build_optimizer(encoder, predictor)
    sampler = MultiBlockMasks(config.mask, config.grid, 0, 8)
    images = torch.randint(256, (8, 224, 224, 3), dtype=torch.uint8)

    def update():
        for _ in range(2):
            loss = ijepa_loss(encoder, predictor, target_encoder, images, sampler.sample(0, 0, 8), denominator=1e5)
            loss.backward()
        optimizer.step()

    model = plan.describe(config)
    masks = sampler.sample(0, 0, 8)
    context, target = (packed.cu_seqlens.diff().numpy() for packed in (masks.context, masks.target))
    model = dataclasses.replace(  # the lengths of this very batch
        model,
        context=context.sum() / 8,
        target=target.sum() / 8,
        covered=len(masks.covered.rows) / 8,
        predicted_from=(context[masks.context_of.numpy()].sum() + target.sum()) / 8,
    )
    needed = plan.memory(model, "single", 1, 8, checkpointing, accumulates=True, compute=4)
    # The measure starts with weights, target and images there, and no optimizer state until the end of the update.
    at_the_turn = needed.total - needed.weights - needed.target - needed.data - needed.optimizer
    measured = peak_bytes(update, torch.device("cpu"))
    assert measured == pytest.approx(at_the_turn, rel=0.10)


def plans(capsys, *arguments: str) -> list[dict]:
    assert plan.main(["--config", GIANT, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_targets_in_e4m3_halve_their_weights_copies():
    model = plan.describe(load_config("vith14_in1k", [])[0])
    bf16, low = (
        plan.memory(model, "single", 1, 8, "none", accumulates=False, compute=2, target=target) for target in (None, 1)
    )
    assert bf16.copies - low.copies == model.encoder_parameters
    assert bf16._replace(copies=0) == low._replace(copies=0)


@pytest.mark.parametrize("blocks", ["inner", "all"])
def test_products_in_e4m3_take_half_the_time(blocks, capsys):
    """Those of the blocks of the target encoder: by the formula of FLOPs less what stays in bf16."""
    bf16, low = (
        next(p for p in plans(capsys, "--gpus", "8", *words) if p["checkpointing"] == "none")
        for words in ((), ("model.target_dtype=fp8", f"model.fp8_blocks={blocks}"))
    )
    assert low["gflop_image"] == bf16["gflop_image"]
    model = plan.describe(load_config("vitg16_in22k", [])[0])
    size, n = model.encoder, model.patches
    finished = [n] * (size.depth - 1) + [model.covered]  # by each block
    of = range(size.depth) if blocks == "all" else range(1, size.depth - 1)
    wide = sum(
        2 * size.dim**2 * finished[i] + 4 * size.dim * n**2  # projections, attention
        + (0 if i in of else 2 * 3 * size.dim**2 * n + 4 * size.dim * size.mlp_dim * finished[i])
        for i in range(size.depth)
    )  # fmt: skip
    wide += 2 * 3 * 16**2 * size.dim * n  # patches
    low_share = (model.flops_target - wide) / model.flops("none")
    assert low["compute_s"] / bf16["compute_s"] == pytest.approx(1 - low_share / 2, rel=1e-6)


def test_what_the_giant_holds_before_activations(capsys):
    (single,) = [p for p in plans(capsys, "--gpus", "1") if p["checkpointing"] == "full"]
    held = single["memory_gib"]
    # 1.01 G parameters of the context encoder at 20 bytes are 18.8 GiB; the predictor's 30 M at 16 are another 0.4.
    assert held["weights"] + held["target"] + held["gradients"] + held["optimizer"] == pytest.approx(19.3, abs=0.1)


def test_sharding_divides_what_it_shards_and_nothing_else(capsys):
    by = {(p["strategy"], p["checkpointing"]): p for p in plans(capsys, "--gpus", "64")}
    assert {strategy for strategy, _ in by} == {"ddp", "fsdp", "hsdp"}
    ddp, fsdp, hsdp = (by[strategy, "none"]["memory_gib"] for strategy in ("ddp", "fsdp", "hsdp"))
    for part in ("weights", "target", "optimizer"):
        assert fsdp[part] == pytest.approx(ddp[part] / 64)
        assert hsdp[part] == pytest.approx(ddp[part] / 8)
    assert fsdp["activations"] == ddp["activations"]
    # 32 images of each of 64 GPUs fit at once, so no gradient waits for another micro-batch.
    assert fsdp["gradients"] == pytest.approx(ddp["gradients"] / 64)


def test_gradients_that_wait_for_the_last_micro_batch_are_whole(capsys):
    (full,) = [p for p in plans(capsys, "--gpus", "4") if (p["strategy"], p["checkpointing"]) == ("fsdp", "none")]
    assert full["micro_batch"] < 2048 / 4
    assert full["memory_gib"]["gradients"] == pytest.approx(4 * full["memory_gib"]["weights"])


@pytest.mark.parametrize("gpus", ["8", "64"])
def test_a_plan_adds_up(gpus, capsys):
    for p in plans(capsys, "--gpus", gpus):
        assert sum(value for name, value in p["memory_gib"].items() if name != "total") == pytest.approx(
            p["memory_gib"]["total"]
        )
        assert p["images_s"] == pytest.approx(2048 / max(p["compute_s"], p["communication_s"]))
        # 44 epochs of 6932 whole batches of ImageNet-22k
        assert p["days"] == pytest.approx(44 * 6932 * 2048 / p["images_s"] / 86400)
        assert not p["fits"] or p["memory_gib"]["total"] <= 80 * (1 - plan.RESERVED)


def test_full_checkpointing_fits_more_and_computes_more(capsys):
    none, _, full = plans(capsys, "--gpus", "1")
    assert full["micro_batch"] > none["micro_batch"]
    assert full["compute_s"] > none["compute_s"]


def test_bytes_that_ddp_and_fsdp_send():
    model = plan.describe(load_config(GIANT)[0])
    gpu, parameters = plan.GPUS["h100"], model.trained
    sent, seconds = plan.communication(model, gpu, 8, 1, "ddp", 1)
    assert sent == pytest.approx(2 * 4 * parameters * 7 / 8)
    assert seconds == pytest.approx(sent / 450e9)  # within a node
    sent, seconds = plan.communication(model, gpu, 16, 16, "fsdp", 3)
    gathers = 3 * 2 * (model.encoder_parameters + 2 * parameters)
    assert sent == pytest.approx((gathers + 4 * parameters) * 15 / 16)
    assert seconds == pytest.approx(sent / 50e9)  # between nodes


def test_the_table_and_the_picture(tmp_path, capsys, monkeypatch):
    from matplotlib.figure import Figure

    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (drawn.append(figure), savefig(figure, path)))
    monkeypatch.setenv("COLUMNS", "140")
    assert plan.main(["--config", GIANT, "--gpus", "64", "--out", str(tmp_path / "plan.png")]) == 0
    shown = capsys.readouterr().out
    assert "predictions" in shown
    assert all(strategy in shown for strategy in ("ddp", "fsdp", "hsdp", "selective"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert {"5k", "10k", "20k", "50k"} <= set(labels)
    assert not [label for label in labels if len(label) > 4]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "100"], "optim.global_batch_size 2048 does not divide among 100 GPUs"),
        (["--gpus", "0"], "does not divide among 0 GPUs"),
        (["--gpus", "8", "--mfu", "45"], "--mfu=45.0 must be a share of the peak"),
        (["--gpus", "8", "--gpu", "a100", "model.target_dtype=fp8"], "needs a GPU with products of e4m3, and --gpu="),
        (["--gpus", "8", "model.nam=x"], "unknown key model.nam; did you mean model.name?"),
        (["--gpus", "8", "mask.min_keep=1000"], "mask.min_keep=1000 cannot be met"),
        (["--gpus", "8", "model.predictor_dim=100"], "predictor's dim 100 must be a multiple of 4"),
        (["--gpus", "8", "--out", "/nowhere/plan.png"], "error: /nowhere/plan.png: No such file or directory"),
    ],
)
def test_bad_input(arguments, sentence, capsys):
    assert plan.main(["--config", GIANT, *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
