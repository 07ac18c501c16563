"""A sweep's folder as people read it: records, documents, tables, progress.

Start reading in `sweep.py`. `documents.py` builds the JSON documents, `outputs.py` writes tables,
report and MLflow runs, `retention.py` frees what nothing needs. Imports `jobs`, `strategies`,
`config` and `study`.
"""
