"""The Optuna study, which stores every decision of a sweep.

Start reading in `ledger.py`, through which the driver writes to the study; workers never do.
`proposals.py` defines the proposals that the ledger returns, and `storage.py` opens a journal file
or a database. `journal.py`, `retry.py` and `database_lease.py` keep the study consistent after
crashes, during outages and when a second driver starts, respectively. Imports `strategies`.
"""
