"""Results of a sweep: records, JSON documents, tables, report and progress.

Start reading in `sweep.py`. `documents.py` and `best.py` build JSON documents, `outputs.py` writes
the tables, the report and the MLflow runs, `progress.py` describes the progress of a run, and
`retention.py` deletes models and checkpoints that are no longer needed. Imports `tracking` and
`report`, and within the search `jobs`, `strategies`, `config` and `study`.
"""
