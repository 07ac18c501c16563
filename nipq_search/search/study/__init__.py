"""The Optuna study, where every decision of a sweep is kept.

Start reading in `ledger.py`; only the driver writes through it. `storage.py` opens a journal file
or a database, `journal.py`, `retry.py` and `database_lease.py` keep it sound after crashes, during
outages and against a second driver. Imports `strategies`.
"""
