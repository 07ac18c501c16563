"""The code that runs in a worker process: one attempt of one job.

Start reading in `worker.py`, which runs the attempt and handles everything that can fail, and
`run_job.py`, which does the work. `train_spec.py` turns a job into the arguments of a training,
`process_group.py` runs a training in several processes, `watchdog.py` ends one that exceeds its
time limit, and `failures.py` classifies how processes end. Imports `jobs`, `config` and
`strategies`.
"""
