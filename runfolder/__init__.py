"""The run folder: only this code reads and writes what it contains.

`cluster/`, `train/` and `slurm/` meet only here; so this package imports none of them, only the
standard library.

    run.json, jobs.jsonl      records      what the run is, and its jobs
    attempts/N/               attempts     where and when it ran, and how that ended
                              decision     what happens next
                              heartbeats   the optimizer steps of each rank
    checkpoints/step-N/       checkpoints  how far it got
    run.lock                  lock         one run at a time uses the folder
"""
