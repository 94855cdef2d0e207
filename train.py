"""Train: `python train.py` runs the default, `python train.py fit --config configs/recall/hybrid.yaml --optim.lr 1e-3` another one."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported: threads that wait by spinning make a busy machine many times slower

from memarch.models.lm import LM
from memarch.training import main

if __name__ == "__main__":
    main(build=LM)
