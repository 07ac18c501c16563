"""Results of a sweep: records, JSON documents, tables, report and progress.

Start reading in `sweep.py`. `documents.py` and `best.py` build the JSON documents, `outputs.py`
writes the tables, the report and the MLflow runs, and `retention.py` deletes models that are no
longer needed. Imports `tracking` and `report`, and within the search `jobs`, `strategies`,
`config` and `study`.
"""
