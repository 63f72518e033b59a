"""Every claim of both papers, with its verdict from the rows."""

import pandas as pd
from analysis.verdict import AGREES, NO, OPEN, YES, Claim

from analysis import polykv_claims, qkvshare_claims

__all__ = ["AGREES", "NO", "OPEN", "YES", "Claim", "claims"]


def claims(rows: pd.DataFrame) -> list[Claim]:
    """PolyKV's, then QKVShare's: one for each set of weights (or device) that can tell, else one OPEN."""
    return [*polykv_claims.claims(rows), *qkvshare_claims.claims(rows)]
