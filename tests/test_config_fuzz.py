"""A saboteur's configs: each is one sentence, or a run that could begin; never a traceback, never a hang."""
import contextlib
import random
import signal

import pytest
import torch

from ijepa_fast.config import Config, load_config
from ijepa_fast.errors import UserError
from ijepa_fast.masks import MultiBlockMasks
from ijepa_fast.remarks import remarks
from ijepa_fast.run import draw_models

pytestmark = pytest.mark.slow

NUMBER, LIMIT_S = 700, 60
VALUES = [
    "0", "1", "-1", "2", "7", "64", "1e12", "1e308", "-1e308", "1180591620717411303424", "9" * 5000, "0.5", "1e-300",
    ".nan", ".inf", "-.inf", "true", "false", "null", "~", "", "[]", "{}", "[1]", "[1, 2]", "[0.2, 0.1]", "[1, 1]",
    "[0, 0]", "[1e308, 1e308]", "[a, b]", "[[1, 2], [3, 4]]", "{a: 1}", "words", "'quoted'", "a #1", "010", "1:30",
    "no", "2026-11-25", "~nosuchuser/x", "$here", "a\\0b", "\udc80", "é", "x" * 10_000, "&a [*a]",
    "!!python/name:os.system", "%s", "{", "[", "'", "]}", "auto", "cuda", "vit_giant", "[bold]", "*",
    "..", "/", "0x10", "1_0",
]  # fmt: skip


def mutations(rng: random.Random):
    """(text of a file, overrides): one to three keys at random values, or a text that is damaged."""
    keys = [(section, key) for section, field in Config.model_fields.items() for key in field.annotation.model_fields]
    plain = Config.model_validate({"data": {"root": "photographs"}}).to_yaml()
    while True:
        chosen = [(rng.choice(keys), rng.choice(VALUES)) for _ in range(rng.choice((1, 1, 2, 3)))]
        kind = rng.choice(("override", "file", "damage", "repeat", "nest"))
        if kind == "override":
            yield plain, [f"{section}.{key}={value}" for (section, key), value in chosen]
        elif kind == "file":
            (section, key), value = chosen[0]
            yield f"data: {{root: a}}\n{section if section != 'data' else 'log'}: {{{key}: {value}}}\n", []
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
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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
    assert began > NUMBER // 20
    assert len(refused) > NUMBER // 3
