"""Records what a model computes in a loop of the user's own, and compares two such traces."""

from tpcheck.verification.traces.comparing import compare_recordings
from tpcheck.verification.traces.files import read_trace
from tpcheck.verification.traces.recording import Recorder
from tpcheck.verification.traces.threads import few_threads

__all__ = ["Recorder", "compare_recordings", "few_threads", "read_trace"]
