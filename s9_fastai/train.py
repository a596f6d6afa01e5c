"What a launcher starts: `torchrun --nproc-per-node 2 -m s9_fastai.train`, with the options of `s9_train`"
from s9_fastai.app.train import main_train

if __name__ == '__main__': main_train()
