"""`fasttax demo`: the demo is a package of its own, `fasttax.demo`."""

from fasttax.demo import main as main
from fasttax.demo.settings import parser as parser
