"""What each command takes. Nothing heavy is imported here, so that --help and a mistake are answered within a second.

A command's own module parses with the same function again, so its `main(argv)` can be called by itself.
"""
import argparse
import os
from collections.abc import Callable
from pathlib import Path

from ijepa_fast import arguments_data, arguments_pictures, arguments_weights
from ijepa_fast.config import Config, load_config
from ijepa_fast.errors import UserError
from ijepa_fast.splits import check_one_split

GPUS = ("a100", "h100", "h200", "b200")  # of `plan`, which knows their figures


def _parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"ijepa {name}", description=description, epilog=epilog)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME or FILE",
        help="a shipped recipe, as vits16_in1k; a YAML file of your own; or a released I-JEPA's",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys of the config to replace")


def train(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser(
        "train",
        "Pretrain I-JEPA from one config: on a CPU, on one GPU or, under torchrun, on several.",
        "Example: ijepa train --config vits16_in1k data.root=/data/imagenet/train optim.micro_batch=64; on 8 GPUs: "
        "torchrun --standalone --nproc-per-node=8 -m ijepa_fast.train --config ... What a run writes is in "
        "train.folder: config.yaml, log.csv, log.jsonl, tensorboard/, curves.png, masks.png, checkpoints/ and, for bad "
        "images, bad_images.jsonl. Ctrl-C, SIGTERM or a lost terminal finishes the step, saves and leaves.",
    )
    _add_config(parser)
    parser.add_argument("--resume", action="store_true", help="go on, exactly, from train.folder's latest checkpoint")
    parser.add_argument(
        "--extend", action="store_true", help="with --resume: optim.epochs may be more than the run was begun with"
    )
    parser.add_argument("--print-config", action="store_true", help="print every key and its value, and leave")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that the run needs, run two micro-batches and one update on the real data, print memory and "
        "time; writes nothing",
    )
    args = parser.parse_intermixed_args(argv)
    if args.extend and not args.resume:
        parser.error("--extend goes with --resume")
    return args


def demo(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser(
        "demo",
        "Pretrain on a few photographs, and show whether the predictor knows what is hidden from it.",
        "Example: ijepa demo --config demo. Photographs are put into data.root where there is no such folder; another "
        "one is used as it is.",
    )
    _add_config(parser)
    return parser.parse_intermixed_args(argv)


def launch(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser(
        "launch",
        "Submit a run to SLURM: one process a GPU; preempted or out of time, it is requeued and resumed.",
        "Logs and the job's files go to train.folder/slurm, which all nodes must see.",
    )
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--partition", help="left out: the cluster's default")
    parser.add_argument("--hours", type=float, default=24, help="time limit of one link of the chain (default: 24)")
    parser.add_argument("--cpus-per-gpu", type=int, default=12, help="for the loader's threads (default: 12)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other sbatch option, as account=vision"
    )
    parser.add_argument("--print", action="store_true", help="show the sbatch script and submit nothing")
    parser.add_argument("--resume", action="store_true", help="as for ijepa train")
    _add_config(parser)
    return parser.parse_intermixed_args(argv)


def plan(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser(
        "plan",
        "Memory and time of a config on N GPUs, on paper: strategies by checkpointing policies.",
        "Memory is counted from the tensors that the code keeps. Times are predictions, from --mfu and the bandwidths "
        "of the links.",
    )
    _add_config(parser)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    help = "share of the peak that is reached (default: 0.4, as of H/14 on an H100)"
    parser.add_argument("--mfu", type=float, default=0.4, help=help)
    parser.add_argument("--images", type=int, help="in the training set, for the days; ImageNet's known from data.root")
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    parser.add_argument("--out", type=Path, help="also draw images/s from 8 to 1024 GPUs into this picture")
    args = parser.parse_intermixed_args(argv)
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu={args.mfu} must be a share of the peak, above 0 and at most 1")
    return args


def checkpoint(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser(
        "checkpoint", "Show what a checkpoint holds and verify its sizes and checksums. Exit code 2: it is damaged."
    )
    parser.add_argument("path", type=Path, help="a checkpoint, or a run folder: then its latest one")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the weights, whole, in fp32, as safetensors")
    return parser.parse_args(argv)


def env(argv: list[str] | None) -> argparse.Namespace:
    return _parser("env", "What is installed and what of it is usable here: for a bug report.").parse_args(argv)


PARSERS: dict[str, Callable[[list[str] | None], argparse.Namespace]] = {
    "train": train,
    "demo": demo,
    "launch": launch,
    "plan": plan,
    "checkpoint": checkpoint,
    "env": env,
    "view": arguments_pictures.view,
    "decode": arguments_pictures.decode,
    "index": arguments_data.index,
    "tune": arguments_data.tune,
    "convert": arguments_weights.convert,
    "evaluate": arguments_weights.evaluate,
    "embed": arguments_weights.embed,
}


KERNELS = ("auto", "torch", "triton", "interpret")  # what IJEPA_KERNELS may say, see ijepa_kernels.dispatch


def check(name: str, argv: list[str]) -> None:
    """Answer --help, and raise or exit for a mistake in the arguments, the config or the name of the data folder."""
    if (mode := os.environ.get("IJEPA_KERNELS", "auto")) not in KERNELS:
        raise UserError(f"IJEPA_KERNELS={mode} is none of {', '.join(KERNELS)}")
    args = PARSERS[name](argv)
    if getattr(args, "config", None) is not None:
        config, _ = load_config(args.config, args.overrides)
        if name == "train" and not args.print_config:
            check_root(config)


def check_root(config: Config) -> None:
    root = config.data.root
    if isinstance(root, str):
        return  # an address: to ask there takes seconds, and whoever indexes it does
    if not root.exists():
        demo = root.name == "demo_photographs"
        hint = "; `make demo`, or `ijepa demo --config demo`, puts the photographs there" if demo else ""
        raise UserError(f"data folder {root.absolute()} does not exist{hint}")
    check_one_split(root)
