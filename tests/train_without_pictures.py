"The command `s9_train`, which leaves empty files in the place of pictures and report, and may read the sample as arrays"
import decoded
from conftest import without_pictures

from s9_fastai.app.train import main_train

if __name__ == '__main__':
    decoded.use()
    with without_pictures(): main_train()
