"""The alignment tax: what checkpoints gained and lost, and how the loss grows with KL and steps."""

from fasttax.tax.fits import PowerLaw as PowerLaw
from fasttax.tax.fits import fit_power_law as fit_power_law
from fasttax.tax.measure import kl_quadratic as kl_quadratic
from fasttax.tax.measure import kl_to_base as kl_to_base
from fasttax.tax.measurements import Checkpoint as Checkpoint
from fasttax.tax.measurements import Stage as Stage
from fasttax.tax.report import TaxReport as TaxReport

__all__ = [
    "Checkpoint",
    "PowerLaw",
    "Stage",
    "TaxReport",
    "fit_power_law",
    "kl_quadratic",
    "kl_to_base",
]
