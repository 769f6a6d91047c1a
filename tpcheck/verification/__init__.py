"""One model, run end to end: built, sharded, trained beside its reference, and compared."""

from tpcheck.verification.rank_run import RankAnswer, verify_on_rank
from tpcheck.verification.request import Request

__all__ = ["RankAnswer", "Request", "verify_on_rank"]
