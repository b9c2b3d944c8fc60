"""The command `ijepa`: what a stranger meets first. Answers within a second, one line on every command."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ijepa_fast.__main__ as door
from ijepa_fast import arguments, env, version
from ijepa_fast.threads import torch_threads, usable_cores

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "triton", "matplotlib", "rich", "PIL")


def ijepa(*words: str, code: str = "", **variables: str) -> subprocess.CompletedProcess:
    """The door in a process of its own, which afterwards says on its last line what heavy it has imported."""
    program = (
        f"import sys\n{code}\nfrom ijepa_fast.__main__ import main\n"
        f"try:\n    code = main({list(words)!r})\nexcept SystemExit as end:\n    code = end.code\n"
        f"print('heavy:', *[name for name in {HEAVY} if name in sys.modules])\nsys.exit(code)"
    )
    environment = {**os.environ, "COLUMNS": "120", **variables}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--config", "demo", "optim.lrr=3"], "did you mean optim.lr?"),
        (["train", "--config", "demo", "data.root=/nowhere/demo_photographs"], "`make demo`"),
    ],
)
def test_mistakes_in_a_config_import_nothing_heavy(words, said):
    done = ijepa(*words)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (2, "heavy:")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


MISTAKES = {  # words: what is said
    "view masks --config demo --step -1": "--step at least 0, not 8 and -1",
    "view masks --config demo data.rot=a": "unknown key data.rot; did you mean data.root?",
    "view predictions runs/a . --blocks 5": "--blocks must be 1 to 4",
    "view attention runs/a . --rows 0": "--rows must be at least 1, not 0",
    "decode train runs/a . --steps 0": "--steps and --batch must be at least 1",
    "decode show runs/a b . --samples 0": "--samples must be at least 1, not 0",
    "index . --workers 0": "--workers must be at least 1, not 0",
    "tune demo --rounds 0": "--images and --rounds must be at least 1",
    "tune demo optim.lrr=1": "unknown key optim.lrr; did you mean optim.lr?",
    "convert . b --to hf optim.lr=1": "--to hf takes no config",
    "convert a . --to timm": ". is there already",
    "evaluate a --data . --probe knm": "there is no probe 'knm'",
    "evaluate a --data . --splits 0": "--splits must be at least 1",
    "plan --config demo --gpus 8 --mfu 45": "--mfu=45.0 must be a share of the peak",
    "embed a . --out f.csv": "--out f.csv: features are written as .npy, .safetensors, .parquet",
    "embed a . --layers 0": "--batch and --layers must be at least 1, not 64 and 0",
}


def test_help_and_wrong_arguments_of_every_module_import_nothing_heavy():
    """All in one process, as `python -m MODULE` each: what one of them imports is still there at the end."""
    doors = {"checkpoint": "ijepa_fast.checkpoint", "index": "ijepa_fast.data.index"}  # where it is not the command's
    doors = {name: module.removesuffix(".__main__") for name, (module, _) in door.COMMANDS.items()} | doors
    calls = [f"{name} --help" for name in doors] + list(MISTAKES)
    program = f"""
import runpy, sys
for call in {calls!r}:
    name, *sys.argv[1:] = call.split()
    print("call:", call, file=sys.stderr, flush=True)
    try:
        runpy.run_module({doors!r}[name], run_name="__main__")
    except SystemExit as end:
        print("code:", end.code, *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr, flush=True)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = dict(answer.split("\n", 1) for answer in done.stderr.split("call: ")[1:])
    assert list(said) == calls
    for call, answer in said.items():
        *lines, last = answer.splitlines()
        assert last == f"code: {2 if call in MISTAKES else 0}", call
        assert MISTAKES.get(call, "") in "\n".join(lines)
        assert "Traceback" not in answer
    for name in doors:
        assert f"usage: ijepa {name}" in done.stdout


def test_every_module_with_a_command_is_listed():
    """A command that is missing here gets a line in `ijepa_fast.__main__.COMMANDS`."""
    with_main = set()
    for path in (ROOT / "ijepa_fast").rglob("*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        if any(f.name == "main" and "command" in [ast.unparse(d) for d in f.decorator_list] for f in functions):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            with_main.add(module.removesuffix(".__main__"))
    assert {module.removesuffix(".__main__") for module, _ in door.COMMANDS.values()} == with_main


def test_usage_lists_every_command(capsys):
    assert door.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in door.COMMANDS)
    assert door.main([]) == 2


def test_version(capsys):
    from ijepa_kernels import __version__ as of_the_ops

    import ijepa_fast

    assert door.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ijepa_fast {ijepa_fast.__version__}\n"
    assert ijepa_fast.__version__ == version.__version__ == of_the_ops


def test_unknown_command(capsys):
    assert door.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: there is no command trian; did you mean train?\n"
    assert door.main(["xyz"]) == 2
    assert "there are train, demo" in capsys.readouterr().err


def test_a_mode_of_the_kernels_that_is_none(monkeypatch, capsys):
    from ijepa_kernels.dispatch import MODES

    assert set(arguments.KERNELS) == set(MODES)
    monkeypatch.setenv("IJEPA_KERNELS", "foo")
    assert door.main(["train", "--config", "demo"]) == 2
    assert capsys.readouterr().err == "error: IJEPA_KERNELS=foo is none of auto, torch, triton, interpret\n"


def test_ctrl_c_while_importing(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(door.importlib, "import_module", interrupted)
    assert door.main(["env"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_launch_without_submitit(capsys, monkeypatch):
    from ijepa_fast import launch

    monkeypatch.setattr(launch, "submitit", None)
    assert launch.main(["--config", "demo", "--nodes", "1", "--gpus-per-node", "1"]) == 2
    assert capsys.readouterr().err == (
        "error: launching needs submitit, the extra `slurm`: pip install 'ijepa_fast[slurm]'\n"
    )


def test_demo_help_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        door.main(["demo", "--help"])
    assert list(tmp_path.iterdir()) == []


def test_what_arguments_repeat_is_what_the_commands_know():
    from ijepa_fast.arguments_weights import FEATURES
    from ijepa_fast.data.formats import MAX_PIXELS
    from ijepa_fast.evaluation.lowshot import SPLITS
    from ijepa_fast.feature_file import SUFFIXES
    from ijepa_fast.plan import GPUS

    assert set(arguments.GPUS) == set(GPUS)
    assert FEATURES == SUFFIXES
    assert arguments.PARSERS["index"](["."]).max_pixels == MAX_PIXELS
    assert SPLITS == 5  # as the help of `evaluate` says


def test_env(capsys, monkeypatch, tmp_path):
    (tmp_path / "xformers.py").write_text("raise OSError('libx.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(env, "EXTRAS", {"xformers": ("xformers",), "no_such_module": ("none",)})
    assert door.main(["env"]) == 0
    about, attention = capsys.readouterr().out.split("\nattention\n")
    facts = dict(line.split(None, 1) for line in about.splitlines())
    assert facts["ijepa_fast"] == version.__version__
    assert facts["no_such_module"] == "not installed"
    assert facts["xformers"].endswith("not usable: OSError: libx.so is missing")
    assert "OMP_NUM_THREADS=3" in facts["variables"]
    assert "auto takes" in attention


# --- threads ----------------------------------------------------------------------------------------------------------


def test_a_quota_of_cpu_time_bounds_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert usable_cores(tmp_path) == 8
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == 8
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert usable_cores(tmp_path) == 3
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")  # cgroup v1
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path) == 1


def test_omp_num_threads_counts_where_the_user_set_it(monkeypatch):
    monkeypatch.setattr("ijepa_fast.threads.usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torch_threads(None, 1) == (8, "8 usable cores")
    assert torch_threads(None, 3) == (2, "8 usable cores, 3 processes")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert torch_threads(None, 1) == (1, "OMP_NUM_THREADS")
    assert torch_threads(5, 1) == (5, "parallel.cpu_threads")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun's own 1 for several processes, not the user's
    assert torch_threads(None, 4) == (2, "8 usable cores, 4 processes")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert torch_threads(None, 4) == (3, "OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(arguments.UserError, match="OMP_NUM_THREADS=many is no number of threads"):
        torch_threads(None, 1)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1"}, "but MASTER_ADDR not set"),
    ],
)
def test_half_of_what_torchrun_sets(variables, sentence, train, monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sentence in train(f"train.folder={tmp_path / 'run'}").error
