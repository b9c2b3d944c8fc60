"""What a recipe learns in a given time: `python bench/learn.py --data ROOT --minutes M --seeds 3`.

Every provider pretrains from the same initial weights, on the images of ROOT/train, for the same time. On a GPU that is
wall time; on a CPU it is the CPU time of this process, so that it does not matter what else the machine does. With
`--updates N` in the place of the minutes all make as many updates.

On the way and at the end the same probes look at the target encoder's features. They are fitted to four fifths of
ROOT/train and scored on the fifth that is held out, so that a recipe can be chosen; only with `--final` are they fitted
to all of it and scored on ROOT/val, at both ends also by the protocols of `ijepa_fast.evaluate`. A record is written
after every probe; `bench/learning/README.md` is made of the records.
"""
import argparse
import json
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch._dynamo  # an optimizer imports it at its first step, which takes seconds of what is timed
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.harness import machine
from bench.harness.compare import NotRun
from bench.learning.learners import LEARNERS, recipe
from bench.learning.report import report
from ijepa_fast.config import Config, load_config
from ijepa_fast.data.decoder import Decoder
from ijepa_fast.distributed import World
from ijepa_fast.durable import write_durably
from ijepa_fast.evaluation.dataset import DataSet, open_dataset
from ijepa_fast.evaluation.features import Extractor, Features
from ijepa_fast.evaluation.frozen import Pixels, prepare
from ijepa_fast.evaluation.knn import knn_accuracy
from ijepa_fast.evaluation.logistic import choose_logistic, fit_logistic
from ijepa_fast.evaluation.rank import rankme, spread
from ijepa_fast.evaluation.split import stratified
from ijepa_fast.evaluation.suite import LAST, LAST_FOUR, Task, linear_rows, logistic_rows
from ijepa_fast.malloc import keep_freed_memory
from ijepa_fast.model import VisionTransformer
from ijepa_fast.run import build_run
from ijepa_fast.weights.model import Model

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "learning" / "results"
HELD_OUT, HELD_OUT_SEED = 0.2, 123
C, NEIGHBOURS = 0.1, 20
SHORT = {LAST: "last", LAST_FOUR: "last four"}
LOSSES = 100  # updates that the recorded loss is a mean of


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config, _ = load_config(args.config, [f"data.root={args.data / 'train'}", "log.probe_every=null", *args.overrides])
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), "single")
    torch.set_num_threads(config.parallel.cpu_threads or machine.cores())
    keep_freed_memory()
    data = labelled(args.data, args.final)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for provider in args.providers.split(","):
            try:
                pretrain(provider, seed, config, world, data, args)
            except NotRun as reason:
                print(f"{provider}: not run: {reason}")
    if args.out == RESULTS:
        report(RESULTS)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/ and val/, a folder a class")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of pretraining, each")
    length.add_argument("--updates", type=int, help="of pretraining instead, where it is not the time that is compared")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--providers", default="ours,straight,released", help="default: ours,straight,released")
    parser.add_argument("--released", type=Path, metavar="CHECKOUT", help="of the released I-JEPA code")
    parser.add_argument("--config", default=str(ROOT / "configs" / "small.yaml"))
    parser.add_argument("--points", type=int, default=4, help="probes on the way, the last one at the end; default: 4")
    parser.add_argument("--arm", default="small", help="the name of this experiment in the records")
    parser.add_argument("--final", action="store_true", help="score on ROOT/val, once a recipe is chosen")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the weights there, as safetensors")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if unknown := set(args.providers.split(",")) - LEARNERS.keys():
        parser.error(f"no provider {', '.join(sorted(unknown))}; there are {', '.join(LEARNERS)}")
    return args


def labelled(root: Path, final: bool) -> DataSet:
    """The set that the probes are fitted to and scored on."""
    data = open_dataset(root)
    if final:
        return data
    rest, held = stratified(torch.from_numpy(data.train.labels), HELD_OUT, HELD_OUT_SEED)
    return data._replace(train=data.train.take(rest.numpy()), val=data.train.take(held.numpy()))


class Clock:
    """Minutes spent in what is timed: wall time on a GPU, this process's CPU time on a CPU."""

    def __init__(self, device: torch.device):
        self.device, self.minutes = device, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter() / 60
        return time.process_time() / 60

    def __enter__(self) -> None:
        self._begun = self.now()

    def __exit__(self, *exception: object) -> None:
        self.minutes += self.now() - self._begun


def pretrain(provider: str, seed: int, config: Config, world: World, data: DataSet, args: argparse.Namespace) -> None:
    """One provider from one seed: pretrain for `args.minutes` or `args.updates`, probe `args.points` times, record."""
    config = recipe(provider, config)
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    points: list[dict[str, Any]] = []
    record = {
        "arm": args.arm, "provider": provider, "seed": seed, "minutes": args.minutes, "final": args.final,
        "planned_updates": args.updates,
        "clock": "wall" if world.device.type == "cuda" else "process CPU time",
        "images": {"train": len(data.train.ids), "evaluated": len(data.val.ids)},
        "machine": machine.describe(world.device), "config": config.model_dump(mode="json"), "points": points,
    }  # fmt: skip
    for key in ("root", "probe_root"):
        record["config"]["data"].pop(key)  # where the images lie on this machine is nobody's business
    record["config"]["train"].pop("folder")
    file = args.out / f"{args.arm}-{provider}-{seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with build_run(config, world) as run:
        learner = LEARNERS[provider](run, args.released)
        decoder = run.data.source.decoder
        record |= pixels(data, decoder, world)
        points.append({"minutes": 0.0, "updates": 0, "loss": None})
        points[-1] |= probe(learner.target_encoder(), data, decoder, world, protocols=args.final)
        tell(record)
        batches, clock, losses, step = run.data.loader.batches(0, 2**40), Clock(world.device), list[Tensor](), 0
        for point in range(1, args.points + 1):
            while (done := step / args.updates if args.updates else clock.minutes / args.minutes) < point / args.points:
                with clock:
                    learner.pace.share = done
                    losses.append(learner.step(step, batches))
                step += 1
            last = torch.stack(losses[-LOSSES:])
            loss = float(last[last.isfinite()].mean())  # the others' updates were skipped
            points.append({"minutes": clock.minutes, "updates": step, "loss": loss})
            at_end = args.final and point == args.points
            points[-1] |= probe(learner.target_encoder(), data, decoder, world, protocols=at_end)
            tell(record)
            write_durably(file, json.dumps(record, indent=1) + "\n")
        run.data.loader.close()
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            weights = {"target_encoder": learner.target_encoder(), "encoder": run.state.encoder}
            weights["predictor"] = run.state.predictor
            named = {f"{part}.{name}": x for part, module in weights.items() for name, x in module.state_dict().items()}
            save_file(named, args.keep / f"{args.arm}-{provider}-{seed}.safetensors")


def probe(
    encoder: VisionTransformer, data: DataSet, decoder: Decoder, world: World, *, protocols: bool = False
) -> dict[str, float]:
    """Accuracies in per cent and the shape of the features, on the CPU.

    `protocols`: also what `ijepa_fast.evaluate` reports, which takes a minute: "chosen" is logistic regression with its
    penalty chosen within what it is fitted to, "linear" the paper's probe.
    """
    train, val = features(frozen(encoder), data, decoder, world)
    labels, truth = torch.from_numpy(data.train.labels), torch.from_numpy(data.val.labels)
    shape = spread(val.last)
    values = {"rankme": rankme(val.last), "std": shape["std"], "cosine": shape["cosine"], "dead": shape["dead"]}
    for name, fitted, scored in (("last", train.last, val.last), ("last four", train.last_four, val.last_four)):
        values[f"logistic {name}"] = 100 * accuracy(fitted, labels, scored, truth)
    values["k-NN"] = 100 * knn_accuracy(train.last, labels, val.last, truth, k=NEIGHBOURS)
    if protocols:
        task = Task(train, val, labels, truth, int(labels.max()) + 1, torch.device("cpu"))
        for name, rows in (("chosen", logistic_rows(task)[0]), ("linear", linear_rows(task))):
            values |= {f"{name} {SHORT[row.features]}": 100 * row.value for row in rows}
    return values


def frozen(encoder: VisionTransformer) -> Model:
    """A model of its own: evaluation changes the precision of what it is given, and training goes on in another."""
    copy = VisionTransformer(encoder.size, encoder.image_size, encoder.patch_size, torch.float32, torch.float32)
    copy.load_state_dict(encoder.state_dict())
    return Model(copy, None, copy, "target", {})


def accuracy(fitted: Tensor, labels: Tensor, scored: Tensor, truth: Tensor) -> float:
    """Of an exact logistic regression on standardised features."""
    return float((fit_logistic(fitted, labels, C=C).predict(scored) == truth).double().mean())


def features(model: nn.Module, data: DataSet, decoder: Decoder, world: World) -> list[Features]:
    """Of what the probes are fitted to, and of what they are scored on."""
    extractor = Extractor(prepare(model, world.device), decoder, world, cache=None)
    return cast(list[Features], [extractor.features(part, "probe") for part in (data.train, data.val)])


def pixels(data: DataSet, decoder: Decoder, world: World) -> dict[str, float]:
    """Accuracy in per cent of the same classifiers on central crops of 16 x 16 pixels."""
    train, val = features(Pixels(), data, decoder, world)
    labels, truth = torch.from_numpy(data.train.labels), torch.from_numpy(data.val.labels)
    chosen = choose_logistic(train.last, labels).predict(val.last) == truth
    return {
        "pixels": 100 * accuracy(train.last, labels, val.last, truth),
        "pixels chosen": 100 * float(chosen.double().mean()),
    }


def tell(record: dict[str, Any]) -> None:
    point = record["points"][-1]
    shown = (f"{name} {value:.4g}" for name, value in point.items() if value is not None)
    print(f"{record['arm']} {record['provider']} seed {record['seed']}: " + ", ".join(shown), flush=True)
