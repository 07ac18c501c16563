"""Results of a sweep: records, JSON documents, tables, report and progress.

Start reading in `sweep.py`. `documents.py` and `best.py` build the JSON documents, `outputs.py`
writes tables, report and MLflow runs, `retention.py` deletes models that are no longer needed.
Imports `tracking`, `report`, and of the search `jobs`, `strategies`, `config` and `study`.
"""
