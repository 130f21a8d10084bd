"""Which account and QOS a job gets, and whether its user may use them."""

from __future__ import annotations

from cluster.check.choice import Choice
from cluster.check.finding import Finding, never
from cluster.slurm.associations import Accounting, Association, Qos


def of_account(kept: Accounting, chosen: Choice) -> tuple[str, Qos | None, list[Finding]]:
    """Return the account and the QOS that a job gets, and whether it may use them."""
    findings: list[Finding] = []
    if not kept.binds or kept.is_hidden:
        return chosen.account, kept.qos.get(chosen.qos), findings
    here = _here(kept, chosen)
    accounts = sorted({association.account for association in here})
    if not accounts:
        message = f"user {kept.user} has no account on this cluster; ask the site for one"
        if kept.associations:
            others = ", ".join(sorted({a.partition for a in kept.associations}))
            message = (
                f"{chosen.where}: slurm.partition '{chosen.partition}': you have no account for "
                f"it; your accounts are for {others}"
            )
        return "", None, [never(message, "Account", f"user {kept.user}")]
    account = chosen.account or kept.default_account
    if not account and len(accounts) == 1:
        account = accounts[0]
    if chosen.account and chosen.account.lower() not in accounts:
        message = (
            f"{chosen.where}: slurm.account '{chosen.account}' is not one of yours: "
            f"{', '.join(accounts)}"
        )
        return chosen.account, None, [never(message, "Account", "", accounts, "slurm.account")]
    association = association_of(kept, chosen, account)
    if association is None:
        message = (
            f"{chosen.where}: your default account {account} cannot use partition "
            f"{chosen.partition}; set slurm.account to one of {', '.join(accounts)}"
        )
        return account, None, [never(message, "Account", "", accounts, "slurm.account")]
    known = association.qos
    name = chosen.qos or association.default_qos
    if not name and known is not None:
        # As the controller does for users without a default.
        name = known[0] if len(known) == 1 else ("normal" if "normal" in known else "")
    if known is not None and kept.qos_binds and chosen.qos and chosen.qos not in known:
        message = (
            f"{chosen.where}: slurm.qos '{chosen.qos}' is not one of yours: "
            f"{', '.join(sorted(known))}"
        )
        findings.append(never(message, "QOS", "", sorted(known), "slurm.qos"))
    return account, qos_of(kept, name), findings


def _here(kept: Accounting, chosen: Choice) -> list[Association]:
    # An association without a partition is for all of them.
    return [a for a in kept.associations if a.partition in ("", chosen.partition)]


def association_of(kept: Accounting, chosen: Choice, account: str) -> Association | None:
    mine = [a for a in _here(kept, chosen) if a.account == account.lower()]
    # An association for this partition comes before one for all.
    return max(mine, key=lambda association: association.partition, default=None)


def qos_of(kept: Accounting, name: str) -> Qos | None:
    return kept.qos.get(name) if name else None
