"""One process, DDP, FSDP2 and HSDP compute the same; a checkpoint goes from any of them to any other."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import parallel_jobs as jobs
import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file, save_file

from ijepa_fast.config import validate
from ijepa_fast.distributed import World
from ijepa_fast.metrics import read_log
from ijepa_fast.model import build_encoder
from ijepa_fast.parallel import parallelize

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # this process joins no group
]

STEPS = 20
# What differs is the order of sums (6e-8 relative in fp32). AdamW divides a gradient by its own size, so where one has
# nearly cancelled its rounding counts in full, times the learning rate of 1e-3: hence 1e-5, of losses and of weights.
TOLERANCE = 1e-5
GIANT = str(Path(__file__).parents[1] / "configs" / "vitg16_in22k.yaml")


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


@pytest.mark.parametrize(("asked", "compiled"), [(True, True), ("auto", False), (False, False)])
def test_compiles_where_it_is_asked_to(asked, compiled, photographs):
    config = validate({"data": {"root": str(photographs)}, "parallel": {"compile": asked}}, "this test")
    with torch.device("meta"):
        encoder = build_encoder("vit_tiny", image_size=224, patch_size=16)
    parallelize(encoder, config, World(0, 1, torch.device("cuda"), "single"), trained=True)
    assert all((block._compiled is not None) == compiled for block in encoder.blocks)


@pytest.fixture(scope="module")
def words(photographs, tmp_path_factory) -> Callable[..., list[str]]:
    config = tmp_path_factory.mktemp("config") / "parallel.yaml"
    config.write_text(jobs.CONFIG.replace("ROOT", str(photographs)))
    return lambda folder, *more: ["--config", str(config), f"train.folder={folder}", *more]


@pytest.fixture(scope="module")
def run(words, ranks, tmp_path_factory) -> Callable[..., Path]:
    """`run(4, "fsdp", ...)`: the folder of a whole run; each is computed once."""
    done: dict[tuple, Path] = {}

    def run(size: int, strategy: str, *more: str) -> Path:
        key = (size, strategy, *more)
        if key not in done:
            folder = tmp_path_factory.mktemp("run") / "run"
            for left in ranks.run(size, jobs.train, words(folder, f"parallel.strategy={strategy}", *more)):
                assert left.result == 0, left.err
                assert left.err == ""
            done[key] = folder
        return done[key]

    return run


def losses(folder: Path) -> list[float]:
    rows = read_log(folder)[0]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def assert_same(folder: Path, reference: Path) -> None:
    """Losses and everything in the last checkpoint, the optimizer's state among it, to `TOLERANCE`."""
    assert losses(folder) == pytest.approx(losses(reference), abs=TOLERANCE, rel=0)
    assert read_log(folder)[1][-1]["knn"] == read_log(reference)[1][-1]["knn"]
    ours, theirs = jobs.weights(folder), jobs.weights(reference)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=TOLERANCE, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def assert_identical(folder: Path, reference: Path) -> None:
    assert losses(folder) == losses(reference)
    ours, theirs = jobs.weights(folder), jobs.weights(reference)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


HSDP = ("hsdp", "parallel.shard_size=2")
FULL, SELECTIVE = "parallel.checkpointing=full", "parallel.checkpointing=selective"


def cases(*usual: tuple, slow: tuple[tuple, ...] = ()) -> pytest.MarkDecorator:
    """Parametrize `case`: (processes, strategy, more words ...)."""
    marked = [pytest.param(case, marks=pytest.mark.slow) for case in slow]
    return pytest.mark.parametrize("case", [*usual, *marked], ids=lambda case: "-".join(map(str, case)))


@cases(
    *((2, "ddp"), (2, "fsdp"), (3, "fsdp"), (4, *HSDP), (2, "fsdp", FULL), (2, "fsdp", SELECTIVE)),
    slow=((4, "fsdp"), (2, "ddp", FULL), (4, *HSDP, SELECTIVE)),
)
def test_every_strategy_computes_what_one_process_does(case, run):
    assert_same(run(*case), run(1, "single"))


def test_a_run_learns_and_another_seed_is_another_run(run):
    """What the other tests would compare in vain if it were not so."""
    one, other = losses(run(1, "single")), losses(run(1, "single", "train.seed=1"))
    assert one[-1] < 0.8 * one[0]
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 100 * TOLERANCE


# The shortest contexts of each group, and several contexts an image.
TRUNCATED = ("mask.collate=truncate", "mask.sampler=reference", "mask.group=2", "log.every=1")
TWO_CONTEXTS = ("mask.num_contexts=2", "mask.num_targets=3")


@pytest.mark.parametrize("masks", [TRUNCATED, TWO_CONTEXTS], ids=["truncated", "two contexts"])
def test_masks_do_not_see_how_a_batch_is_split(masks, run):
    """6 images a rank, in micro-batches of 4 and 2."""
    alone = run(1, "single", *masks)
    assert_same(run(2, "ddp", *masks, "optim.micro_batch=4"), alone)
    assert max(abs(a - b) for a, b in zip(losses(alone), losses(run(1, "single")), strict=True)) > 100 * TOLERANCE


def test_rank_0_alone_writes_and_speaks(run, words, ranks, tmp_path):
    more = (*TRUNCATED, "optim.epochs=1", "log.tensorboard=true", "parallel.strategy=ddp")
    first, second = ranks.run(2, jobs.train, words(tmp_path / "run", *more))
    assert (first.result, second.result, second.out) == (0, 0, "")
    for step in range(1, 6):
        assert first.out.count(f"step {step}/5 ") == 1
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 1 + 5
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1  # each writer makes a file of its own


def test_both_ranks_write_a_part_of_the_checkpoint(run):
    path = run(2, "ddp") / "checkpoints" / "step_00000020"
    files = json.loads((path / "checkpoint.json").read_text())["files"]
    assert len(files) == 2
    assert set(files) | {"checkpoint.json"} == {p.name for p in path.iterdir()}
    sizes = [(path / name).stat().st_size for name in files]
    assert min(sizes) > 0.2 * sum(sizes)


@cases((2, "fsdp"), slow=((2, "ddp"),))
def test_in_bfloat16_every_strategy_computes_what_one_process_does(case, run):
    """As closely as in fp32: what is rounded to bf16 is rounded at the same places, before anything is summed.

    FSDP sends matrices in bf16, which their products would cast them to, and norms and positions in fp32; gradients are
    summed over micro-batches and ranks in fp32.
    """
    bf16 = "model.compute_dtype=bfloat16"
    assert_same(run(*case, bf16), run(1, "single", bf16))
    assert losses(run(1, "single", bf16)) != pytest.approx(losses(run(1, "single")), abs=TOLERANCE, rel=0)


@cases(slow=((2, "fsdp"), (2, "ddp")))
def test_with_targets_in_e4m3_every_strategy_computes_what_one_process_does(case, run):
    """Shards are gathered, then rounded at every call; one process keeps its weights rounded."""
    fp8 = "model.target_dtype=fp8", "model.fp8_blocks=all"
    assert_same(run(*case, *fp8), run(1, "single", *fp8))
    assert losses(run(1, "single", *fp8)) != pytest.approx(losses(run(1, "single")), abs=TOLERANCE, rel=0)


@cases((2, "fsdp", SELECTIVE), slow=((1, "single"), (2, "fsdp"), (2, "ddp", FULL)))
def test_compiled_blocks(case, run, words, ranks, tmp_path):
    size, *strategy = case
    more = (*strategy[1:], f"parallel.strategy={strategy[0]}", "parallel.compile=true")
    for left in ranks.run(size, jobs.train_compiled, words(tmp_path / "run", *more)):
        # Target, its last block, context, the predictor's first and last: not one for each block or number of tokens.
        assert left.result == (0, 5), left.err
        assert left.err == ""
    assert_same(tmp_path / "run", run(1, "single"))


# --- updates that are skipped -----------------------------------------------------------------------------------------

SPOILED = {2, 5}
SHORT = ("optim.epochs=1", "log.probe_every=null")  # 5 steps


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_skip_an_update_whose_loss_is_not_finite_on_one(strategy, words, ranks, tmp_path):
    """And compute what one process does without these updates."""
    folders = []
    for size, how in ((1, "single"), (2, strategy)):
        folders.append(tmp_path / how)
        job = words(folders[-1], f"parallel.strategy={how}", *SHORT)
        for left in ranks.run(size, jobs.train_spoiled, job, size - 1, SPOILED):
            assert left.result == (0, len(SPOILED)), left.err
            assert left.err == ""
    (want, rows) = (read_log(folder)[0] for folder in folders)
    assert [row["step"] for row in rows if row["loss"] is None] == sorted(SPOILED)
    made = [[row["loss"] for row in some if row["loss"] is not None] for some in (rows, want)]
    assert made[0] == pytest.approx(made[1], abs=TOLERANCE, rel=0)
    theirs, ours = map(jobs.weights, folders)
    assert {float(x) for name, x in ours.items() if name.endswith(".step")} == {5.0 - len(SPOILED)}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=TOLERANCE, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_all_ranks_stop_after_ten_skipped_updates(words, ranks, tmp_path):
    job = words(tmp_path / "run", "parallel.strategy=ddp", "log.probe_every=null")
    left = ranks.run(2, jobs.train_spoiled, job, 1, set(range(2, 20)))
    assert [rank.result for rank in left] == [(2, 10), (2, 10)], left  # read after each step, as one is to be saved
    assert "error: 10 updates in a row were skipped, up to step 11, whose loss is nan, so " in left[0].err
    assert left[1].err == ""
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


# --- checkpoints from any world to any other --------------------------------------------------------------------------


@cases((1, "single"), (2, "fsdp"), (2, "ddp"), (4, "fsdp"), (4, *HSDP))
def test_saved_by_four_resumed_by(case, run, words, ranks, tmp_path):
    four = run(4, "fsdp")
    folder = tmp_path / "run"
    shutil.copytree(four, folder, ignore=shutil.ignore_patterns("step_00000015", "step_00000020"))
    more = [f"parallel.strategy={case[1]}", *case[2:], "--resume"]
    for left in ranks.run(case[0], jobs.train, words(folder, *more)):
        assert left.result == 0, left.err
    if case == (4, "fsdp"):
        assert_identical(folder, four)
    else:
        assert_same(folder, four)


def test_from_one_process_to_shards_to_replicas_and_back(run, words, ranks, tmp_path):
    """Each of them stopped by a signal that comes to one rank alone."""
    folder, resume = tmp_path / "run", []
    stages = [(1, 3, "single"), (4, 6, *HSDP), (2, 9, "ddp"), (3, 13, "fsdp"), (1, 20, "single")]
    for size, step, strategy, *more in stages:
        job = words(folder, f"parallel.strategy={strategy}", *more, *resume)
        for left in ranks.run(size, jobs.train_until, job, step):
            assert left.result == 0, left.err
        assert max((folder / "checkpoints").iterdir()).name == f"step_{step:08d}"
        resume = ["--resume"]
    assert_same(folder, run(1, "single"))


@pytest.mark.parametrize(
    ("paces", "most", "stride"),
    [([0.1, 0.2], 50, 10), ([0.01, 0.02], 20, 20), ([5.0, 0.1], 50, 1)],
    ids=["by_the_slowest", "by_the_log", "after_each"],
)
def test_ranks_ask_each_other_at_the_same_steps(paces, most, stride, ranks):
    """Twice as far each time, up to what takes the slowest rank two seconds, and no further than the log's steps."""
    one, other = (left.result for left in ranks.run(2, jobs.vote, paces, 100, most))
    assert one == other
    asked, left = one
    gaps = [b - a for a, b in zip([0, *asked], asked, strict=False)]
    assert gaps[:3] == ([1, 1, 1] if stride == 1 else [1, 2, 4])
    assert max(gaps) == gaps[-1] == stride
    assert 100 <= left < 100 + stride


def test_a_signal_to_one_rank_ends_all_within_the_steps_of_the_log(run, words, ranks, tmp_path):
    folder, more = tmp_path / "run", ("parallel.strategy=ddp",)
    for left in ranks.run(2, jobs.train_until, words(folder, *more), 8, False):
        assert left.result == 0, left.err
    assert 8 <= int(max((folder / "checkpoints").iterdir()).name.removeprefix("step_")) < 8 + 5
    for left in ranks.run(2, jobs.train, words(folder, *more, "--resume")):
        assert left.result == 0, left.err
    assert_identical(folder, run(2, "ddp"))


# --- shards -----------------------------------------------------------------------------------------------------------


def test_nothing_stays_whole_and_some_shards_are_empty(words, ranks, tmp_path):
    """Not after a probe, nor after the target's forward, nor after the forward of what is trained."""
    more = ("parallel.strategy=fsdp", "optim.epochs=1", "log.probe_every=2")
    *_, last = ranks.run(4, jobs.train_watching_shards, words(tmp_path / "run", *more))
    assert last.result is not None, last.err
    code, looks, empty = last.result
    assert code == 0
    assert looks == 5 * (1 + 2)  # 5 updates of 2 micro-batches
    assert empty > 0


def test_rank_0_reads_the_headers_for_all(words, ranks, tmp_path):
    left = ranks.run(4, jobs.count_scans, words(tmp_path / "run"), str(tmp_path / "cache"))
    assert [rank.result for rank in left] == [1, 0, 0, 0], left


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "hsdp"])
def test_giant_on_the_meta_device(strategy, ranks):
    more = ["data.root=nowhere", f"parallel.strategy={strategy}", "parallel.checkpointing=selective"]
    (left,) = ranks.run(1, jobs.shard_giant, GIANT, more)
    assert left.result is not None, left.err
    (encoder, groups, sharded), (_, predictor_groups, predictor_sharded), target = left.result

    dim, hidden, depth = 1408, 6144, 40
    block = 4 * dim + (3 * dim + 1) * dim + 2 * dim + (dim + 1) * dim + (dim + 1) * hidden + (hidden + 1) * dim
    assert encoder == depth * block + (3 * 16**2 + 1) * dim + 14**2 * dim + 2 * dim
    assert round(encoder / 1e9, 2) == 1.01
    assert target == (encoder, groups, sharded)
    if strategy in ("fsdp", "hsdp"):
        assert (groups, predictor_groups) == (40 + 1, 16 + 1)
        assert sharded
        assert predictor_sharded
    else:
        assert groups == predictor_groups == 0


@pytest.mark.slow
def test_two_blocks_of_the_giant_s_width_train(words, ranks, tmp_path):
    more = (
        "model.name=vit_giant", "model.patch_size=16", "data.image_size=96", "model.predictor_depth=1",
        "model.predictor_dim=384", "optim.global_batch_size=2", "optim.micro_batch=1",
    )  # fmt: skip
    (alone,) = ranks.run(1, jobs.train_wide, words(tmp_path, *more))
    assert alone.result is not None, alone.err
    assert alone.result[2] < alone.result[0]
    sharded = ("parallel.strategy=fsdp", "parallel.checkpointing=selective")
    for left in ranks.run(2, jobs.train_wide, words(tmp_path, *more, *sharded)):
        assert left.result == pytest.approx(alone.result, abs=TOLERANCE, rel=0), left.err


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_rank_starts_from_the_weights_that_rank_0_reads(strategy, words, ranks, run, tmp_path):
    path = run(1, "single")
    held = jobs.weights(path)
    if strategy == "ddp":  # of a file with the target encoder alone, which both begin with
        path = tmp_path / "target.safetensors"
        save_file({name: value for name, value in held.items() if name.startswith("target_encoder.")}, path)
    more = (f"parallel.strategy={strategy}", f"train.init_from={path}")
    for left in ranks.run(2, jobs.start_from, words(tmp_path / "run", *more)):
        assert left.result, left.err
        said, weights = left.result
        assert said.endswith("a new predictor" if strategy == "ddp" else "both encoders and the predictor")
        for name, value in weights.items():
            if strategy == "fsdp":
                assert (value == held[name].numpy()).all(), name
            elif not name.startswith("predictor."):
                assert (value == held["target_encoder." + name.split(".", 1)[1]].numpy()).all(), name


def test_ranks_evaluate_as_one_process_does(ranks, photographs, tmp_path):
    """Bit for bit what is computed from features; training sums gradients in another order, at most an image apart."""
    words = ["random:vit_tiny/4@24", "--data", str(photographs), "--threads", "1", "--batch", "5", "--epochs", "2"]
    words += ["--probe", "knn,logistic,attentive,finetune", "--k", "3", "--views", "2"]
    found, features = [], []
    for size in (1, 2):
        cache, file = tmp_path / f"cache{size}", tmp_path / f"{size}.json"
        for left in ranks.run(size, jobs.evaluate, [*words, "--cache", str(cache), "--json", str(file)]):
            assert (left.result, left.err) == (0, "")
        found.append(json.loads(file.read_text())["results"])
        features.append({one.name: load_file(one) for one in cache.iterdir()})
    assert features[0].keys() == features[1].keys()
    assert len(features[0]) == 4  # train, val, and two views of train
    for name, tensors in features[0].items():
        assert all(torch.equal(value, features[1][name][key]) for key, value in tensors.items())
    for one, two in zip(*found, strict=True):
        if one["probe"] in ("attentive", "finetune"):
            assert two["value"] == pytest.approx(one["value"], abs=1 / 8 + 1e-9)
        else:
            assert one == two
    assert {row["probe"] for row in found[0]} == {"rank", "knn", "logistic", "attentive", "finetune"}
