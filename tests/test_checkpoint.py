"""Checkpoints: bitwise round trips, whole or not at all, damage passed over by name, nothing in them that runs."""
import contextlib
import copy
import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ijepa_fast import checkpoint, checkpoint_cli
from ijepa_fast.checkpoint import Checkpoints, verify
from ijepa_fast.config import Config, validate
from ijepa_fast.distributed import World
from ijepa_fast.durable import checksum
from ijepa_fast.errors import UserError
from ijepa_fast.run import TrainState

ALONE = World(rank=0, size=1, device=torch.device("cpu"), strategy="single")
CONFIG = validate({"data": {"root": "photographs"}}, "test")


class Model(nn.Module):
    """A matrix, a bias, a norm and a frozen table, as the encoders have."""

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, 3)
        self.norm = nn.LayerNorm(3)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x)) + self.pos_embed.mean((0, 1))


def new_state(seed: int, width: int = 4, updates: int = 0) -> TrainState:
    torch.manual_seed(seed)
    encoder, predictor = Model(width), nn.Linear(3, 2)
    trained = [p for p in (*encoder.parameters(), *predictor.parameters()) if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    state = TrainState(
        encoder, predictor, copy.deepcopy(encoder).requires_grad_(False), torch.optim.AdamW(groups, lr=0.1, fused=True)
    )
    for n in range(updates):
        update(state, n)
    return state


def update(state: TrainState, n: int) -> None:
    x = torch.randn(7, state.encoder.fc.in_features, generator=torch.Generator().manual_seed(n))
    state.predictor(state.encoder(x)).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    with torch.no_grad():
        for target, source in zip(state.target_encoder.parameters(), state.encoder.parameters(), strict=True):
            target.lerp_(source, 0.1)


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Everything that has to survive, by name."""
    named = {f"{part}.{name}": t for part, weights in state.weights().items() for name, t in weights.items()}
    for i, values in state.optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{i}.{name}": value for name, value in values.items()}
    return named


def same(a: TrainState, b: TrainState) -> bool:
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def save(run: Checkpoints, step: int, state: TrainState, config: Config) -> None:
    run.begin(step, state, config)
    run.wait()


@pytest.fixture
def run(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "run", keep_last=3, world=ALONE)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> tuple[Path, TrainState, TrainState]:
    """A run folder with checkpoints of steps 2 and 5, and the state at each."""
    folder = tmp_path_factory.mktemp("template") / "run"
    run = Checkpoints(folder, keep_last=3, world=ALONE)
    state = new_state(0, updates=2)
    early = copy.deepcopy(state)
    save(run, 2, state, CONFIG)
    for n in (2, 3, 4):
        update(state, n)
    save(run, 5, state, CONFIG)
    return folder, early, state


@pytest.fixture
def two(run, template) -> tuple[Checkpoints, TrainState, TrainState]:
    """A copy of `template` of one's own."""
    folder, *states = template
    shutil.copytree(folder, run.folder.parent)
    return run, *copy.deepcopy(states)


def shard(path: Path) -> Path:
    (only,) = path.glob("*.safetensors")
    return only


def test_round_trip_is_bitwise(two):
    run, _, state = two
    said = []
    loaded = new_state(1)
    assert run.resume(loaded, said.append) == (5, run.path(5))
    assert said == []
    assert same(loaded, state)
    assert any(name.endswith(".step") for name in tensors(loaded))
    # And what comes after is the same too: nothing that an update needs was left behind.
    update(state, 5)
    update(loaded, 5)
    assert same(loaded, state)


def test_loading_replaces_the_state_of_a_run_that_has_one(two):
    run, _, state = two
    loaded = new_state(1, updates=3)
    run.resume(loaded, print)
    assert same(loaded, state)


def test_loading_keeps_the_tensors_in_place(two):
    run, _, _ = two
    loaded = new_state(1)
    before = [p.data_ptr() for p in loaded.encoder.parameters()]
    run.resume(loaded, print)
    assert [p.data_ptr() for p in loaded.encoder.parameters()] == before


def test_keep_last(run):
    state = new_state(0, updates=1)
    for step in range(1, 6):
        save(run, step, state, CONFIG)
    assert run.steps() == [3, 4, 5]
    assert sorted(path.name for path in run.folder.iterdir()) == [f"step_{step:08d}" for step in (3, 4, 5)]


def test_steps_sort_as_numbers_and_ignore_what_is_no_checkpoint(run):
    for name in ("step_00000010", "step_00000009", "step_1", ".writing_step_00000011", "notes"):
        (run.folder / name).mkdir(parents=True)
    assert run.steps() == [9, 10]


def test_nothing_in_a_checkpoint_can_run(two):
    path = two[0].path(5)
    assert {p.name for p in path.iterdir()} == {"checkpoint.json", shard(path).name}
    about = json.loads((path / "checkpoint.json").read_text())
    assert about["step"] == 5
    assert Config.model_validate(about["config"]) == CONFIG
    data = shard(path).read_bytes()  # a safetensors file: length of the header, header in JSON, raw tensors
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    assert len(data) == 8 + length + sum(end - start for start, end in (t["data_offsets"] for t in header.values()))
    assert {name.partition(".")[0] for name in header} == {"encoder", "predictor", "target_encoder", "optimizer"}


def test_a_crash_while_writing_leaves_the_previous_one(two, monkeypatch):
    run, _, state = two

    class Crash(BaseException):
        pass

    def crash(*args):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(Crash):
            save(run, 9, new_state(3, updates=1), CONFIG)
    assert run.steps() == [2, 5]
    assert list(run.folder.glob(".writing_*"))

    loaded = new_state(1)
    assert run.resume(loaded, print) == (5, run.path(5))
    assert same(loaded, state)

    save(run, 6, state, CONFIG)
    assert not list(run.folder.glob(".writing_*"))
    assert run.steps() == [2, 5, 6]


def test_it_gets_its_name_only_when_all_of_it_is_written(two, monkeypatch):
    run, _, state = two
    written = []
    rename = os.rename

    def watch(source, target):
        written.append({path.name for path in Path(source).iterdir()})
        assert not Path(target).exists()
        rename(source, target)

    monkeypatch.setattr(os, "rename", watch)
    save(run, 6, state, CONFIG)
    assert written == [{path.name for path in run.path(6).iterdir()}]


def truncate(path: Path) -> None:
    os.truncate(shard(path), shard(path).stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    data = bytearray(shard(path).read_bytes())
    data[-5] ^= 4
    shard(path).write_bytes(data)


def remove_shard(path: Path) -> None:
    shard(path).unlink()


def empty_shard(path: Path) -> None:
    shard(path).write_bytes(b"")


def break_json(path: Path) -> None:
    file = path / "checkpoint.json"
    file.write_text(file.read_text()[:-40])


def json_of_something_else(path: Path) -> None:
    (path / "checkpoint.json").write_text("[1, 2]")


def json_without_files(path: Path) -> None:
    (path / "checkpoint.json").write_text('{"format": 1, "step": 5}')


def remove_json(path: Path) -> None:
    (path / "checkpoint.json").unlink()


DAMAGE = [
    truncate, flip_a_bit, remove_shard, empty_shard, break_json, json_of_something_else, json_without_files, remove_json
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_by_name(damage, two):
    run, early, _ = two
    damage(run.path(5))
    said = []
    loaded = new_state(1)
    assert run.resume(loaded, said.append) == (2, run.path(2))
    assert same(loaded, early)
    (sentence,) = said
    assert sentence.startswith("checkpoint passed over: ")
    assert str(run.path(5)) in sentence
    assert "\n" not in sentence


def test_all_damaged_is_an_error_and_not_a_start_from_scratch(two):
    run, _, _ = two
    truncate(run.path(2))
    break_json(run.path(5))
    said = []
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole; start anew in another train\.folder"):
        run.resume(new_state(1), said.append)
    assert len(said) == 2


def test_a_passed_over_checkpoint_is_replaced_when_its_step_comes_again(two):
    run, _, state = two
    truncate(run.path(5))
    run.resume(new_state(1), lambda _: None)
    save(run, 5, state, CONFIG)
    loaded = new_state(2)
    assert run.resume(loaded, print) == (5, run.path(5))
    assert same(loaded, state)


def test_keep_last_counts_no_checkpoint_that_was_passed_over(two):
    run, _, _ = two
    run.keep_last = 1
    truncate(run.path(5))
    loaded = new_state(1)
    run.resume(loaded, lambda _: None)
    update(loaded, 2)
    save(run, 3, loaded, CONFIG)
    again = new_state(2)
    assert run.resume(again, print) == (3, run.path(3))
    assert same(again, loaded)


def test_a_later_format_is_named(two):
    run, _, _ = two
    file = run.path(5) / "checkpoint.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    assert verify(run.path(5), ALONE) == f"{run.path(5)} has checkpoint format 3; this version reads 2 and 1"


def test_every_byte_of_checkpoint_json_counts(two):
    """Any flipped bit but in white space and in what JSON spells in two ways."""
    run, _, _ = two
    file = run.path(5) / "checkpoint.json"
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        if whole[at : at + 1].isspace():
            continue
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        problem = verify(run.path(5), ALONE)
        assert problem is not None, whole[max(0, at - 20) : at + 20]
        assert "\n" not in problem
    file.write_bytes(whole)
    assert verify(run.path(5), ALONE) is None


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ("null", "it: Input should be"),
        ("[]", "it: Input should be"),
        ("[" * 100_000, "nested too deep"),
        ("{}", "has checkpoint format None"),
        ({"files": {}}, "files: Dictionary should have at least 1 item"),
        ({"step": "x"}, "step: Input should be a valid integer"),
        ({"step": -1}, "step: "),
        ({"config": None}, "config: "),
        ({"files": {"shard.safetensors": "x"}}, "files.shard.safetensors: "),
        ({"files": {"../shard.safetensors": [1, 2]}}, "../shard.safetensors is no name of a shard"),
        ({"digest": ""}, "its digest is another"),
        ({"step": 6}, "its digest is another"),
    ],
)
def test_checkpoint_json_of_another_shape(about, words, two):
    run, _, _ = two
    file = run.path(5) / "checkpoint.json"
    file.write_text(about if isinstance(about, str) else json.dumps(json.loads(file.read_text()) | about))
    problem = verify(run.path(5), ALONE)
    assert words in problem
    assert problem.startswith(str(run.path(5)))
    assert "\n" not in problem


def test_a_checkpoint_of_the_first_format_has_no_digest(two):
    run, _, state = two
    file = run.path(5) / "checkpoint.json"
    about = json.loads(file.read_text()) | {"format": 1}
    del about["digest"]
    file.write_text(json.dumps(about))
    loaded = new_state(1)
    assert run.resume(loaded, print) == (5, run.path(5))
    assert same(loaded, state)


def rewrite(run: Checkpoints, step: int, change) -> None:
    """Change the shard, and let checkpoint.json agree with it, as someone would who makes a checkpoint by hand."""
    change(shard(run.path(step)))
    file = run.path(step) / "checkpoint.json"
    about = json.loads(file.read_text())
    about["files"] = {shard(run.path(step)).name: checksum(shard(run.path(step)))}
    file.write_text(json.dumps(about | {"digest": checkpoint.digest(about)}))


def test_a_pickle_in_the_place_of_a_shard(two):
    run, _, _ = two
    rewrite(run, 5, lambda path: torch.save({"a": torch.ones(2)}, path))
    assert f"{shard(run.path(5))} is no safetensors file: " in verify(run.path(5), ALONE)


def test_weights_that_are_not_finite(two):
    run, _, _ = two

    def poison(path: Path) -> None:
        with safe_open(path, "pt") as file:
            held, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        held["encoder.fc.weight"][0, 0] = float("nan")
        save_file(held, path, metadata=about)

    rewrite(run, 5, poison)
    with pytest.raises(UserError, match=r"holds numbers that are not finite, in encoder\.fc\.weight: "):
        run.resume(new_state(1), print)


def test_checkpoint_of_another_width(two):
    with pytest.raises(UserError, match=r"checkpoint of another model: its encoder\.fc\.weight has shape \(3, 4\), "):
        two[0].resume(new_state(1, width=6), print)


def test_checkpoint_of_another_depth(two):
    other = new_state(1)
    other.encoder.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"checkpoint of another model: it holds no encoder\.extra\.weight"):
        two[0].resume(other, print)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The disk is full: this process can write no file beyond `size` bytes, for Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 1500])  # in the first byte, the shard's header, the shard's tensors
def test_disk_full_keeps_the_previous_checkpoint(size, two):
    run, _, state = two
    assert shard(run.path(5)).stat().st_size > 1500
    with files_of_at_most(size), pytest.raises(UserError) as caught:
        save(run, 6, new_state(3, updates=1), CONFIG)
    sentence = str(caught.value)
    assert sentence.startswith(f"the checkpoint of step 6 could not be written to {run.folder}: File too large; ")
    assert "that of step 5 is intact" in sentence
    assert "\n" not in sentence
    assert [path.name for path in sorted(run.folder.iterdir())] == ["step_00000002", "step_00000005"]
    loaded = new_state(1)
    assert run.resume(loaded, print) == (5, run.path(5))
    assert same(loaded, state)


def test_disk_full_at_the_first_checkpoint(run):
    with files_of_at_most(100), pytest.raises(UserError, match="there is no earlier one"):
        save(run, 1, new_state(0, updates=1), CONFIG)
    assert run.steps() == []


def test_disk_full_when_checkpoint_json_is_written(two, monkeypatch):
    run, _, _ = two

    def full(path: Path, text: str) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "write_durably", full)
    with pytest.raises(UserError, match="No space left on device; that of step 5 is intact"):
        save(run, 6, new_state(3, updates=1), CONFIG)
    assert run.steps() == [2, 5]


def test_open_starts_a_run_once(run):
    said = []
    assert run.open(new_state(0), CONFIG, resume=False, report=said.append) == 0
    assert said == []
    with pytest.raises(UserError, match=r"already holds a run; go on with --resume, or choose another train\.folder"):
        run.open(new_state(0), CONFIG, resume=False, report=said.append)


def test_open_resumes(two):
    run, _, state = two
    with pytest.raises(UserError, match=r"there is no run in .* to resume; leave out --resume to start one"):
        run.open(new_state(1), CONFIG, resume=True)
    (run.folder.parent / "config.yaml").write_text(CONFIG.to_yaml())
    said, loaded = [], new_state(1)
    assert run.open(loaded, CONFIG, resume=True, report=said.append) == 5
    assert said == [f"resumed from {run.path(5)}"]
    assert same(loaded, state)


def test_open_says_when_there_is_no_checkpoint_yet(run):
    run.open(new_state(0), CONFIG, resume=False)
    said = []
    assert run.open(new_state(0), CONFIG, resume=True, report=said.append) == 0
    assert said == [f"{run.folder.parent} holds no checkpoint yet: starting from step 0"]


def test_open_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = Checkpoints(tmp_path / "file" / "run", keep_last=1, world=ALONE)
    with pytest.raises(UserError, match=r"cannot be written: .*/file is no folder"):
        run.open(new_state(0), CONFIG, resume=False)


def test_a_run_folder_can_be_moved(two, tmp_path):
    run, _, state = two
    shutil.move(run.folder.parent, tmp_path / "moved")
    loaded = new_state(1)
    assert Checkpoints(tmp_path / "moved", 3, ALONE).resume(loaded, print)[0] == 5
    assert same(loaded, state)


def test_the_command_line_lists_verifies_and_exports(two, tmp_path, capsys):
    run, _, state = two
    out = tmp_path / "weights.safetensors"
    assert checkpoint_cli.main([str(run.folder.parent), "--export", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{run.path(5)}: step 5" in shown
    assert "sizes and checksums verified" in shown
    weights = load_file(out)
    expected = {name: t for name, t in tensors(state).items() if not name.startswith("optimizer.")}
    assert weights.keys() == expected.keys()
    assert all(weights[name].dtype == torch.float32 and torch.equal(weights[name], expected[name]) for name in expected)

    assert checkpoint_cli.main([str(run.path(5)), "--export", str(tmp_path / "nowhere" / "weights")]) == 2
    assert capsys.readouterr().err.endswith("weights cannot be written: No such file or directory\n")
    truncate(run.path(5))
    assert checkpoint_cli.main([str(run.path(5))]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert checkpoint_cli.main([str(tmp_path / "nothing")]) == 2
    assert "is neither a checkpoint nor a run folder" in capsys.readouterr().err


def test_a_failed_resume_leaves_the_run_as_it_was(two):
    """config.yaml is written anew on resume, since some keys may change; a full disk must not empty it."""
    run, _, _ = two
    kept = run.folder.parent / "config.yaml"
    kept.write_text(CONFIG.to_yaml())
    with files_of_at_most(10), pytest.raises(UserError, match="cannot be written"):
        run.open(new_state(1), CONFIG, resume=True)
    assert kept.read_text() == CONFIG.to_yaml()
    assert run.open(new_state(1), CONFIG, resume=True) == 5
