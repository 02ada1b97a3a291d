"""The commands, by name: the module and function of each, and its line in ``steppe --help``.

The table needs neither torch nor the ``lab`` extra; :mod:`steppe.lab.commands.group` makes the command line of it.
"""

COMMANDS = {
    "run": ("steppe.lab.commands.train", "Train one model with one method; the same command continues it."),
    "compare": ("steppe.lab.commands.compare", "Compare methods with an equal search for each, and write a report."),
    "report": ("steppe.lab.commands.report", "Rebuild the report of a run directory."),
    "measure": ("steppe.lab.commands.report", "Measure the minima that the runs of a directory ended in."),
    "doctor": (
        "steppe.lab.commands.train",
        "Show environment, devices, packages and data, and how to get missing ones.",
    ),
    "recipes": ("steppe.lab.commands.recipes", "List the papers' studies."),
    "reproduce": ("steppe.lab.commands.recipes", "Run a paper's study: its search, its comparison, its report."),
    "sweep": ("steppe.lab.commands.recipes", "Run the grid search of a paper's study alone."),
    "toy": ("steppe.lab.commands.toy", "Draw trajectories on a function of two variables."),
    "sde": ("steppe.lab.commands.sde", "Test optimizers against their stochastic differential equations."),
}
