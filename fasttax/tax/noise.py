"""How the errors of measured points hang together: covariances up to a common factor.

Tax is a difference to a base that was measured once, checkpoints of a run follow one another, and
runs differ. How strongly is not known: a list of covariances stands for what is plausible, and an
interval is the union of those that the data do not speak against (Berger & Boos 1994, Journal of
the American Statistical Association 89(427)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Correlations of neighbours in a run, from white noise to nearly a random walk; of several runs
# fewer, since what they differ by is gone through, too: standard deviations in units of a point's,
# up to what three runs, which bound it from above but loosely, do not rule out.
ALONE = (0.0, 0.4, 0.7, 0.85, 0.95)
SEVERAL = (0.0, 0.8)
SPREADS = (0.0, 1.0, 3.0, 8.0)


@dataclass(frozen=True)
class Noise:
    """What points' errors share.

    `runs` names each point's run, in which neighbours by x may be correlated and which may differ
    from others in level and in size; None: errors are independent. `shared` lists what the variance
    of the error that all points have in common, the base's, may be, in units of a point's own.
    """

    runs: tuple[str, ...] | None = None
    shared: tuple[float, ...] = (0.0,)

    def covariances(self, size: Floats) -> list[Floats]:
        """The plausible ones for points by x, the simplest first.

        `size` (n,) is what a run's points go up by, all together, where the run's law is larger:
        a typical law's values, of mean square 1.
        """
        if self.runs is None:
            return [np.eye(len(size)) + shared for shared in self.shared]
        names = np.array(self.runs)
        same = (names[:, None] == names[None, :]).astype(np.float64)
        place = _places(names)
        lag = np.abs(place[:, None] - place[None, :])
        alone = len({*self.runs}) == 1
        correlations, spreads = (ALONE, (0.0,)) if alone else (SEVERAL, SPREADS)
        grown = same * np.outer(size, size)
        return [
            same * rho**lag + shared + level**2 * same + slope**2 * grown
            for rho in correlations
            for level in spreads
            for slope in spreads
            for shared in self.shared
        ]


def _places(names: NDArray[np.str_]) -> Floats:
    """Each point's place in its run; points come by x."""
    place = np.zeros(len(names))
    for name in set(names.tolist()):
        mine = names == name
        place[mine] = np.arange(int(mine.sum()))
    return place
