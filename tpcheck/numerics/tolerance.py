"""What error is allowed, and when a cause explains what is left: every threshold of the numerics, with its derivation.

The allowed error is ten times what rounding alone did to the same tensor in the same run. Measured on llama, qwen2 and
gemma2 under DeepSpeed 0.19.8, tp 2, in float64, float32 and bfloat16: the real difference between sharded and unsharded
arithmetic is 0.2 to 1.0 times the largest deviation among eight perturbed replays, so ten times that deviation leaves
clean margins near 0.1 and no constant per dtype. `docs/margins.json` has 4315 clean runs: the worst margin is 0.42.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

NUM_REPLAYS = 8
SAFETY_FACTOR = 10.0
# A derivative jumps where rounding carries an activation over a kink (a ReLU's zero). In float64 that happens once in
# 1e12 elements, in 16 bits in every replay; in float32 it is rare, and a replay that rounds as much as the run misses
# it about every second time. So some replays round this much more, once in each direction: one of the two is beyond the
# kink. What they move is divided by it. That is what other replays measure but for a jump, which is allowed 2.5 times.
MAGNIFICATION = 4.0

# ---- comparisons

# Rounding is measured around the reference's inputs. What is recomputed from a rank's own inputs, or summed in another
# order, rounds elsewhere: at most as far as is allowed, which is SAFETY_FACTOR times what was measured.
RECOMPUTED_FACTOR = 10.0

# Of runs that are compared by their traces: a dtype whose epsilon is larger is one of 16 bits.
LOW_PRECISION = 1e-4
# In such a dtype noise grows over the layers until ten times of it hide a mistake of some percent in one module. The
# distance of two right runs is 0.2 to 0.9 times the largest deviation of a replay, and at each module at most 1.6 times
# the median of that at the modules just before it (12 layers of width 16, tp 1 and 4 against 2, weights of noise 0.02
# and 0.1). One output projection that is 8 % off is at 3.6 to 10 times. On llama and opt of 4 to 24 layers of width 32
# to 256 and mixtral of 4, tp 2 and 4 against 1, and 4 against 2 (ci/figures/low_precision), the worst margin of right
# runs is 0.64, the smallest of such a projection 1.9.
LOCAL_FACTOR = 2.5
TYPICAL_NOISE = 0.5
NUM_NEIGHBOURS = 16
# Of two right runs of mixtral (128 tokens) one to four tokens in a layer go to other experts: of one token 97 to 99 %
# of the squared difference of the experts' output lies in one of 16 tiles of rows. An error of all rows has a quarter
# in four of them.
FEW_ROWS = 0.25  # of the tiles that have rows
SHARE_OF_FEW_ROWS = 0.9
NEAR_LIMIT = 0.5  # errors that are nearer to the allowed one are not judged by chance alone
# Gradients move less alike; those of parameters may have few elements (norms, biases).
LOCAL_FACTOR_OF_GRADIENTS = 5.0

# ---- causes: share of a difference that may remain where a cause explains it

# In float64 rounding leaves about 1e-12 of a difference that is worth a finding; 1e-3 leaves room for float32, and for
# differences of 1e-9 that float64 still shows.
RESIDUAL_EXACT = 1e-3
# In bfloat16 what remains may be as large as the allowed error: a cause has to explain nine tenths even then.
RESIDUAL_NOISY = 0.1
# Of a norm or a step that is worked out from weights: a float64 weight rounds by 1e-16 of itself, 1e-10 of a step that
# moves it by 1e-6. Numbers that agree in six digits are the same number.
FITTED_RELATIVE_ERROR = 1e-6
# Of the factor by which a step shows gradients to be clipped; else RESIDUAL_EXACT. A float64 weight rounds by 1e-13
# of a step that moves it by 1e-3; the 1e-6 that torch adds to a norm of 1 is a thousand times as much. In float32 a
# moment shows it to 1e-7, and norms are summed in float32.
ACCURACY_OF_FACTORS = {"float64": 1e-9, "float32": 1e-5}
# A share of a term in the change of float32 masters is off by the rounding of one element: three standard deviations of
# it are as good as never exceeded.
DEVIATIONS_OF_SHARES = 3.0
# Distance of equal rows of an embedding: a lookup does not round, but torch.cdist does.
EQUAL_ROWS = 1e-9

# ---- causes: number of elements that prove something

# A float64 ends in the 45 zero bits of a bfloat16 once in 2**45; eight that all do were rounded. Eight zeros in the
# place of eight other numbers are no accident either.
LEAST_ELEMENTS = 8
# A step of two spacings is four roundings of a weight: rounding takes none of eight such steps away.
STEP_IN_SPACINGS = 2.0
# Any number is a multiple of any other; a common factor of four holds by chance once in (1 / RESIDUAL_EXACT)**3.
LEAST_MULTIPLES = 4
# Features of a head: fewer are found in another place by chance.
LEAST_HEAD_SIZE = 4
# Roundings to a lower dtype, in its epsilon and for each rank: of what goes in, and of the result.
LOWER_DTYPE_ROUNDINGS = 4.0

# Of the norm of one row from its sketch: four sets of signs in 16 tiles leave a standard deviation of 9 % (the variance
# of a square is 2/64 of its own); three of them, and a little for rows that are not spread evenly.
SPREAD_OF_ONE_ROW = 0.35

# ---- causes: how far to search

# Sets of parameters that a norm may leave out, of a square within a tenth of what is missing, say how many fit by
# chance: their number times the share of that window that counts as equal. One time in a hundred is too often.
WINDOW_OF_CHANCE = 0.1
MOST_CHANCE = 0.01
# Parameters among which three are looked for: 120**3 / 6 sums, of which bisection leaves the last factor out.
MOST_NAMES_IN_TRIPLES = 120
# Parameters that are too small to show by what they were clipped: 2**8 subsets for each group.
MOST_UNKNOWN_FACTORS = 8

# Ranks among whose subsets a wrong group is looked for: 2**5 subsets for each of six ranks.
MOST_RANKS_OF_GROUPS = 6
# Uses of one module, some of which may be lost: 2**6 sums.
MOST_USES = 6
# Micro-batches of which any may be unreduced: 2**8 subsets; of more, one alone.
MOST_MICRO_BATCHES = 8
# Offsets of a vocabulary that the wrong rows suggest, the most frequent first.
MOST_OFFSETS = 8


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Allowed absolute Frobenius error by tensor.

    Attributes:
        scalar_eps: Machine epsilon of the loss and the gradient norm, which low-precision runs keep in float32.
        num_replays: How many perturbed replays were measured.
        deviations: Largest Frobenius deviation of each tensor over the replays.
    """

    scalar_eps: float
    num_replays: int
    deviations: Mapping[Hashable, float]

    def allowed(self, key: Hashable, rounding: float) -> float:
        """Return the largest Frobenius error of this tensor that passes.

        Args:
            key: Names the tensor.
            rounding: Rounding error of the expected tensor itself, which holds where the replays did not change it: of
                every element for computed tensors, of one for stored ones (weights).
        """
        return SAFETY_FACTOR * max(self.deviations.get(key, 0.0), rounding)

    def allowed_scalar(self, key: Hashable, expected: float) -> float:
        """Return the largest error that passes for the loss or the gradient norm.

        Each ends a long sum, whose last addition rounds once and whose division or root rounds once more.
        """
        return self.allowed(key, 2 * self.scalar_eps * abs(expected))


def largest_deviations(replays: Iterable[Mapping[Hashable, float]]) -> dict[Hashable, float]:
    """Return the largest deviation of each tensor over several sets of replays."""
    largest: dict[Hashable, float] = {}
    for deviations in replays:
        for key, deviation in deviations.items():
            largest[key] = max(deviation, largest.get(key, 0.0))
    return largest
