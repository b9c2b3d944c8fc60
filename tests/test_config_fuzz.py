"""A saboteur's configs: each is one sentence, or a run that could begin; never a traceback, never a hang."""
import contextlib
import random
import signal
from typing import Any, get_args

import pytest
import torch
from pydantic.fields import FieldInfo

from ijepa_fast.config import Config, load_config
from ijepa_fast.errors import UserError
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.remarks import remarks
from ijepa_fast.run import draw_models

pytestmark = pytest.mark.slow

NUMBER, LIMIT_S = 700, 20  # of CPU time: on a busy machine a minute is no hang
VALUES = [
    "0", "1", "-1", "2", "7", "64", "1e12", "1e308", "-1e308", "1180591620717411303424", "9" * 5000, "0.5", "1e-300",
    ".nan", ".inf", "-.inf", "true", "false", "null", "~", "", "[]", "{}", "[1]", "[1, 2]", "[0.2, 0.1]", "[1, 1]",
    "[0, 0]", "[1e308, 1e308]", "[a, b]", "[[1, 2], [3, 4]]", "{a: 1}", "words", "'quoted'", "a #1", "010", "1:30",
    "no", "2026-11-25", "~nosuchuser/x", "$here", "a\\0b", "\udc80", "é", "x" * 10_000, "&a [*a]",
    "!!python/name:os.system", "%s", "{", "[", "'", "]}", "auto", "cuda", "vit_giant", "[bold]", "*",
    "..", "/", "0x10", "1_0",
]  # fmt: skip


def plausible(field: FieldInfo, rng: random.Random) -> str:
    """A value of the key's own kind, as a person might try: near its default, or at the edge of what makes sense."""
    default: Any = field.default
    if isinstance(default, bool):
        return rng.choice(("true", "false"))
    if isinstance(default, int):
        return str(rng.choice((1, 2, 3, default // 2, default - 1, default + 1, 2 * default, 10 * default)))
    if isinstance(default, float):
        return str(rng.choice((0.0, default / 2, default, 2 * default, 1.0)))
    if isinstance(default, tuple):
        low, high = default
        return str(list(rng.choice(((low / 2, high), (low, low), (high, high), (low / 4, low), (low / 9, high / 9)))))
    if isinstance(default, str):
        return str(rng.choice(get_args(field.annotation)))
    return rng.choice(("null", "1", "30", "1000"))  # a number or a path, left out by default


def mutations(rng: random.Random):
    """(text of a file, overrides): one to three keys at plausible or at odd values, or a text that is damaged."""
    fields = {
        (section, key): field
        for section, part in Config.model_fields.items()
        for key, field in part.annotation.model_fields.items()
    }
    keys = list(fields)
    plain = Config.model_validate({"data": {"root": "photographs"}}).to_yaml()
    while True:
        chosen = [(rng.choice(keys), rng.choice(VALUES)) for _ in range(rng.choice((1, 1, 2, 3)))]
        kind = rng.choice(("plausible", "plausible", "plausible", "override", "file", "damage", "repeat", "nest"))
        if kind == "plausible":
            yield plain, [f"{section}.{key}={plausible(fields[section, key], rng)}" for (section, key), _ in chosen]
        elif kind == "override":
            yield plain, [f"{section}.{key}={value}" for (section, key), value in chosen]
        elif kind == "file":
            (section, key), value = chosen[0]
            if section == "data":
                yield f"data: {{root: a, {key}: {value}}}\n", []
            else:
                yield f"data: {{root: a}}\n{section}: {{{key}: {value}}}\n", []
        elif kind == "damage":
            at = rng.randrange(len(plain))
            damage = rng.choice(["", "\t", "\n", ":", "{", "[", "&a ", "*a ", "\0", "#", "- "])
            yield plain[:at] + damage + plain[at + 1 :], []
        elif kind == "repeat":
            lines = plain.splitlines(keepends=True)
            lines.insert(rng.randrange(len(lines)), rng.choice(lines))
            yield "".join(lines), []
        else:
            depth = rng.choice((10, 100, 5000))
            yield f"data: {{root: a}}\n{rng.choice(list(Config.model_fields))}: {'[' * depth}{']' * depth}\n", []


@contextlib.contextmanager
def time_limit(seconds: int):
    def late(number, frame):
        raise TimeoutError(f"longer than {seconds} s of CPU time")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def begin(config: Config) -> None:
    """What a run does first, without its images and its memory."""
    batch = config.optim.global_batch_size
    MultiBlockMasks(config.mask, config.grid, config.train.seed, batch).sample(0, 0, min(batch, 4))
    with torch.device("meta"):
        draw_models(config, torch.device("cpu"))
    remarks(config, 100)


def test_mutated_configs(tmp_path):
    refused, began = [], 0
    every = mutations(random.Random(14))
    for number in range(NUMBER):
        text, overrides = next(every)
        path = tmp_path / "config.yaml"
        path.write_bytes(text.encode(errors="surrogateescape"))
        try:
            with time_limit(LIMIT_S):
                begin(load_config(path, overrides)[0])
            began += 1
        except UserError as error:
            refused.append(str(error))
        except BaseException as error:
            raise AssertionError(f"mutation {number}: {overrides or text!r}") from error
    assert not [sentence for sentence in refused if "\n" in sentence or len(sentence) > 2000]
    assert began > NUMBER // 5
    assert len(refused) > NUMBER // 3
