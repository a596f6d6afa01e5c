"What a launcher starts, as in `torchrun -m s9_fastai.train`: the command `s9_train`"
from s9_fastai.app.train import main_train

if __name__ == '__main__': main_train()
