"The public rooms in one line, for notebooks: `from s9_fastai.all import *`. Nothing inside the package uses it."
from s9_fastai.cifar import *
from s9_fastai.augment import *
from s9_fastai.batch_ops import *
from s9_fastai.batch_augment import *
from s9_fastai.readers import *
from s9_fastai.data import *
from s9_fastai.net import *
from s9_fastai.summary import *
from s9_fastai.fast import *
from s9_fastai.schedule import *
from s9_fastai.record import *
from s9_fastai.learner import *
from s9_fastai.interpret import *
from s9_fastai.train import *
