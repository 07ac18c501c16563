"""What runs in a worker process: one attempt of one job.

Start reading in `worker.py`. `train_spec.py` turns a job into a training, `process_group.py` runs
one in several processes, `watchdog.py` ends one that hangs, `failures.py` classifies how a process
ended. Imports `jobs`, `config` and `strategies`.
"""
