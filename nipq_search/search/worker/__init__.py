"""The code that runs in a worker process: one attempt of one job.

Start reading in `worker.py`, which runs the attempt and handles everything that can fail, and
`run_job.py`, which does the work. `train_spec.py` turns a job into the arguments of a training
run, `process_group.py` distributes a run over several processes, `watchdog.py` ends an attempt
that exceeds its time limit, and `failures.py` classifies the failures of processes. Imports
`jobs`, `config` and `strategies`.
"""
