"""What is known of a mask or bias when compiling.

`reading` takes the graph of a mask as a function of (batch, head, query, key), `forms` and `biases` say
which of the shapes that models use that function is, `facts` answers what passes ask. A mask that depends
on no input, with sizes known, is also evaluated. What comes from an input is not known: it stays a
tensor, and its terms stand for themselves. Looks only.
"""

from effopt.graph.analyses.masks.biases import MASKED, Added, Bias, Hidden, bias_of
from effopt.graph.analyses.masks.evaluation import evaluate
from effopt.graph.analyses.masks.facts import (
    every_row_sees,
    is_causal,
    is_mask,
    opening,
    sees_key,
)
from effopt.graph.analyses.masks.forms import (
    Band,
    Form,
    Groups,
    Keys,
    Length,
    Prefix,
    RowLimit,
    Rows,
    Term,
    Unread,
    form_of,
    form_of_condition,
)
from effopt.graph.analyses.masks.least_number import least_number

__all__ = [
    "MASKED",
    "Added",
    "Band",
    "Bias",
    "Form",
    "Groups",
    "Hidden",
    "Keys",
    "Length",
    "Prefix",
    "RowLimit",
    "Rows",
    "Term",
    "Unread",
    "bias_of",
    "evaluate",
    "every_row_sees",
    "form_of",
    "form_of_condition",
    "is_causal",
    "is_mask",
    "least_number",
    "opening",
    "sees_key",
]
