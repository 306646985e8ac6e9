"""Sweeps: models x tasks x methods x retention from one YAML file, on this machine or on a SLURM cluster.

``plan`` reads and checks the file, ``methods`` says what its methods are at its budgets, ``launch`` turns cells into
jobs of submitit, ``control`` sees them through, and ``status`` shows and keeps what has become of every cell.
"""
