"""Every option of every command refuses a bad value at once: before torch or a backend is imported, or a world started.

All rows run in one process, which must not load them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.snippets import COMMANDS

# command, its arguments with the bad value, and what the message says of it
ROWS = (
    ("verify", "nosuch", "family='nosuch': expected a language model type of transformers"),
    ("verify", "lama", "did you mean llama"),
    ("verify", "llama/masked", "family='llama/masked': expected one of llama/causal"),
    ("verify", "./nosuch", "target='./nosuch': expected a family, a folder or config.json that exists"),
    ("verify", "nosuch.py:build", "expected a file that exists; nosuch.py does not"),
    ("verify", "file.py:", "expected file.py:function or package.module:function"),
    ("verify", "llama --all", "all='llama': expected either --all or targets"),
    ("verify", "llama --backend nosuch", "backend='nosuch': expected one of custom, deepspeed"),
    ("verify", "llama --backend ,", "expected a name, or several with commas"),
    ("verify", "llama --backend custom", "expected another backend for llama; custom is for file.py:build"),
    ("verify", "llama --tp 0", "tp=0: expected a positive integer"),
    ("verify", "llama --tp 2,x", "tp='2,x': expected an integer, or several"),
    ("verify", "llama --dp -1", "dp=-1: expected a positive integer"),
    ("verify", "llama --zero 0,7", "zero_stage=7: expected one of 0, 1, 2, 3"),
    ("verify", "llama --zero 1 --backend transformers", "zero_stage=1: expected 0: transformers"),
    ("verify", "llama --zero 1 --backend dtensor,transformers", "zero_stage=1: expected 0: above dp=1"),
    ("verify", "llama --dtype float63", "dtype='float63': expected one of float64, float32"),
    ("verify", "llama --device tpu", "device='tpu': expected one of None, cpu, cuda"),
    ("verify", "llama --steps 0", "steps=0: expected an integer from 1"),
    ("verify", "llama --steps x", "integer"),
    ("verify", "llama --optimizer nosuch", "optimizer='nosuch': expected one of ASGD, Adadelta"),
    ("verify", "llama --optimizer LBFGS", "optimizer='LBFGS': expected one of ASGD, Adadelta"),
    ("verify", """llama --optimizer {"type":"AdamW","params":{"lrr":1}}""", "options that AdamW takes, lr, betas"),
    ("verify", """llama --optimizer {"name":"AdamW"}""", 'expected {"type": NAME, "params": {...}}'),
    ("verify", "llama --optimizer nosuch.json", "a JSON object or a file that holds one (No such file"),
    ("verify", "llama --accumulate 0", "accumulate=0: expected an integer from 1"),
    ("verify", "llama --loss sum", "loss='sum': expected one of mean, token_mean"),
    ("verify", "llama --attention nosuch", "attention='nosuch': expected one of eager, sdpa"),
    ("verify", "llama --attention eager,nosuch", "attention='nosuch': expected one of eager, sdpa"),
    ("verify", "llama --experts nosuch", "experts='nosuch': expected one of eager, grouped_mm"),
    ("verify", "llama --reentrant", "reentrant=True: expected checkpointing beside it"),
    ("verify", "llama --compile --checkpointing", "compile=True: expected False with checkpointing"),
    ("verify", "llama --compile-layers --checkpointing", "compile_layers=True: expected False with checkpointing"),
    ("verify", "llama --lora x", "lora='x': expected a rank of 1 or more"),
    ("verify", "llama --lora -1", "lora='-1': expected a rank of 1 or more"),
    ("verify", """llama --lora {"rr":2}""", "lora['rr']=2: expected one of r, target_modules"),
    ("verify", "llama --loop foo", "loop='foo': expected one of plain, trainer"),
    ("verify", "llama --loop trainer --backend dtensor", "the Trainer drives deepspeed and transformers"),
    ("verify", "llama --jobs 0", "jobs=0: expected a positive integer"),
    ("verify", "llama --set x", "set='x': expected KEY=VALUE"),
    ("verify", "llama --config nosuch.json", "a JSON object or a file that holds one (No such file"),
    ("verify", "llama --config [1]", "config='[1]': expected a JSON object"),
    ("verify", "llama --config {", "expected valid JSON"),
    (
        "verify",
        """llama --zero 2 --config {"zero_optimization":{"stage":1}}""",
        "expected 1, as zero_optimization.stage",
    ),
    ("verify", """llama --backend dtensor --config {"x":1}""", "config='x': expected one of plan, loss_parallel"),
    ("verify", "llama --batch 3by7", "batch='3by7': expected ROWSxLENGTH"),
    ("verify", "llama --full", "full=True: expected False: llama is a family"),
    ("verify", "llama --ignore-plan --backend dtensor", "ignore_plan=True: expected False: torch has no heuristics"),
    ("verify", "llama --checks nosuch", "checks=['nosuch']: expected one of all, groups_match_topology"),
    ("verify", "llama --seed -1", "seed=-1: expected an integer from 0"),
    ("verify", "llama --timeout 0", "timeout=0.0: expected seconds above 0"),
    ("verify", "llama --timeout nan", "timeout=nan: expected seconds above 0"),
    ("verify", "llama --json nosuch/x", "json='nosuch/x': expected a file in a folder that exists"),
    ("verify", "llama --junit nosuch/x", "junit='nosuch/x': expected a file in a folder that exists"),
    ("verify", "llama --html nosuch/x", "html='nosuch/x': expected a file in a folder that exists"),
    ("verify", "llama --summary nosuch/x", "summary='nosuch/x': expected a file in a folder that exists"),
    ("checkpoint", "nosuch .", "actual='nosuch': expected a file or folder that exists"),
    ("checkpoint", ". nosuch", "reference='nosuch': expected a file or folder that exists"),
    ("checkpoint", ". . --dtype int7", "dtype='int7': expected one of bfloat16, float16"),
    ("checkpoint", ". . --earlier nosuch", "earlier='nosuch': expected a file or folder that exists"),
    ("checkpoint", ". . --map (=x", "map='(=x': expected a pattern and a replacement"),
    ("checkpoint", ". . --map nosuch", "map='nosuch': expected REGEX=REPLACEMENT or one of hf-megatron"),
    ("checkpoint", ". . --json nosuch/x", "json='nosuch/x': expected a file in a folder that exists"),
    ("checkpoint", ". . --junit nosuch/x", "junit='nosuch/x': expected a file in a folder that exists"),
    ("checkpoint", ". . --html nosuch/x", "html='nosuch/x': expected a file in a folder that exists"),
    ("compare", "nosuch .", "actual='nosuch': expected a file or folder that exists"),
    ("compare", ". nosuch", "expected='nosuch': expected a file or folder that exists"),
    ("compare", ". . --actual nosuch", "actual='nosuch': expected a file or folder that exists"),
    ("compare", ". . --expected nosuch", "expected='nosuch': expected a file or folder that exists"),
    ("compare", ". . --map nosuch", "map='nosuch': expected REGEX=REPLACEMENT or one of hf-megatron"),
    ("compare", ". . --json nosuch/x", "json='nosuch/x': expected a file in a folder that exists"),
    ("compare", ". . --junit nosuch/x", "junit='nosuch/x': expected a file in a folder that exists"),
    ("compare", ". . --html nosuch/x", "html='nosuch/x': expected a file in a folder that exists"),
    ("topology", "--world 0", "world_size=0: expected a positive integer"),
    ("topology", "--world 8 --tp 3", "tp=3: expected a divisor of world_size=8"),
    ("topology", "--world 8 --cp 3", "cp=3: expected a divisor of world_size=8"),
    ("topology", "--world 8 --pp 3", "pp=3: expected a divisor of world_size=8"),
    ("topology", "--world 8 --ep 3", "ep=3: expected a divisor of dp * cp = 8"),
    ("topology", "--world 8 --json nosuch/x", "json='nosuch/x': expected a file in a folder that exists"),
    ("families", "--table nosuch", "table='nosuch': expected a file that `tpcheck verify --json` has written"),
    ("doctor", "nosuch.json", "a JSON object or a file that holds one (No such file"),
    ("doctor", "--json nosuch/x", "json='nosuch/x': expected a file in a folder that exists"),
    ("faults", "--kind nosuch", "kind='nosuch': expected one of forward collectives; layout"),
    ("faults", "--dtype float16", "dtype='float16': expected one of float64, float32, bfloat16"),
    ("faults", "--seed -1", "seed=-1: expected a number from 0"),
    ("faults", "--seeds 0", "seeds=0: expected a positive integer"),
    ("faults", "--jobs 0", "jobs=0: expected a positive integer"),
    ("faults", "--json nosuch/x", "json='nosuch/x': expected a file in a folder that exists"),
    ("faults", "--html nosuch/x", "html='nosuch/x': expected a file in a folder that exists"),
    ("faults", "--junit nosuch/x", "junit='nosuch/x': expected a file in a folder that exists"),
    ("fuzz", "nosuch", "family='nosuch': expected a language model type of transformers"),
    ("fuzz", "llama --layers", "family='llama': expected either a model type of transformers or --layers"),
    ("fuzz", "llama --layer x", "layer=['x']: expected --layers, which this option needs"),
    ("fuzz", "--layers --trial {}", "trial='layer': expected one of layer, tp"),
    ("fuzz", "--layers --trial x", "trial='x': expected a JSON object"),
    ("fuzz", "llama --backend nosuch", "backend='nosuch': expected one of custom, deepspeed"),
    ("fuzz", "--layers --backend nosuch", "backend='nosuch': expected one of custom, deepspeed"),
    ("fuzz", "llama --examples 0", "examples=0: expected a positive integer"),
    ("fuzz", "llama --seed -1", "seed=-1: expected an integer from 0"),
    ("fuzz", "llama --tp 0", "tp=0: expected a positive integer"),
    ("fuzz", "llama --dp x", "dp='x': expected an integer, or several"),
    ("fuzz", "llama --zero 0,9", "zero=9: expected one of 0, 1, 2, 3"),
    ("fuzz", "llama --zero 1 --backend transformers", "zero_stage=1: expected 0: transformers"),
    ("fuzz", "llama --dtype float16", "dtype='float16': expected one of float64, float32, bfloat16"),
    ("fuzz", "llama --steps 0", "steps=0: expected an integer from 1"),
    ("fuzz", "llama --set x", "set='x': expected KEY=VALUE"),
    ("fuzz", "llama --config nosuch.json", "a JSON object or a file that holds one (No such file"),
    ("fuzz", "llama --ignore-plan --backend transformers", "ignore_plan=True: expected False"),
    ("fuzz", "llama --shrink-seconds -1", "shrink_seconds=-1.0: expected seconds, 0 or more"),
    ("fuzz", "llama --timeout 0", "timeout=0.0: expected seconds above 0"),
    ("fuzz", "llama --json nosuch/x", "json='nosuch/x': expected a file in a folder that exists"),
)

NOT_JUDGED_AT_ONCE = {
    ("faults", "names"): "the tables of faults are made of torch's functions",
    ("fuzz", "layer"): "the backend's library says which layers it has; that --layers is missing is a row",
}
"""And a KEY of `--set`: transformers' class of the configuration says which there are."""

PROGRAM = """
import json, sys, time
from typer.testing import CliRunner
from tpcheck.cli import app

results = []
for arguments in json.load(sys.stdin):
    before = set(sys.modules)
    start = time.process_time()
    done = CliRunner().invoke(app, arguments)
    seconds = time.process_time() - start
    loaded = sorted({"torch", "transformers", "deepspeed", "megatron", "peft"} & (set(sys.modules) - before))
    results.append([done.exit_code, done.output, repr(done.exception), loaded, seconds])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    commands = [[command, *arguments.split()] for command, arguments, _ in ROWS]
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(commands), capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    answered: list[Any] = json.loads(done.stdout)
    return answered


@pytest.mark.parametrize("row", range(len(ROWS)), ids=[f"{command} {arguments}" for command, arguments, _ in ROWS])
def test_a_bad_value_is_refused_at_once(row: int, results: list[Any]) -> None:
    status, output, error, loaded, seconds = results[row]
    text = " ".join(output.replace("│", " ").split())  # typer puts its own messages in a box
    assert ROWS[row][2] in text, (text, error)
    assert status == 2
    assert loaded == []
    assert seconds < 1


def test_every_option_that_takes_a_value_is_in_the_table() -> None:
    tried = {(command, word) for command, arguments, _ in ROWS for word in arguments.split()}
    missing = [
        (command, parameter.name)
        for command, each in COMMANDS.items()
        for parameter in each.params
        if parameter.param_type_name == "option" and not parameter.is_flag and parameter.name != "help"
        if not any((command, name) in tried for name in parameter.opts)
    ]
    assert [each for each in missing if each not in NOT_JUDGED_AT_ONCE] == []
