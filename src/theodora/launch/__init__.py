"""Running what `train` and `compare` run on the machines of a Ray cluster.

`ray_train.py` is the terminal's side of a training run and `ray_worker.py` a process's; `mailbox.py` carries what they
say to each other. `ray_cells.py` gives cells of a comparison to GPUs. `cluster.py` finds the cluster; Ray is imported
there, once a command asks for it.
"""
