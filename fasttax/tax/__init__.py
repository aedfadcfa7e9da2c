"""The alignment tax: what checkpoints gained, what they lost, and how the loss grows with KL, steps
and stages.
"""

from fasttax.tax.fits import PowerLaw as PowerLaw
from fasttax.tax.fits import fit_power_law as fit_power_law
from fasttax.tax.measure import kl_to_base as kl_to_base
from fasttax.tax.report import Checkpoint as Checkpoint
from fasttax.tax.report import Stage as Stage
from fasttax.tax.report import TaxReport as TaxReport

__all__ = ["Checkpoint", "PowerLaw", "Stage", "TaxReport", "fit_power_law", "kl_to_base"]
