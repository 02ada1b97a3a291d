"""Grid searches on a validation split, in stages: each stage fixes its best values for the later stages.

``space`` has the grids, ``study`` keeps them in an Optuna storage that any number of processes and machines share,
``work`` trains the points. The storage is SQLite in the run directory unless a URL names a database server.
"""
