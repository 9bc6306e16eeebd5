"""Which tokens are trained on: the selections that the options and the modules know, one per file.

A file of this folder defines ``SELECTION``, a :class:`cggr_compile.selections.record.Selection`; nothing else lists it.
"""

from cggr_compile.selections.record import Selection
from cggr_compile.table import Table

SELECTIONS: Table[Selection] = Table.of_package(__name__, __path__, "SELECTION")
