"The command `s9_train`, which leaves empty files in the place of pictures and report"
from conftest import without_pictures

from s9_fastai.app.train import main_train

if __name__ == '__main__':
    with without_pictures(): main_train()
