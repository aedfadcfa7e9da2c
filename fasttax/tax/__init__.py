"""The alignment tax: what checkpoints gained and lost, and how the loss grows with KL and steps."""

from fasttax.integrations.to_base import BothWays as BothWays
from fasttax.integrations.to_base import kl_both_ways as kl_both_ways
from fasttax.integrations.to_base import kl_quadratic as kl_quadratic
from fasttax.integrations.to_base import kl_to_base as kl_to_base
from fasttax.tax.card import ModelCardSection as ModelCardSection
from fasttax.tax.checkpoints import Checkpoint as Checkpoint
from fasttax.tax.fits import PowerLaw as PowerLaw
from fasttax.tax.fits import ShiftedLaw as ShiftedLaw
from fasttax.tax.fits import fit_power_law as fit_power_law
from fasttax.tax.frontier import TaxAt as TaxAt
from fasttax.tax.measurements import Stage as Stage
from fasttax.tax.published import Published as Published
from fasttax.tax.published import published as published
from fasttax.tax.quadratic import QuadraticLaw as QuadraticLaw
from fasttax.tax.quadratic import fit_quadratic as fit_quadratic
from fasttax.tax.report import TaxReport as TaxReport

__all__ = [
    "BothWays",
    "Checkpoint",
    "ModelCardSection",
    "PowerLaw",
    "Published",
    "QuadraticLaw",
    "ShiftedLaw",
    "Stage",
    "TaxAt",
    "TaxReport",
    "fit_power_law",
    "fit_quadratic",
    "kl_both_ways",
    "kl_quadratic",
    "kl_to_base",
    "published",
]
