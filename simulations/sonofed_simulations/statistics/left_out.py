"""Leave-one-site-out: which sites may decide for which."""

from __future__ import annotations

from collections.abc import Mapping


def leave_one_site_out(hospitals: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """For each site those that may decide for it.

    Parameters
    ----------
    hospitals : mapping of str to str
        Hospital, or data set, of each site: scanners of one hospital do not decide for each other.

    Returns
    -------
    dict of str to tuple of str
        By site, in the order given, the sites of all other hospitals. Empty where there is a single
        hospital.
    """
    if len(set(hospitals.values())) < 2:
        return {}
    return {
        site: tuple(other for other in hospitals if hospitals[other] != hospital)
        for site, hospital in hospitals.items()
    }
