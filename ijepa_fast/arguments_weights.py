"""What the commands that need weights alone take: `ijepa convert`, `ijepa evaluate` and `ijepa embed`."""
import argparse
from pathlib import Path

from ijepa_fast.errors import UserError

FEATURES = (".npy", ".safetensors", ".parquet")  # that `embed` writes, see feature_file
FORMATS = ("run", "released", "hf", "safetensors", "timm")  # that `convert` writes
DEFAULT = ("knn", "logistic", "linear")
PROBES = (*DEFAULT, "lowshot", "attentive", "finetune", "regress")


def convert(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ijepa convert",
        description="Write weights in another format: a run of ours that can be resumed, a checkpoint that the "
        "released code goes on from, a Hugging Face or timm folder, or one safetensors file.",
        epilog="Examples: ijepa convert runs/vith14 vith14-hf --to hf; ijepa convert IN1K-vit.h.14-300e.pth.tar "
        "runs/more --to run --config in1k_vith14_ep300.yaml data.root=/data/imagenet/train",
    )
    parser.add_argument("src", type=Path, metavar="SRC", help="weights of any format that ijepa_fast.load reads")
    parser.add_argument("dst", type=Path, metavar="DST", help="what to write; it must not be there yet")
    parser.add_argument("--to", choices=FORMATS, required=True)
    parser.add_argument("--which", choices=("target", "context"), help="the encoder; by default, of hf and timm the "
                        "target encoder where SRC holds it, of safetensors everything")  # fmt: skip
    parser.add_argument("--config", help="of --to run: the recipe, a released YAML or ours; a run of ours has it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of --to run: keys to replace")
    args = parser.parse_intermixed_args(argv)
    if args.to != "run" and (args.config or args.overrides):
        raise UserError(f"--to {args.to} takes no config; a run needs one")
    if args.to in ("run", "released") and args.which:
        raise UserError(f"--to {args.to} writes both encoders; leave out --which")
    if args.dst.exists():
        raise UserError(f"{args.dst} is there already; choose another name, or remove it first")
    return args


def evaluate(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ijepa evaluate",
        description="Evaluate an encoder: RankMe and the spread of its features, and the probes asked for.",
        epilog="Example: ijepa evaluate runs/mine --data /data/imagenet --json mine.json. Under "
        "torchrun all ranks compute features and train, and the numbers of frozen features are the same.",
    )
    add = parser.add_argument
    add(
        "weights",
        metavar="WEIGHTS",
        help="what ijepa_fast.load takes; or a baseline: random:vit_small/16@224 (random weights; #1 after it for seed "
        "1), or pixels (the 16 x 16 pixels of an image)",
    )
    add("--which", choices=("target", "context"), default="target", help="encoder (default: target)")
    add("--probe", type=_probes, default=DEFAULT, metavar="NAME[,NAME]",
        help=f"of {', '.join(PROBES)} (default: {','.join(DEFAULT)})")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all rows there")
    add("--out", type=Path, metavar="FOLDER",
        help="draw evaluation.png there: accuracy against labels used, confusion matrix, worst-classified images "
        "(adds logistic and lowshot)")  # fmt: skip

    data = parser.add_argument_group("images and labels")
    data.add_argument(
        "--data", required=True, metavar="ROOT",
        help="ROOT/train and ROOT/val with a folder a class, or one folder a class, of which a fifth is held out",
    )  # fmt: skip
    data.add_argument("--labels", type=Path, metavar="FILE", help="a CSV file of labels, with a path a row")
    data.add_argument("--column", default="label", metavar="NAME", help="its column of classes (default: label)")
    data.add_argument("--columns", type=lambda text: text.split(","), default=[], metavar="NAME[,NAME]",
                      help="its columns of numbers, for regress")  # fmt: skip
    data.add_argument("--list", type=Path, metavar="FILE",
                      help="images to learn from in lowshot and finetune, such as ImageNet's 1 %%")  # fmt: skip

    how = parser.add_argument_group("how")
    how.add_argument("--k", type=_numbers, metavar="K[,K]", help="neighbours (default: 10,20,100,200)")
    how.add_argument("--optimizer", choices=("lars", "sgd"), default="lars", help="of linear (default: lars)")
    how.add_argument("--shots", type=_numbers, metavar="N[,N]", help="images a class in lowshot (default: 1,5,10)")
    how.add_argument("--splits", type=int, help="of lowshot (default: 5)")
    how.add_argument("--regress-as", choices=("auto", "classes", "values"), default="auto",
                     help="auto: whole numbers of at most 20 kinds are classes")  # fmt: skip
    how.add_argument("--epochs", type=int, help="of attentive (default: 20) and finetune (default: 50)")
    how.add_argument("--lr", type=float, help="of attentive and finetune (default: 1e-3)")
    how.add_argument("--views", type=int, default=0, metavar="N",
                     help="random crops of each training image, for linear and LiDAR")  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="of what is held out, and of orders (default: 0)")
    how.add_argument("--batch", type=int, default=64, help="images an encoder sees at once (default: 64)")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads of a process (default: all cores)")
    how.add_argument("--decoder", choices=("auto", "pillow", "turbo", "dali"), default="auto")
    how.add_argument("--cache", type=Path, metavar="FOLDER",
                     help="of features (default: $XDG_CACHE_HOME/ijepa_fast/features)")  # fmt: skip
    how.add_argument("--no-cache", action="store_true", help="keep no features")
    args = parser.parse_args(argv)
    if args.out is not None:
        args.probe = tuple(dict.fromkeys((*args.probe, "logistic", "lowshot")))
    for name, least in (("views", 0), ("splits", 1), ("batch", 1), ("epochs", 1), ("threads", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if "regress" in args.probe and not args.columns:
        parser.error("regress needs the columns to predict: --columns NAME[,NAME], of the CSV file that --labels names")
    return args


def _probes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in PROBES:
            raise argparse.ArgumentTypeError(f"there is no probe {name!r}; the probes are {', '.join(PROBES)}")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 10,20") from None


def embed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ijepa embed",
        description="Write the features of images, and tell which are alike. Rows are in the order of the images; "
        "beside .npy and .safetensors a .csv lists their paths and classes. The same command goes on where it stopped.",
        epilog="Examples: ijepa embed WEIGHTS cat.jpg dog.jpg --similar (prints their cosine similarity); "
        "ijepa embed WEIGHTS cat.jpg PHOTOGRAPHS --similar (draws what is nearest to cat.jpg); "
        "ijepa embed WEIGHTS PHOTOGRAPHS --out photographs.safetensors",
    )
    parser.add_argument("weights", type=Path, help="a run, a checkpoint, or a file or folder of another format")
    parser.add_argument("images", nargs="+", help="files, or folders of images at any depth")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"{', '.join(FEATURES)}; default: features.npy")
    parser.add_argument("--similar", action="store_true", help="print or draw what is alike; writes no features "
                        "unless --out is given")  # fmt: skip
    parser.add_argument("--sheet", type=Path, default=Path("similar.png"), metavar="PNG", help="default: similar.png")
    parser.add_argument("--which", choices=("target", "context"), default="target", help="encoder; default: target")
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="concatenate the last N; default: 1")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time; default: 64")
    parser.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    args = parser.parse_intermixed_args(argv)
    if args.batch < 1 or args.layers < 1:
        raise UserError(f"--batch and --layers must be at least 1, not {args.batch} and {args.layers}")
    if args.out is not None and args.out.suffix not in FEATURES:
        raise UserError(f"--out {args.out}: features are written as {', '.join(FEATURES)}")
    return args
