"""The letter box: what a run folder contains is written and read by this code alone.

`cluster/`, `train/` and `slurm/` meet here, and nowhere else; so it imports none of them, and only
the standard library.

    run.json, jobs.jsonl      records      what the run is, and the jobs that it was
    attempts/N/               attempts     where and when it ran, and how that ended
                              decision     what comes after that
                              heartbeats   the optimizer steps of each rank
    checkpoints/step-N/       checkpoints  how far it came
    run.lock                  lock         one run at a time works on the folder
"""
