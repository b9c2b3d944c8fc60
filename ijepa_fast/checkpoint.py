"""Save and load a run: torch.distributed.checkpoint in safetensors files, whole or not at all.

    <run>/checkpoints/step_00000500/
        shard-*.safetensors   encoder.*, predictor.*, target_encoder.*, optimizer.* (one file a rank)
        checkpoint.json       step, config, versions; size and CRC-32 of every shard; a digest of all this

`python -m ijepa_fast.checkpoint PATH [--export FILE]` shows, verifies and exports one (`checkpoint_cli`).

A checkpoint is written to a temporary folder and renamed, so one that has its name is complete; its checksums are
verified before it is loaded. Loading runs no code from the files: tensors come from safetensors, the rest from JSON.
A run draws no random numbers after its weights' initialisation (order, crops and masks are functions of seed and step),
so there is no generator state to keep.
"""
import sys

if __name__ == "__main__":  # the door answers --help and mistakes before the imports below, which take seconds
    from ijepa_fast.__main__ import main as ijepa

    sys.exit(ijepa(["checkpoint", *sys.argv[1:]]))

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from ijepa_fast import compat
from ijepa_fast.config import Config, check_same_run, load_saved_config
from ijepa_fast.distributed import World
from ijepa_fast.durable import checksum, sync_folder, write_durably
from ijepa_fast.errors import SharedError, UserError
from ijepa_fast.run_folder import RunLock, record_change

if TYPE_CHECKING:
    from ijepa_fast.run import TrainState

FORMAT = 2  # 1, of earlier versions, has no digest
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Checkpoints:
    """The checkpoints of one run folder, written by a background thread while the run goes on.

    `begin` copies the state to the host and returns. `wait`, which the next `begin` calls as well, returns when the
    checkpoint is on the disk, or raises. The threads of all ranks have a process group of their own. `data` (see
    `Index.fingerprint`) is written into each checkpoint; one that was written over other
    data, or in another order, is not resumed.
    """

    def __init__(self, run_folder: Path, keep_last: int, world: World, data: dict[str, int] | None = None):
        self.run_folder, self.folder = run_folder, run_folder / "checkpoints"
        self.keep_last = keep_last
        self.world = world
        self.data = data
        self.bad_images: dict[str, Any] | None = None  # those of the checkpoint that was resumed
        self.extended: Config | None = None  # what the run was written with, where `open` has made it longer
        self._lock: RunLock | None = None
        self._group = world.long_timeout_group()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def open(
        self,
        state: "TrainState",
        config: Config,
        *,
        resume: bool,
        init: Callable[[], str | None] = lambda: None,
        extend: bool = False,
        report: Callable[[str], None] = lambda line: None,
    ) -> int:
        """Begin in the run folder, or go on in it; returns the number of updates already done.

        From here to `close` no other process can open it. `extend`: go on to more epochs than the run was begun with.
        `init` is called for a run that begins, and may give it other weights (train.init_from). `report` gets a line
        on what was loaded. Raises UserError where a new run would write over an old one, where
        there is nothing to resume, and where the config would not continue the run.
        """
        before = self.check_folder(config, resume, extend=extend)
        if before is not None:
            self._take_lock(report)
        done = 0
        if resume and (found := self.resume(state, report)):
            done = found[0]
            report(f"resumed from {found[1]}")
        else:
            if resume:
                report(f"{self.run_folder} holds no checkpoint yet: starting from step 0")
            if said := init():
                report(said)
        if before is None:
            with self._writing_folder():
                if self.world.is_main:
                    self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock(report)
        self._keep_config(config)
        if before is not None:
            with self._writing_folder():
                if self.world.is_main:
                    old, new = before.model_dump(mode="json"), config.model_dump(mode="json")
                    record_change(self.run_folder, done, old, new)
            self.extended = before if config.optim.epochs > before.optim.epochs else None
        return done

    def check_folder(self, config: Config, resume: bool, *, extend: bool = False) -> Config | None:
        """Raise UserError where `open` would, without writing anything. Returns the config of the run to resume."""
        kept = self.run_folder / "config.yaml"
        with self.world.raise_on_all_ranks():
            if resume and not kept.exists():
                raise UserError(f"there is no run in {self.run_folder} to resume; leave out --resume to start one")
            if resume:
                before = load_saved_config(kept)
                check_same_run(before, config, kept, extend=extend)
                return before
            if kept.exists():
                free = next(f"{self.run_folder}_{n}" for n in range(2, 10**6) if not self._run_in(n).exists())
                raise UserError(
                    f"{self.run_folder} already holds a run; go on with --resume, or choose another train.folder, for "
                    f"instance train.folder={free}"
                )
            parent = next(folder for folder in self.run_folder.absolute().parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                problem = "may not be written in" if parent.is_dir() else "is no folder"
                raise UserError(f"train.folder={self.run_folder} cannot be written: {parent} {problem}")
        return None

    def _run_in(self, n: int) -> Path:
        return self.run_folder.with_name(f"{self.run_folder.name}_{n}")

    def _take_lock(self, report: Callable[[str], None]) -> None:
        with self._writing_folder():
            if self.world.is_main and self._lock is None:
                self._lock = RunLock(self.run_folder)
        if self._lock is not None and not self._lock.held:
            report(f"the file system of {self.run_folder} has no locks: see to it that this run alone writes there")

    def _keep_config(self, config: Config) -> None:
        with self._writing_folder():
            if self.world.is_main:
                write_durably(self.run_folder / "config.yaml", config.to_yaml())

    @contextlib.contextmanager
    def _writing_folder(self) -> Iterator[None]:
        with self.world.raise_on_all_ranks():
            try:
                yield
            except OSError as error:
                raise UserError(f"train.folder={self.run_folder} cannot be written: {error.strerror}") from None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(int(p.name.removeprefix("step_")) for p in self.folder.glob("step_" + "[0-9]" * 8))

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def last(self) -> str:
        """In a few words: what a run that ends now can go on from."""
        if steps := self.steps():
            return f"{self.path(steps[-1])} is the last checkpoint; --resume goes on from it"
        return "no checkpoint was saved yet"

    def begin(
        self, step: int, state: "TrainState", config: Config, bad_images: dict[str, Any] | None = None
    ) -> None:
        """Start to write the checkpoint of `step`. When it is whole, those that `keep_last` leaves out are removed.

        `bad_images`: the run's account of them, see `data.bad.Account`.
        """
        self.wait()
        optimizer = get_optimizer_state_dict(state.trained(), state.optimizer, options=_FLAT)
        tensors = {**state.weights(), "optimizer": {k: v for k, v in optimizer.items() if isinstance(v, Tensor)}}
        copies = {
            part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
            for part, named in tensors.items()
        }
        self._pending = self._writer.submit(self.write, step, copies, config, bad_images)

    def wait(self) -> None:
        """Raises UserError where the checkpoint could not be written; those that were there before are untouched."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise, without waiting."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def close(self) -> None:
        self._writer.shutdown()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(
        self, step: int, tensors: dict[str, Any], config: Config, bad_images: dict[str, Any] | None = None
    ) -> None:
        """Write a checkpoint of `tensors`, by part and name; every rank does. `begin` leaves it to a thread."""
        temporary = self.folder / f".writing_step_{step:08d}"
        with self._all_or_none(step, temporary):
            if self.world.is_main:
                for left_over in self.folder.glob(".writing_*"):
                    shutil.rmtree(left_over)
                temporary.mkdir(parents=True)
        with self._all_or_none(step, temporary):
            writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            own = {path.name: checksum(path) for path in temporary.glob(f"shard-{self.world.rank + 1:05d}-*")}
        files = self.world.gather_objects(own, self._group)
        with self._all_or_none(step, temporary):
            if self.world.is_main:
                about: dict[str, Any] = {
                    "format": FORMAT,
                    "step": step,
                    "config": config.model_dump(mode="json"),
                    "data": self.data,
                    "bad_images": bad_images,
                    "torch": torch.__version__,
                    "files": {name: value for part in files for name, value in sorted(part.items())},
                }
                about["digest"] = digest(about)
                write_durably(temporary / "checkpoint.json", json.dumps(about, indent=1))
                self._publish(step, temporary)

    def _publish(self, step: int, temporary: Path) -> None:
        """Give a whole checkpoint its name, and remove those that it replaces."""
        # Damaged ones, which `resume` passed over: in the way of this one or of `keep_last`'s count.
        for passed_over in self.steps():
            if passed_over >= step:
                shutil.rmtree(self.path(passed_over))
        os.rename(temporary, self.path(step))
        sync_folder(self.folder)
        for old in self.steps()[: -self.keep_last]:
            shutil.rmtree(self.path(old))

    @contextlib.contextmanager
    def _all_or_none(self, step: int, temporary: Path) -> Iterator[None]:
        """A stage of `write`: where it fails on one rank, it fails on all, and the temporary folder is removed."""
        try:
            with self.world.raise_on_all_ranks(self._group):
                try:
                    yield
                except (OSError, dcp.CheckpointException) as error:
                    raise UserError(reason(error)) from None
        except SharedError as error:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            kept = f"that of step {self.steps()[-1]} is intact" if self.steps() else "there is no earlier one"
            raise SharedError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}; {kept}; "
                f"make room, then go on with --resume"
            ) from None

    def resume(self, state: "TrainState", report: Callable[[str], None]) -> tuple[int, Path] | None:
        """Load the latest checkpoint that is whole into `state`. Returns its step and path, or None if there is none.

        A damaged one is reported by name and passed over. Raises UserError if all are damaged.
        """
        for step in reversed(self.steps()):
            if problem := verify(self.path(step), self.world):
                report(f"checkpoint passed over: {problem}")
                continue
            self._check_data(self.path(step))
            load(self.path(step), state)
            self.bad_images = read_about(self.path(step)).get("bad_images")
            return step, self.path(step)
        if self.steps():
            raise SharedError(f"no checkpoint in {self.folder} is whole; start anew in another train.folder")
        return None

    def _check_data(self, path: Path) -> None:
        before = read_about(path).get("data")
        if self.data and before and self.data.get("order", 1) != before.get("order", 1):
            raise SharedError(
                f"{path} was written by a version that drew another order of the images, so it cannot go on exactly: "
                f"start a new run with train.init_from={path}"
            )
        if self.data and before and self.data != before:
            raise SharedError(
                f"{path} was written over {before['images']} images, and data.root holds {self.data['images']} now, or "
                f"others: put the same files there, or start a new run with train.init_from={path}"
            )


class _About(BaseModel):
    """What checkpoint.json must hold; more is let through."""

    format: Literal[1, 2]
    step: Annotated[int, Field(ge=0, lt=10**8)]
    config: dict[str, dict[str, Any]]
    files: Annotated[dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]], Field(min_length=1)]
    data: dict[str, int] | None = None
    torch: str = ""
    digest: str = ""


def digest(about: dict[str, Any]) -> str:
    """SHA-256 of all that checkpoint.json says, the checksums of the shards among it, but for the digest itself."""
    rest = {key: value for key, value in about.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_about(path: Path) -> dict[str, Any]:
    """checkpoint.json of a checkpoint folder. UserError where its shape or its digest is not that of a checkpoint."""
    try:
        about = json.loads((path / "checkpoint.json").read_text())
        if isinstance(about, dict) and about.get("format") not in (1, FORMAT):
            raise UserError(f"{path} has checkpoint format {about.get('format')}; this version reads {FORMAT} and 1")
        checked = _About.model_validate(about, strict=True)
        for name in checked.files:
            if os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise ValueError(f"files: {name} is no name of a shard")
        if (checked.format > 1 or checked.digest) and digest(about) != checked.digest:
            raise ValueError("it is damaged: its digest is another")
        return about
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    except RecursionError:
        problem = "it is nested too deep"
    except (OSError, ValueError) as error:
        problem = reason(error) if isinstance(error, OSError | json.JSONDecodeError) else str(error)
    raise UserError(f"{path} is no readable checkpoint: checkpoint.json: {problem}")


def verify(path: Path, world: World) -> str | None:
    """A sentence on what is wrong with a checkpoint, or None. Each rank reads a part of the files."""
    problem = None
    try:
        for i, (name, (size, crc)) in enumerate(sorted(read_about(path)["files"].items())):
            if i % world.size != world.rank:
                continue
            if checksum(path / name) != [size, crc]:
                raise UserError(f"{path / name} is damaged: size or checksum differ from checkpoint.json")
            try:
                with safe_open(path / name, "pt"):
                    pass
            except SafetensorError as error:
                raise UserError(f"{path / name} is no safetensors file: {error}") from None
    except (UserError, OSError) as error:
        problem = str(error)
    return next(filter(None, world.gather_objects(problem)), None)


def load(path: Path, state: "TrainState") -> None:
    """Copy a verified checkpoint, written at any world size, into `state` in place."""
    tensors: dict[str, Any] = state.weights()
    optimizer = get_optimizer_state_dict(state.trained(), state.optimizer, options=_FLAT)
    tensors["optimizer"] = {k: v for k, v in optimizer.items() if isinstance(v, Tensor)}
    reader = dcp.HuggingFaceStorageReader(str(path))
    _check_shapes(path, tensors, reader.read_metadata().state_dict_metadata)
    with compat.single_process_checkpoints():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    for section, values in tensors.items():
        for name, value in values.items():
            if not (value.to_local() if hasattr(value, "to_local") else value).isfinite().all():
                raise SharedError(f"{path} holds numbers that are not finite, in {section}.{name}: it is of no use")
    optimizer |= tensors["optimizer"]
    set_optimizer_state_dict(state.trained(), state.optimizer, optimizer, options=_FLAT)


def find(path: Path, world: World) -> Path:
    """A checkpoint folder as it is; of a run folder, its latest checkpoint."""
    if (path / "checkpoint.json").exists():
        return path
    run = Checkpoints(path, 1, world)
    if not run.steps():
        raise UserError(f"{path} is neither a checkpoint nor a run folder that holds one")
    return run.path(run.steps()[-1])


def _check_shapes(path: Path, tensors: dict[str, Any], held: dict[str, Any]) -> None:
    for section, values in tensors.items():
        for name, value in values.items():
            key = f"{section}.{name}"
            if key not in held:
                raise SharedError(f"{path} is a checkpoint of another model: it holds no {key}")
            if tuple(held[key].size) != tuple(value.shape):
                raise SharedError(
                    f"{path} is a checkpoint of another model: its {key} has shape {tuple(held[key].size)}, "
                    f"the config's {tuple(value.shape)}"
                )
    known = {f"{section}.{name}" for section, values in tensors.items() for name in values}
    if left := sorted(held.keys() - known):
        raise SharedError(f"{path} is a checkpoint of another model: it holds {left[0]}, which the config's has not")


def reason(error: BaseException) -> str:
    """What went wrong with a file, in words for the user."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, SafetensorError) and (number := re.search(r"os error (\d+)", str(error))):
        return os.strerror(int(number[1]))
    return f"{type(error).__name__}: {error}"
