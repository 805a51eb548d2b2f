"""What a run will hold in memory, before anything is loaded.

    verdict = fits(config, machine(memory="24GB"))      whether a run fits, and what would
    estimate(PaperModel(...), Setting(...))             what one setting takes, part by part

From configurations alone: the model is built on the meta device, and the step's own code is run there (`paper.py`).
"""

from theodora.plan.devices import Machine, machine, parse_memory
from theodora.plan.estimate import Estimate, Setting, estimate, recommend
from theodora.plan.fits import Verdict, fits
from theodora.plan.paper import PaperModel

__all__ = [
    "Estimate",
    "Machine",
    "PaperModel",
    "Setting",
    "Verdict",
    "estimate",
    "fits",
    "machine",
    "parse_memory",
    "recommend",
]
