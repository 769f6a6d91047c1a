"""Hostile files end in one clear sentence: no traceback, no hang, no bomb, no code run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints.hostile import HOSTILE, RUN, SLOW
from tests.checkpoints.reading import open_source
from tpcheck.core.errors import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in SLOW])
def test_a_hostile_file_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(build(tmp_path))
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 500 + 2 * len(str(tmp_path))
    assert text.endswith(".")
    assert str(tmp_path) in text
    assert not list(tmp_path.rglob("ran"))


def test_the_call_in_the_hostile_files_would_create_a_file():
    """The tests can fail: the call in the files would create a file."""
    function, arguments = RUN.__reduce__()
    assert function.__name__ == "system"
    assert arguments == ("touch ran",)


WITHIN_LIMITS = """
import json, resource, signal, sys
from pathlib import Path
from tests.checkpoints.reading import open_source
from tpcheck.core.errors import CheckpointError

kilobytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() // 1024
resource.setrlimit(resource.RLIMIT_AS, ((kilobytes << 10) + (1 << 30),) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
messages = []
for source in sys.argv[1:]:
    signal.setitimer(signal.ITIMER_PROF, 30)  # seconds of CPU time
    try:
        open_source(Path(source))
        messages.append("opened")
    except CheckpointError as error:
        messages.append(str(error))
print(json.dumps([messages, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10]))
"""


def test_no_hostile_file_takes_a_gigabyte_or_hangs(tmp_path):
    sources = []
    for number, (build, _) in enumerate(HOSTILE.values()):
        (tmp_path / str(number)).mkdir()
        sources.append(str(build(tmp_path / str(number))))
    command = [sys.executable, "-c", WITHIN_LIMITS, *sources]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    messages, mebibytes = json.loads(done.stdout)
    assert mebibytes < 1024
    for message, (name, (_, expected)) in zip(messages, HOSTILE.items(), strict=True):
        assert re.search(expected, message), name
