"Train small image networks well, in fastai: CIFAR-10, Albumentations, StepLR"
import os, warnings
from importlib.metadata import PackageNotFoundError, version as _version

# albumentations looks for a newer release over the network when it is imported, unless this is set before
os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
# fastai calls torch.jit.script when it is imported; nobody who reads the warning could do anything about it
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')

try: __version__ = _version('s9_fastai')
except PackageNotFoundError: __version__ = '0+unknown'  # run from a source tree that is not installed
