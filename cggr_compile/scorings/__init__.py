"""How hard a token is: the scorings that the options and the modules know, one per file.

A file of this folder defines ``SCORING``, a :class:`cggr_compile.scorings.record.Scoring`; nothing else lists it.
"""

from cggr_compile.scorings.record import Scoring
from cggr_compile.table import Table

SCORINGS: Table[Scoring] = Table.of_package(__name__, __path__, "SCORING")
